"""Put trained weights back into the ONNX file that they came from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, HypercloneError, Refused
from hyperclone_onnx.frameworks.checkpoints import read_weights
from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE
from hyperclone_onnx.frameworks.checkpoints.matching import match
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, from_torch
from hyperclone_onnx.frameworks.compiled_model import compile_model
from hyperclone_onnx.frameworks.compiling.program import Weight
from hyperclone_onnx.frameworks.parity import check_parity
from hyperclone_onnx.publishing.publication import check_output, publication
from hyperclone_onnx.reading import loading
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.writing import onnx_files as writer
from hyperclone_onnx.writing.onnx_files import needs_data_file

Array = npt.NDArray[Any]
Given = Mapping[str, Callable[[], Array]]
"""By name, a function that reads an array. If it is a `StoredArray`, its shape is known before it is read."""


@dataclass(frozen=True, repr=False)
class Absorption(Summarised):
    """The initializers that `absorb` replaced, and the parameters that the weights did not contain."""

    replaced: list[str]
    kept: list[str]
    """Parameters that keep their old values. Most of them are frozen ones, which a checkpoint may leave out."""
    casts: dict[str, int] = field(default_factory=dict)
    """How many tensors were cast, by ``trained type -> stored type``."""
    validated_by: str | None = None
    """The framework that we compared with ONNX Runtime on the written file; None without that check."""

    def summary(self) -> Summary:
        """How many weights were replaced, and which were not."""
        checked = f"validated with {self.validated_by}" if self.validated_by else "not validated"
        line = f"{len(self.replaced)} weights replaced, {len(self.kept)} kept, {checked}"
        return Summary(line, ("kept",), [(name,) for name in self.kept])


def absorb(
    model: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    *,
    manifest: str | os.PathLike[str] | None = None,
    check: bool = True,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
) -> Absorption:
    """Write a copy of a model file in which trained weights replace the stored ones.

    The weights are read one at a time while the file is written.

    Args:
        model: the file that `handoff` wrote a checkpoint of.
        weights: a checkpoint (see `checkpoints.read_weights`), a Hugging Face folder, or
            a mapping from names to arrays (a torch ``state_dict()``, a nested dict of JAX ``params``). A name is the
            path of a parameter or the name of an initializer. All names may have a common prefix (``model.``); names
            without that prefix are ignored.
        output: the file to write. It appears only after all checks have passed.
        manifest: for a Hugging Face folder that a trainer saved: the folder that ``handoff --to hf`` wrote, or the
            ``hyperclone_onnx.json`` in it. By default it is looked for in the folder of the weights, in the folder that
            holds that one, and beside `model`.
        check: whether to compare ONNX Runtime with a framework on the written file.
        inputs: inputs to compare on, the file's or its source's (see `validation.inputs.given`); random by default.
        dims: numbers for symbolic sizes of random inputs, by name.

    Raises:
        BadModel: a file cannot be read.
        BadRequest: a name, a shape or a type does not fit the model, or an array has values that are not finite.
        ModelsDiffer: ONNX Runtime and the framework compute different outputs from the written file.
        CannotWrite, Refused, MissingExtra: see `errors`.
    """
    out = Path(output)
    floating = [
        weight
        for weight in compile_model(model).program.weights
        if ir.DataType(weight.element_type).is_floating_point()
    ]
    target = loading.load(model)
    files = loading.source_files(Path(model), target)
    external = needs_data_file(target) or len(files) > 1
    if isinstance(weights, str | os.PathLike):
        checkpoint = Path(weights)
        files |= {file.resolve() for file in (checkpoint, *checkpoint.glob("**/*"))}
        check_output(out, files)
        by_initializer = _stored(checkpoint, floating, _manifest(checkpoint, Path(model), manifest))
    else:
        if manifest is not None:
            raise BadRequest("a manifest says how the weights of a Hugging Face folder are read; WEIGHTS is a mapping")
        check_output(out, files)
        by_initializer = _matched(_flat(weights), floating, "the mapping of weights")
    casts: Counter[str] = Counter()
    _replace(target, by_initializer, casts)
    missing = sorted({weight.initializer for weight in floating if weight.role != "constant"} - set(by_initializer))
    with publication(out) as written:
        try:
            writer.save(target, written, external=external)
        except Exception as problem:
            raise _cause(problem) from problem
        result = Absorption(sorted(by_initializer), missing, dict(casts))
        return replace(result, validated_by=check_parity(written, None, inputs, dims)) if check else result


def _manifest(checkpoint: Path, model: Path, given: str | os.PathLike[str] | None) -> Path | None:
    """The file that says how the weights of a Hugging Face folder are read; None where the weights need none.

    Raises:
        BadRequest: the given folder has no such file.
    """
    if given is not None:
        path = Path(given) / HUGGING_FACE if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise BadRequest(f"{given}: no {HUGGING_FACE} there: name the folder that `handoff --to hf` wrote")
        return path
    if (checkpoint / HUGGING_FACE).is_file():
        return checkpoint / HUGGING_FACE
    if not (checkpoint / "config.json").is_file():
        return None
    beside = (checkpoint.absolute().parent / HUGGING_FACE, model.absolute().parent / HUGGING_FACE)
    return next((path for path in beside if path.is_file()), None)


def _stored(checkpoint: Path, floating: list[Weight], manifest: Path | None) -> Given:
    """Read the weights of a checkpoint, by initializer."""
    if manifest is not None:
        from hyperclone_onnx.frameworks.hugging_face import read_trained

        by_initializer: Given = read_trained(checkpoint, manifest)
        return _matched(by_initializer, floating, str(checkpoint))
    try:
        return _matched(read_weights(checkpoint), floating, str(checkpoint))
    except BadRequest as problem:
        if not (checkpoint / "config.json").is_file():
            raise
        raise BadRequest(
            f"{problem} (for a Hugging Face folder, name the folder that `handoff` wrote with --manifest)"
        ) from problem


def _matched(given: Given, floating: list[Weight], what: str) -> Given:
    known = {weight.path: weight.initializer for weight in floating}
    known |= {weight.initializer: weight.initializer for weight in floating}
    return {initializer: given[name] for name, initializer in match(given, known, what).items()}


def _replace(target: ir.Model, weights: Given, casts: Counter[str]) -> None:
    """Replace initializers by lazy tensors, which read and check the trained arrays while the file is written."""
    stored = target.graph.initializers
    for name, array in weights.items():
        old = stored[name].const_value if name in stored else None
        if old is None:
            raise Refused(f"{name!r} is not stored as an initializer of the file: it cannot be replaced")
        if isinstance(array, StoredArray):
            _check_shape(name, old, array.shape)
        stored[name].const_value = ir.LazyTensor(
            partial(_checked, name, old, array, casts), dtype=old.dtype, shape=ir.Shape(old.shape.numpy()), name=name
        )


def _checked(name: str, old: ir.TensorProtocol, read_array: Callable[[], Array], casts: Counter[str]) -> Any:
    array = np.asarray(read_array())
    _check_shape(name, old, array.shape)
    dtype = np.dtype(old.dtype.numpy())
    if array.dtype.kind in "iub":
        raise BadRequest(f"{name!r} has whole numbers in the weights, but {old.dtype.name.lower()} in the model")
    new = np.ascontiguousarray(array, dtype=dtype)
    if not np.isfinite(new if new.dtype.kind == "f" else new.astype(np.float32)).all():
        raise BadRequest(f"{name!r} holds values that are not finite as {old.dtype.name.lower()}")
    if array.dtype != dtype:
        casts[f"{array.dtype} -> {dtype}"] += 1
    return ir.Tensor(new.reshape(array.shape), name=name, dtype=old.dtype)


def _check_shape(name: str, old: ir.TensorProtocol, new: tuple[int, ...]) -> None:
    shape = tuple(int(size) for size in old.shape.numpy())
    if tuple(new) != shape:
        raise BadRequest(f"{name!r} has the shape {tuple(new)} in the weights, {shape} in the model")


def _cause(problem: BaseException) -> BaseException:
    """Return our own error if the writer wrapped one in other exceptions; else return `problem` itself."""
    inner: BaseException | None = problem
    while inner is not None and not isinstance(inner, HypercloneError):
        inner = inner.__cause__ or inner.__context__
    return inner or problem


def _flat(weights: Mapping[str, Any], prefix: str = "") -> dict[str, Callable[[], Array]]:
    """Return the arrays of a flat or nested mapping, by names whose levels are joined by dots."""
    arrays: dict[str, Callable[[], Array]] = {}
    for name, value in weights.items():
        if isinstance(value, Mapping):
            arrays |= _flat(value, f"{prefix}{name}.")
        elif hasattr(value, "detach"):
            arrays[f"{prefix}{name}"] = from_torch(value)
        else:
            shape, dtype = np.shape(value), getattr(value, "dtype", np.dtype(np.float64))
            arrays[f"{prefix}{name}"] = StoredArray(shape, np.dtype(dtype), partial(np.asarray, value))
    return arrays
