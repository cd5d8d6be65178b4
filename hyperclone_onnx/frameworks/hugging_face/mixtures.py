"""Hands a mixture of experts to the mixture class of its family in transformers.

transformers has a class of its own for mixtures, such as Mixtral for Llama. `PAIRS` declares which class belongs to
which, and which fields of the configuration say the experts. Everything else follows from content and shape: tensors
that both classes have keep their names, and what only the mixture has is a router, the experts' weights that make
hidden units, or those that sum over them.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, ModelsDiffer, Refused, first_line
from hyperclone_onnx.frameworks.hugging_face.assembly import Given, zero
from hyperclone_onnx.frameworks.hugging_face.checking import (
    Error,
    FileRunner,
    Outputs,
    feeding,
    outputs,
    relative_error,
)
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, load, quiet, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, laid_out, squeezed_shape
from hyperclone_onnx.frameworks.hugging_face.matching import match
from hyperclone_onnx.frameworks.hugging_face.measuring import expected
from hyperclone_onnx.frameworks.hugging_face.report import Report
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, small_initializers
from hyperclone_onnx.plan.maps import Indices
from hyperclone_onnx.planning.experts import STEP, mixtures
from hyperclone_onnx.progress import Notify
from hyperclone_onnx.transforms.experts import ExpertTensor, expert_tensors
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs

Array = npt.NDArray[Any]

_LAYER = re.compile(r"^(.*?\.\d+)\.")
"""The beginning of a tensor's name, up to the number of its layer."""


@dataclass(frozen=True)
class Pair:
    """A class of dense models, and the class of mixtures that computes the same but for its feed-forward blocks.

    Args:
        dense: the dense class's model type.
        mixture: the mixture's.
        fields: the fields of the mixture's configuration, each with the size that it has: "experts", "chosen" or
            "units" (the hidden units of an expert).
        settings: fields that decide how the mixture computes, with the only values that are right here: the gates of
            the chosen experts add up to 1.
        dense_layers: the field that lists the layers without experts; None where all layers have some.
        idle: the ending of tensors that have no effect with these settings, such as the gate of a shared expert without
            hidden units. They become zero.
    """

    dense: str
    mixture: str
    fields: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: str | None = None
    idle: str | None = None


_MIXTRAL = {"num_local_experts": "experts", "num_experts_per_tok": "chosen", "intermediate_size": "units"}
_QWEN = {"num_experts": "experts", "num_experts_per_tok": "chosen", "moe_intermediate_size": "units"}

PAIRS = (
    Pair("llama", "mixtral", _MIXTRAL),
    Pair("mistral", "mixtral", _MIXTRAL),
    Pair("qwen3", "qwen3_moe", _QWEN, {"norm_topk_prob": True, "decoder_sparse_step": 1}, "mlp_only_layers"),
    Pair(
        "qwen2",
        "qwen2_moe",
        _QWEN,
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 0},
        "mlp_only_layers",
        "shared_expert_gate.weight",
    ),
    Pair("granite", "granitemoe", _MIXTRAL),
)
"""The classes that belong together."""


@dataclass(frozen=True)
class _File:
    """The mixture's file, as what the transform made of its source."""

    tensors: Mapping[str, Array]
    """Its floating initializers, by name."""
    routed: Mapping[str, str]
    """The name of the experts' tensor, by the dense tensor that it was made of."""
    routers: Mapping[str, str]
    """The name of the router, by the last weight of its block."""
    trained: bool
    """Whether it differs from what the transform gives."""


def grow_mixture(
    grown: Grown,
    checkpoint: Checkpoint,
    folder: Path,
    source: Path | None,
    *,
    dtype: str | None,
    largest_file: int | None,
    inputs: Inputs | None,
    dims: Mapping[str, int] | None,
    say: Notify,
) -> Report:
    """Write the checkpoint of a mixture, and compare it with the file.

    Args:
        grown: the mixture's file.
        checkpoint: the checkpoint from which its source was exported.
        folder: an empty folder to write into.
        source: the dense ONNX file that the mixture was made of.
        dtype: the type of the floating tensors that are written; None for those of the checkpoint.
        largest_file: the most bytes of weights in one file.
        inputs: inputs to compare on; random by default.
        dims: numbers for symbolic sizes of random inputs, by name.
        say: called with the name of each stage when the stage begins.

    Raises:
        BadModel, BadRequest, Refused, ModelsDiffer, CannotWrite: see `grow_checkpoint`.
    """
    pair = _pair(grown, checkpoint)
    if source is None:
        raise BadRequest(
            f"{grown.path}: only its source shows which tensors became experts: name the dense ONNX file with --source"
        )
    say("matching")
    given = Given.read(checkpoint)
    file = _read(grown, source)
    small, order = small_initializers(source)
    layouts = {name: several[0] for name, several in match(small, given.floating, order).layouts.items()}
    lost = [name for name in given.floating if name not in layouts and given.floating[name].ndim > 1]
    if lost:
        raise BadModel(f"{checkpoint.folder} is not the checkpoint that {source} comes from: {lost[0]!r} is not in it")
    fed = feeding(grown.path, given.model, inputs, dims)
    compared = expected(given, fed, checkpoint)
    given.release()
    say("configuring")
    model, changes = _built(grown, checkpoint, pair, _dense_layers(layouts, file))
    made = _Tensors(given, layouts, file, model, pair.idle)
    say("measuring")
    runner = FileRunner(grown.path, grown.plan)
    tolerance, reason = fed.tolerance()
    report = Report(str(grown.path), trained=file.trained, tolerance=tolerance, tolerance_reason=reason)
    report.file_tolerance, report.config = tolerance, changes
    worst: Error | None = None
    for swapped in (False, True):
        made.fill(swapped=swapped)
        errors = _compared(model, runner, [case for case, _ in compared])
        error = Error.worst([error for _, some in errors for error in some])
        if worst is None or error.relative < worst.relative:
            worst = error
        if error.relative <= tolerance:
            report.cases = [label for label, _ in errors]
            break
    assert worst is not None
    if not worst.relative <= tolerance:
        raise ModelsDiffer(
            f"the mixture in transformers differs from the file's in ONNX Runtime: relative error {worst.relative:.1e} "
            f"of {worst.name!r}, more than the {tolerance:.1e} that rounding explains"
        )
    say("writing")
    _write(model, checkpoint, folder, dtype, largest_file, changes, report)
    kind = type(model)
    del made, model  # a large mixture fits in memory once, and not twice
    gc.collect()
    say("validating")
    _check(folder, kind, compared, runner, report, changed=bool(changing(grown.plan.transforms)))
    return report


def _pair(grown: Grown, checkpoint: Checkpoint) -> Pair:
    """The classes of a mixture.

    Raises:
        Refused: transformers has no class for it, or its widths or layers grew besides.
    """
    plan = grown.plan
    if plan.dims or any(step.name != STEP for step in plan.transforms) or len(plan.transforms) != 1:
        raise Refused(
            f"{grown.path}: its widths or layers grew together with the experts. `expand {checkpoint.folder}` with the "
            "same options grows them first and then makes the experts, and gives the checkpoint of the mixture"
        )
    return mixture_class(checkpoint, shared=bool(plan.transforms[0].options.get("shared")))


def mixture_class(checkpoint: Checkpoint, *, shared: bool) -> Pair:
    """The classes of a mixture that is made of a checkpoint.

    Args:
        checkpoint: the dense checkpoint.
        shared: whether an expert always runs.

    Raises:
        Refused: transformers has no class for it.
    """
    kind = checkpoint.config.model_type
    pair = next((pair for pair in PAIRS if pair.dense == kind), None)
    if pair is None:
        known = ", ".join(f"{pair.dense} ({pair.mixture})" for pair in PAIRS)
        raise Refused(
            f"{checkpoint.folder}: transformers has no class for a mixture of {kind!r} that routes so. The families "
            f"are {known}. Hand the file to PyTorch, JAX or safetensors instead"
        )
    if shared:
        raise Refused(
            f"{checkpoint.folder}: an expert that always runs was asked for, and the class {pair.mixture!r} has none "
            "without a gate. Leave out --shared-expert, or hand the file to PyTorch, JAX or safetensors"
        )
    return pair


def _read(grown: Grown, source: Path) -> _File:
    """The tensors of a mixture's file, and what they were made of.

    Raises:
        BadModel: the file was not made of the source.
    """
    graph = source_of(source, grown.plan.transforms).model.graph
    made = expert_tensors(graph)
    tensors, trained = {}, False
    for name, tensor in grown.tensors.items():
        value = graph.initializers.get(name)
        if value is None or value.const_value is None or tuple(value.const_value.shape) != tuple(tensor.shape):
            raise BadModel(f"{source}: {grown.path} was not made of it: its tensor {name!r} is another one")
        tensors[name] = tensor.numpy()
        trained = trained or not np.array_equal(tensors[name], value.const_value.numpy(), equal_nan=True)
    return _File(tensors, _by_source(made, "routed"), _by_source(made, "router"), trained)


def _by_source(made: Mapping[str, ExpertTensor], kind: str) -> dict[str, str]:
    return {tensor.sources[-1]: name for name, tensor in made.items() if tensor.kind == kind}


def _layer(name: str) -> str | None:
    """The beginning of a tensor's name, up to the number of its layer."""
    layer = _LAYER.match(name)
    return None if layer is None else layer[1]


def _dense_layers(layouts: Mapping[str, Layout], file: _File) -> list[int]:
    """The numbers of the layers without experts."""
    layers: dict[int, bool] = {}
    for name, layout in layouts.items():
        layer = _layer(name)
        if layer is not None:
            number = int(layer.rsplit(".", 1)[1])
            layers[number] = layers.get(number, False) or _is_routed(layout, file)
    return [number for number, routed in sorted(layers.items()) if not routed]


def _is_routed(layout: Layout, file: _File) -> bool:
    return any(piece.initializer in file.routed for piece in layout.pieces)


def _built(
    grown: Grown, checkpoint: Checkpoint, pair: Pair, dense: Sequence[int]
) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """The mixture's model without its weights, and the fields of the configuration that changed.

    Raises:
        Refused: the class cannot say which layers have experts, or transformers does not build it.
    """
    (mixture,) = mixtures(grown.plan.transforms)
    block = grown.plan.transforms[0].options["blocks"][0]
    sizes = {"experts": mixture["experts"], "chosen": mixture["chosen"]}
    sizes["units"] = block["ffn"] // grown.plan.transforms[0].options.get("granularity", 1)
    fields = {name: sizes[size] for name, size in pair.fields.items()} | dict(pair.settings)
    if dense and pair.dense_layers is None:
        raise Refused(
            f"{grown.path}: layers without experts ({', '.join(map(str, dense[:4]))}) are nothing that the class "
            f"{pair.mixture!r} has: --experts-in all, or hand the file to PyTorch, JAX or safetensors"
        )
    if pair.dense_layers is not None:
        fields[pair.dense_layers] = list(dense)
    kind = transformers.CONFIG_MAPPING[pair.mixture]
    known = kind().to_dict()
    before = checkpoint.config.to_dict()
    kept = {
        name: value
        for name, value in before.items()
        if name in known and name not in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype")
    }
    config = kind(**{**kept, **fields})
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(checkpoint.config) not in classes or classes[type(checkpoint.config)] is not checkpoint.model_class:
        raise Refused(
            f"{checkpoint.folder}: a {checkpoint.model_class.__name__} is no language model, and mixtures of other "
            "models have no class here"
        )
    try:
        with quiet():
            model = classes[kind]._from_config(config, attn_implementation="eager").float().eval()
    except Exception as problem:  # settings that do not fit together may raise any exception
        raise Refused(f"transformers builds no {pair.mixture!r} with these sizes ({first_line(problem)})") from problem
    changes = {"model_type": (before["model_type"], pair.mixture)}
    changes |= {name: (before.get(name), value) for name, value in fields.items() if before.get(name) != value}
    return model, changes


class _Tensors:
    """The tensors of a mixture in transformers.

    Args:
        given: the dense checkpoint.
        layouts: how its tensors are made from the dense file's initializers.
        file: the mixture's file.
        model: the mixture's model, which gets the tensors.
        idle: the ending of tensors without effect, which become zero.

    Raises:
        Refused: a tensor has no place in the model, or the model has one for which there is nothing.
    """

    def __init__(self, given: Given, layouts: Mapping[str, Layout], file: _File, model: Any, idle: str | None) -> None:
        self.layouts, self.file = layouts, file
        self.targets = stored_tensors(model)
        self.plain: dict[str, Array] = {}
        self.routed: dict[str, list[str]] = {}
        for name, array in given.held().items():
            layout = layouts.get(name)
            layer = _layer(name)
            if layout is not None and layer is not None and _is_routed(layout, file):
                self.routed.setdefault(layer, []).append(name)
            elif name in self.targets and tuple(self.targets[name].shape) == array.shape:
                self.plain[name] = array if layout is None else self._made(layout, file.tensors).astype(array.dtype)
            else:
                raise Refused(
                    f"the tensor {name!r} of the checkpoint has no place in {type(model).__name__}: hand the file to "
                    "PyTorch, JAX or safetensors instead"
                )
        self.new: dict[str, list[str]] = {}
        for name in self.targets:
            if idle is not None and name.endswith(idle):
                zero(model, name)
            elif name not in self.plain and name not in given.others and self.targets[name].numel():
                self.new.setdefault(_layer(name) or name, []).append(name)
        if set(self.new) != set(self.routed):
            odd = sorted(set(self.new) ^ set(self.routed))[0]
            raise Refused(f"{type(model).__name__} has other experts than the file: in {odd!r}")

    def _made(self, layout: Layout, tensors: Mapping[str, Array]) -> Array:
        """A tensor of the dense form, from initializers that may have fewer hidden units."""

        def whole(initializer: str, axis: int) -> Indices:
            return np.arange(squeezed_shape(tensors[initializer])[axis], dtype=np.int64)

        return laid_out(layout, lambda initializer: tensors[initializer], whole)

    def fill(self, *, swapped: bool) -> None:
        """Put all numbers into the model.

        Args:
            swapped: whether the two weights that make hidden units stand in the other order in it than in the dense
                model. One of the two is the gate, and only the result shows which.
        """
        with torch.no_grad():
            for name, array in self.plain.items():
                self.targets[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
            for layer, names in self.new.items():
                for name, array in zip(names, self._of_layer(layer, names, swapped=swapped), strict=True):
                    self.targets[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def _of_layer(self, layer: str, names: Sequence[str], *, swapped: bool) -> Iterator[Array]:
        """The numbers of the router and the experts of a layer, for each of some names of the mixture."""
        dense = {name: self._experts(self.layouts[name]) for name in self.routed[layer]}
        router = self._router(layer)
        ups = [array for array in dense.values() if array.ndim == 3 and array.shape[2] == router.shape[1]]
        downs = [array for array in dense.values() if array.ndim == 3 and array.shape[1] == router.shape[1]]
        if len(ups) == 3 or len(downs) == 3:  # as many hidden units as features: the down projection is the last
            ups, downs = ups[:2], downs[-1:]
        if len(ups) != 2 or len(downs) != 1 or len(dense) != 3:
            raise Refused(f"the feed-forward block of {layer!r} has other tensors than a gate and two weights")
        joined = np.concatenate(ups[::-1] if swapped else ups, axis=1)
        kinds = {router.shape: router, joined.shape: joined, downs[0].shape: downs[0]}
        for name in names:
            array = kinds.get(tuple(self.targets[name].shape))
            if array is None:
                raise Refused(f"the tensor {name!r} is no router and no expert's weight that the file has")
            yield array

    def _experts(self, layout: Layout) -> Array:
        """A weight of all experts, in the form of the dense model's."""
        stacks = {piece.initializer: self.file.tensors[self.file.routed[piece.initializer]] for piece in layout.pieces}
        count = len(next(iter(stacks.values())))
        return np.stack(
            [self._made(layout, {name: stack[expert] for name, stack in stacks.items()}) for expert in range(count)]
        )

    def _router(self, layer: str) -> Array:
        """The router of a layer, (experts, features)."""
        initializers = {piece.initializer for name in self.routed[layer] for piece in self.layouts[name].pieces}
        (router,) = {self.file.routers[name] for name in initializers if name in self.file.routers}
        return self.file.tensors[router].T


def _compared(model: Any, runner: FileRunner, cases: Sequence[Any]) -> list[tuple[str, list[Error]]]:
    errors = []
    for case in cases:
        try:
            errors.append((case.label, runner.compare(case, outputs(model, case))))
        except RuntimeError:
            continue
    if not errors:
        raise Refused("ONNX Runtime does not run the file on any of the inputs that we tried")
    return errors


def _write(
    model: Any,
    checkpoint: Checkpoint,
    folder: Path,
    dtype: str | None,
    largest_file: int | None,
    changes: Mapping[str, tuple[Any, Any]],
    report: Report,
) -> None:
    """Write the weights, the configuration and the other files of a checkpoint."""
    report.dtype = dtype or checkpoint.main_type.name
    size = largest_file or checkpoint.largest_file
    kind = getattr(torch, report.dtype)
    try:
        with quiet():
            model.to(kind).save_pretrained(folder, **({} if size is None else {"max_shard_size": size}))
        report.copied = checkpoint.copy_files(folder)
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wrong = [name for name, (_, after) in changes.items() if config.get(name, after) != after]
    if wrong:
        raise Refused(f"transformers does not store the field {wrong[0]!r} of the configuration as it was given")
    names = stored_tensors(model)
    report.parameters = len(names), sum(tensor.numel() for tensor in names.values())
    report.weights = sorted(path.name for path in folder.glob("*.safetensors*"))


def _check(
    folder: Path,
    kind: Any,
    compared: Sequence[tuple[Any, Outputs]],
    runner: FileRunner,
    report: Report,
    *,
    changed: bool,
) -> None:
    """Load the written checkpoint, and compare it with the file and the dense model.

    Raises:
        ModelsDiffer: the outputs differ by more than the tolerance.
    """
    loaded = load(folder, kind).model.float()
    if report.dtype in ("float16", "bfloat16"):
        report.notes.append(f"the weights are rounded to {report.dtype}, so the outputs are not compared in float32")
        return
    computed = [(case, outputs(loaded, case), want) for case, want in compared]
    errors: list[Error] = []
    for case, got, _ in computed:
        try:
            errors += runner.compare(case, got)
        except RuntimeError:
            continue
    report.error_to_file = Error.worst(errors).relative
    if not report.error_to_file <= report.tolerance:
        raise ModelsDiffer(
            f"the written checkpoint differs from the file's in ONNX Runtime: relative error {report.error_to_file:.1e}"
        )
    if not report.trained and not changed:
        report.error_to_source = max(
            relative_error(got[name], array) for _, got, want in computed for name, array in want.items() if name in got
        )
        if not report.error_to_source <= report.tolerance:
            raise ModelsDiffer(
                f"the written checkpoint differs from its source's: relative error {report.error_to_source:.1e}"
            )
