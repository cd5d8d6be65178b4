"""``handoff BIG --to TARGET -o DIR``: write the weights of a grown model as a checkpoint that a trainer can load."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.checkpoints.manifest import Entry, Manifest, entries
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, PathLike, compile_model
from hyperclone_onnx.frameworks.listing import little_trained
from hyperclone_onnx.frameworks.optimizer.growing import Kind, write_optimizer
from hyperclone_onnx.frameworks.pairing import pair
from hyperclone_onnx.frameworks.targets import Target
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.training_recipe import RECIPE, TrainingRecipe
from hyperclone_onnx.progress import Notify, ignore_stage
from hyperclone_onnx.publishing.publication import publication_folder
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.writing.safetensors_files import LARGEST_FILE, write_safetensors

CHECKPOINT = "checkpoint"
"""The subfolder of the handoff's folder that holds the weights, for targets whose checkpoint is a folder."""

Tensors = Mapping[str, ir.TensorProtocol]


@dataclass(frozen=True, repr=False)
class HandedOver(Summarised):
    """What a handoff wrote."""

    target: Target
    folder: str
    tensors: int
    parameters: int
    """The number of elements of all tensors, frozen ones included."""
    optimizer: dict[str, Any] | None = None
    """The fields of `optimizer.growing.GrownState`; None if no optimizer state was grown."""
    validated_by: str | None = None
    """The framework that we compared with ONNX Runtime on the written weights; None without that check."""
    hugging_face: dict[str, Any] = field(default_factory=dict)
    """For ``hf``: how the checkpoint's tensors were matched with initializers, and the changes in its configuration."""
    training: TrainingRecipe | None = None
    """Advice for training the grown model further; None if the model was not grown."""
    teacher: dict[str, Any] | None = None
    """The teacher's file, and what of the two is compared; None without a teacher."""
    warning: str | None = None
    """A warning if little of the model is trained; else None."""
    plan: str | None = None
    """The plan by which the model was grown on the way; None if the model's file is the grown one."""
    processes: int = 1
    """The number of processes that wrote together."""
    notes: tuple[str, ...] = ()

    def summary(self) -> Summary:
        """What was written, and how it was validated."""
        by = self.validated_by or ("transformers" if self.hugging_face else None)
        checked = f"validated with {by}" if by else "not validated"
        line = f"{self.folder} for {self.target}, {self.tensors} tensors, {self.parameters:,} parameters, {checked}"
        changed = self.hugging_face.get("config", {})
        return Summary(line, ("config.json", "from", "to"), [(name, *values) for name, values in changed.items()])

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def hand_over(
    model: PathLike,
    target: Target,
    output: PathLike,
    *,
    plan: Plan | PathLike | None = None,
    like: PathLike | None = None,
    source: PathLike | None = None,
    optimizer: PathLike | None = None,
    teacher: PathLike | None = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    dtype: str | None = None,
    largest_file: int | None = None,
    check: bool = True,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    notify: Notify | None = None,
) -> HandedOver:
    """Write a model's weights into a new folder. The folder appears only after all checks have passed.

    Args:
        model: path of the (grown) ONNX file.
        target: ``pytorch`` (torch.distributed.checkpoint), ``jax`` (Orbax), ``safetensors``, or ``hf`` (a Hugging Face
            checkpoint).
        output: the folder to create.
        plan: grow `model`, the small file, on the way: the grown one exists nowhere. For ``pytorch`` and ``jax``. All
            processes that torchrun started may call this together; each then writes its own part.
        like: for ``hf`` only: the checkpoint that the small model was exported from.
        source: the small ONNX file. Give it only if tensors or names cannot be recovered from the grown file.
        optimizer: the small model's AdamW state; it is grown and written with the weights.
        teacher: a model that this one is to learn from by distillation. The manifest then says where it is, and which
            of its values belong to which of this model.
        freeze: globs of initializer names; the matching tensors are not trained.
        train: globs of initializer names; the matching tensors are trained.
        dtype: for ``hf`` only: the type of the weights; by default each keeps the type that it has in `like`.
        largest_file: the largest number of bytes of weights in one safetensors file. Larger models are written to
            several files and an index. By default 5 GB; for ``hf`` the size of the files of `like`, if it has several.
        check: whether to compare ONNX Runtime with a framework on the written weights.
        inputs: inputs to compare on, the file's or its source's (see `validation.inputs.given`); random by default.
        dims: numbers for symbolic sizes of random inputs, by name.
        notify: called with a short text when a stage begins.

    Raises:
        BadModel: a file cannot be read, or is incomplete.
        BadRequest: options contradict each other, a glob matches no tensor, or the optimizer's state does not fit.
        Refused: the model has an operator, or a form of an operator, that is not supported.
        CannotWrite: the folder cannot be written.
        ModelsDiffer: ONNX Runtime and the framework compute different outputs from the written weights.
        MissingExtra: the target's extra is not installed.
    """
    if (target == "hf") != (like is not None):
        raise BadRequest("--like names the checkpoint that --to hf grows: give both or neither")
    if dtype is not None and target != "hf":
        raise BadRequest(f"--dtype is for --to hf; the weights for {target} have the types of the ONNX file")
    say = notify or ignore_stage
    if plan is not None:
        excess = _given(like=like, source=source, optimizer=optimizer, teacher=teacher)
        if excess:
            raise BadRequest(f"--plan grows MODEL on the way: with it there is no {excess}")
        how_checked: dict[str, Any] = {"check": check, "inputs": inputs, "dims": dims}
        return _from_plan(model, plan, target, output, freeze, train, largest_file, how_checked, say)
    with publication_folder(Path(output)) as folder:
        if target == "hf":
            assert like is not None
            excess = _given(freeze=freeze, train=train, optimizer=optimizer, teacher=teacher)
            if excess:
                raise BadRequest(f"--to hf takes no {excess}: a Hugging Face checkpoint holds all weights, and no more")
            how = {"dtype": dtype, "largest_file": largest_file, "inputs": inputs, "dims": dims}
            return _to_hugging_face(Path(model), Path(like), source, folder, output, say, how)
        say("reading")
        _require(target)
        compiled = compile_model(model, freeze=freeze, train=train)
        parameters = entries(compiled.program, compiled.plan)
        if not parameters:
            raise BadRequest(f"{model}: none of its floating-point tensors is a parameter: there is nothing to train")
        tensors = {entry.path: compiled.tensors[entry.initializer] for entry in parameters}
        state: dict[str, Any] | None = None
        if optimizer is not None:
            say("growing the optimizer's state")
            kind = OPTIMIZER_KINDS.get(target, "safetensors")
            written = write_optimizer(model, optimizer, folder, kind, source=source, compiled=compiled)
            state = {**asdict(written), "file": Path(written.file).name}
        noted: dict[str, Any] | None = None
        if teacher is not None:
            say("pairing with the teacher")
            noted = {"model": os.fspath(Path(teacher).resolve()), **pair(model, teacher).to_json()}
        say("writing")
        weights = WRITERS[target](tensors, folder, largest_file or LARGEST_FILE)
        warning = little_trained(compiled.program.weights)
        state_file = None if state is None else str(state["file"])
        training = None if compiled.plan is None else RECIPE
        _manifest(model, target, compiled, parameters, weights, state_file, noted).write(folder)
        framework = _checked(model, folder, say, inputs, dims) if check else None
    size = sum(math.prod(entry.shape) for entry in parameters)
    return HandedOver(
        target,
        os.fspath(output),
        len(parameters),
        size,
        state,
        framework,
        training=training,
        teacher=noted,
        warning=warning,
    )


def _manifest(
    model: PathLike,
    target: Target,
    compiled: CompiledModel,
    parameters: tuple[Entry, ...],
    weights: str,
    state_file: str | None = None,
    teacher: dict[str, Any] | None = None,
) -> Manifest:
    growth, advice = None, None
    if compiled.plan is not None:
        growth, advice = _growth(compiled.plan), RECIPE.to_json()
    return Manifest(Path(model).name, target, weights, state_file, growth, parameters, advice, teacher)


def _from_plan(
    model: PathLike,
    plan: Plan | PathLike,
    target: Target,
    output: PathLike,
    freeze: Sequence[str],
    train: Sequence[str],
    largest_file: int | None,
    how_checked: Mapping[str, Any],
    say: Notify,
) -> HandedOver:
    """Write a checkpoint of the model that a plan makes of a small one, in this process or in many."""
    if target not in ("pytorch", "jax"):
        raise BadRequest(f"--plan is for --to pytorch and --to jax; for {target} grow the file first, with expand")
    _require(target)
    from hyperclone_onnx.frameworks.exports.from_plan import write_from_plan

    shared = write_from_plan(
        Path(model),
        plan,
        target,
        Path(output),
        freeze=freeze,
        train=train,
        largest_file=largest_file or LARGEST_FILE,
        manifest=partial(_manifest, model, target),
        notify=say,
        **how_checked,
    )
    return HandedOver(
        target,
        os.fspath(output),
        len(shared.parameters),
        sum(math.prod(entry.shape) for entry in shared.parameters),
        validated_by=shared.validated_by,
        training=RECIPE,
        warning=little_trained(shared.compiled.program.weights),
        plan="plan" if isinstance(plan, Plan) else os.fspath(plan),
        processes=shared.processes,
        notes=shared.notes,
    )


def _given(**options: Any) -> str:
    return ", ".join(f"--{name}" for name, value in options.items() if value)


def _require(target: Target) -> None:
    """Fail before the long work if the target's framework is missing: importing our module raises MissingExtra."""
    module = {"pytorch": "torch", "jax": "jax"}.get(target)
    if module is not None:
        import_module(f"hyperclone_onnx.frameworks.{module}")


def _growth(plan: Plan) -> dict[str, Any]:
    """Summarise the growth for the manifest. The recipes are left out: they are in the model's file."""
    dims = {name: {"role": dim.role, "from": dim.map.size, "to": dim.map.grown} for name, dim in plan.dims.items()}
    return {"strategy": plan.strategy.to_json(), "dims": dims}


def _checked(model: PathLike, folder: Path, say: Notify, inputs: Inputs | None, dims: Mapping[str, int] | None) -> str:
    """Compare the framework with the written weights against ONNX Runtime with the model file; return the framework."""
    from hyperclone_onnx.frameworks.checkpoints import read_weights
    from hyperclone_onnx.frameworks.checkpoints.matching import match
    from hyperclone_onnx.frameworks.parity import check_parity

    say("validating")
    paths = [entry.path for entry in Manifest.read(folder).tensors]
    arrays = read_weights(folder)
    path_of_name = match(arrays, {path: path for path in paths}, str(folder))
    return check_parity(Path(model), {path: arrays[name] for name, path in path_of_name.items()}, inputs, dims)


def _to_hugging_face(
    model: Path,
    like: Path,
    source: PathLike | None,
    folder: Path,
    output: PathLike,
    say: Notify,
    options: Mapping[str, Any],
) -> HandedOver:
    from hyperclone_onnx.frameworks.hugging_face import grow_checkpoint

    small = None if source is None else Path(source)
    report = grow_checkpoint(model, like, folder, source=small, notify=say, **options)
    return HandedOver("hf", os.fspath(output), *report.parameters, hugging_face=report.to_json(), training=RECIPE)


def _write_pytorch(tensors: Tensors, folder: Path, _: int) -> str:
    from hyperclone_onnx.frameworks.exports.pytorch import write_checkpoint

    write_checkpoint(tensors, folder / CHECKPOINT)
    return CHECKPOINT


def _write_jax(tensors: Tensors, folder: Path, _: int) -> str:
    from hyperclone_onnx.frameworks.exports.jax import write_checkpoint

    write_checkpoint(tensors, folder / CHECKPOINT)
    return CHECKPOINT


def _write_safetensors(tensors: Tensors, folder: Path, largest_file: int) -> str:
    return write_safetensors(tensors, folder, largest_file, metadata={"format": "pt"})[-1].name


WRITERS: Mapping[Target, Callable[[Tensors, Path, int], str]] = {
    "pytorch": _write_pytorch,
    "jax": _write_jax,
    "safetensors": _write_safetensors,
}
"""By target, a function (tensors, folder, largest number of bytes in one file) -> name of what holds the weights.

The name is that of a file or a subfolder in the folder. ``hf`` is not here: it grows a checkpoint of the small model.
"""

OPTIMIZER_KINDS: Mapping[Target, Kind] = {"pytorch": "pytorch", "jax": "jax"}
"""The format of the optimizer's state for a target; any other target gets a safetensors file."""
