"""``handoff SMALL --plan PLAN --to TARGET -o DIR``: a checkpoint of the grown model, which exists nowhere as a file.

One process may write it, or many that torchrun started, on one machine or on several with one file system. Each
computes its own part of the numbers from the small model, and none holds the whole.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.errors import BadRequest, ModelsDiffer, Refused, in_bytes
from hyperclone_onnx.frameworks.checkpoints.manifest import Entry, Manifest, entries
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, compile_model
from hyperclone_onnx.frameworks.exports.parts import begin, identity, parts_of
from hyperclone_onnx.frameworks.parity import TOLERANCE
from hyperclone_onnx.frameworks.processes import Processes, jax_processes, torch_processes
from hyperclone_onnx.frameworks.targets import Target
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.progress import Notify, ignore_stage
from hyperclone_onnx.publishing.publication import publication_folder
from hyperclone_onnx.system.memory import free_memory
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.outputs import compare
from hyperclone_onnx.validation.running import Pair, run_source, start_file
from hyperclone_onnx.validation.tolerance import tolerance_of

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Run = Callable[[Feeds], dict[str, Array]]
Tensors = Mapping[str, ir.TensorProtocol]

SHARED_TARGETS = ("pytorch", "jax")
"""The targets that several processes write together."""

CONNECTED: Mapping[Target, Callable[[], AbstractContextManager[Processes]]] = {
    "pytorch": torch_processes,
    "jax": jax_processes,
}


@dataclass(frozen=True)
class Written:
    """What all processes wrote together."""

    weights: str
    """The file or subfolder that holds the weights."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shared:
    """A finished checkpoint, as every process knows it."""

    compiled: CompiledModel
    parameters: tuple[Entry, ...]
    processes: int
    notes: tuple[str, ...]
    validated_by: str | None


@dataclass(frozen=True)
class _Work:
    model: Path
    plan: Plan
    compiled: CompiledModel
    tensors: Tensors
    processes: Processes
    say: Notify


def write_from_plan(
    model: Path,
    plan: Plan | str | os.PathLike[str],
    target: Target,
    output: Path,
    *,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    largest_file: int,
    check: bool = True,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    manifest: Callable[[CompiledModel, tuple[Entry, ...], str], Manifest],
    notify: Notify | None = None,
) -> Shared:
    """Write a checkpoint of the model that a plan makes of a small one. All processes of a launcher call this.

    The folder appears when all is right. What a killed run leaves beside it, in the folder ``.NAME.parts``, the next
    run uses again if model, plan and division are the same.

    Args:
        model: path of the small ONNX file.
        plan: the plan, or the path of its JSON file.
        target: ``pytorch`` or ``jax``.
        output: the folder to make, in a file system that all processes see.
        freeze: as for `hand_over`.
        train: as for `hand_over`.
        largest_file: the most bytes of one part.
        check: whether to compare the checkpoint with the small model in ONNX Runtime.
        inputs: as for `hand_over`; the inputs of the small model.
        dims: as for `hand_over`.
        manifest: makes the manifest of the folder.
        notify: called with a short text when a stage begins, in process 0.

    Raises:
        BadModel, BadRequest, Refused, CannotWrite, ModelsDiffer, MissingExtra: as for `hand_over`.
    """
    grown_by = plan if isinstance(plan, Plan) else Plan.read(plan)
    with CONNECTED[target]() as processes:
        say = notify if notify is not None and processes.rank == 0 else ignore_stage
        say("reading")
        compiled = processes.together(lambda: compile_model(model, plan=grown_by, freeze=freeze, train=train))
        parameters = entries(compiled.program, compiled.plan)
        if not parameters:
            raise BadRequest(f"{model}: none of its floating-point tensors is a parameter: there is nothing to train")
        tensors = {entry.path: compiled.tensors[entry.initializer] for entry in parameters}
        work = _Work(model, grown_by, compiled, tensors, processes, say)
        with ExitStack() as stack:
            folder = Path(processes.on_first(lambda: str(stack.enter_context(publication_folder(output)))))
            written = _WRITERS[target](work, output, folder, largest_file)
            processes.on_first(lambda: _put(manifest(compiled, parameters, written.weights), folder))
            notes = list(written.notes)
            framework = None
            if check:
                say("validating")
                framework, why = _checked(work, target, folder / written.weights, inputs, dims)
                notes += [why] if why else []
        return Shared(compiled, parameters, processes.count, tuple(notes), framework)


def _put(manifest: Manifest, folder: Path) -> str:
    manifest.write(folder)
    return ""


# -- writing ------------------------------------------------------------------------------------------------


def _write_pytorch(work: _Work, output: Path, folder: Path, largest: int) -> Written:
    from hyperclone_onnx.frameworks.exports import CHECKPOINT
    from hyperclone_onnx.frameworks.exports.pytorch_parts import is_complete, join_parts, write_part

    processes, parts = work.processes, parts_of(work.tensors, largest)
    place = Path(processes.on_first(lambda: str(output.resolve().with_name(f".{output.resolve().name}.parts"))))
    before = processes.on_first(lambda: begin(place, identity(work.model, work.plan, parts)))
    folders = [place / f"{number:05d}" for number in range(len(parts))]
    own = range(processes.rank, len(parts), processes.count)

    def write() -> int:
        kept = 0
        for number in own:
            if is_complete(folders[number]):
                kept += 1
                continue
            work.say(f"writing part {number + 1} of {len(parts)}")
            shutil.rmtree(folders[number], ignore_errors=True)
            write_part(work.tensors, parts[number], folders[number])
        return kept

    kept = sum(map(int, processes.texts(str(processes.together(write)))))

    def join() -> str:
        join_parts(work.tensors, parts, folders, folder / CHECKPOINT)
        shutil.rmtree(place)
        return ""

    processes.on_first(join)
    return Written(CHECKPOINT, (f"{before}: {kept} of {len(parts)}" if kept else before,) if before else ())


def _write_jax(work: _Work, _output: Path, folder: Path, _largest: int) -> Written:
    from hyperclone_onnx.frameworks.exports import CHECKPOINT
    from hyperclone_onnx.frameworks.exports.jax import write_sharded

    work.say("writing")
    write_sharded(work.tensors, folder / CHECKPOINT)
    return Written(CHECKPOINT)


_WRITERS: Mapping[Target, Callable[[_Work, Path, Path, int], Written]] = {"pytorch": _write_pytorch, "jax": _write_jax}


# -- checking -----------------------------------------------------------------------------------------------


def _checked(
    work: _Work, target: Target, checkpoint: Path, inputs: Inputs | None, dims: Mapping[str, int] | None
) -> tuple[str | None, str]:
    """Load the checkpoint in shards, and compare its outputs with those of the small model in ONNX Runtime.

    Returns:
        The framework that was compared, or None; and why there was no comparison.

    Raises:
        ModelsDiffer: the outputs differ.
        Refused: the small model does not run.
    """
    plan, processes = work.plan, work.processes
    source = source_of(work.model).model
    needed, free = weight_bytes(source), free_memory()
    if not plan.preserves or changing(plan.transforms):
        return None, "not validated: the growth changes the function"
    too_large = processes.on_first(lambda: "" if free is None or 2 * needed < free else "yes")
    if too_large:
        return None, f"not validated: the small model ({in_bytes(needed)}) does not fit in free memory"
    analysis = analyse(work.model, plan.transforms)
    wishes = wishes_of(analysis.model, inputs, dims)
    pair = Pair(analysis.dimensions, analysis.model, plan, "cpu", wishes, source if plan.transforms else None)
    # Every process runs the small model: the inputs are drawn from one seed, and so are the same.
    expected = run_source(pair, pair.as_transformed(start_file(work.model, "cpu", pair.source)))
    accepted = next((one for one in expected.sets if one.has_numbers), None)
    if accepted is None:
        raise Refused(f"{work.model}: no output is a number, so that nothing can be compared: --no-validate")
    run = _RUNNERS[target](work, checkpoint)
    got = run(pair.feeds_of_grown(accepted.case.feeds))
    tolerance = max(TOLERANCE, tolerance_of(analysis.dimensions, plan, None)[0])
    reports = [compare(name, want, got.get(name)) for name, want in pair.outputs_of_grown(accepted.outputs).items()]
    problems = [f"{report.name}: {why}" for report in reports if (why := report.problem_beyond(tolerance))]

    def judge() -> None:
        if problems:
            raise ModelsDiffer(f"{checkpoint}: does not compute what {work.model} does: {problems[0]}")

    processes.together(judge)
    return ("PyTorch" if target == "pytorch" else "JAX"), ""


def _run_pytorch(work: _Work, checkpoint: Path) -> Run:
    import torch
    import torch.distributed.checkpoint as dcp

    from hyperclone_onnx.frameworks.exports.pytorch import KEY
    from hyperclone_onnx.frameworks.torch import OnnxModule, fully_shard_blocks

    shared = work.processes.count > 1
    module = OnnxModule(work.compiled)
    if shared:
        from torch.distributed.device_mesh import init_device_mesh

        fully_shard_blocks(module, init_device_mesh("cpu", (work.processes.count,)))
    module.materialize("cpu", parameters=False)
    dcp.load({KEY: module.state_dict()}, checkpoint_id=checkpoint, no_dist=not shared)

    def run(feeds: Feeds) -> dict[str, Array]:
        with torch.no_grad():
            result = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: tensor.float().numpy() for name, tensor in module.program.by_name(result).items()}

    return run


def _run_jax(work: _Work, checkpoint: Path) -> Run:
    import jax
    import orbax.checkpoint as ocp

    from hyperclone_onnx.frameworks.compiling.application import Application
    from hyperclone_onnx.frameworks.compiling.naming import nested
    from hyperclone_onnx.frameworks.exports.jax import abstract_arrays, over_all_devices
    from hyperclone_onnx.frameworks.slices import read_whole

    names = [glob.escape(weight.initializer) for weight in work.compiled.program.weights if weight.role != "constant"]
    compiled = compile_model(work.model, plan=work.plan, train=names)
    constants = {
        weight.path: read_whole(compiled.tensors[weight.initializer])
        for weight in compiled.program.weights
        if weight.role == "constant"
    }
    apply = Application(compiled.program, nested(constants), "jax")
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(checkpoint.resolve(), nested(abstract_arrays(work.tensors)))
    everywhere = jax.sharding.NamedSharding(over_all_devices(), jax.sharding.PartitionSpec())

    def run(feeds: Feeds) -> dict[str, Array]:
        result = jax.jit(lambda params: apply(params, **feeds), out_shardings=everywhere)(params)
        named = compiled.program.by_name(result)
        return {name: np.asarray(array.addressable_data(0)) for name, array in named.items()}

    return run


_RUNNERS: Mapping[Target, Callable[[_Work, Path], Run]] = {"pytorch": _run_pytorch, "jax": _run_jax}
