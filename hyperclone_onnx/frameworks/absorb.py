"""Trained weights back into the ONNX file that they came from."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx import storage, writer
from hyperclone_onnx.analysis import analyse
from hyperclone_onnx.errors import BadModel, BadRequest, ModelsDiffer, Refused
from hyperclone_onnx.feeds import cases
from hyperclone_onnx.frameworks.handoff import read
from hyperclone_onnx.frameworks.program import Program
from hyperclone_onnx.sessions import Runner

Array = npt.NDArray[Any]
TOLERANCE = 1e-4
"""What two runs of one file stay under in float32, as a part of an output's largest element."""

PREFIXES = ("module.", "_orig_mod.", "model.module.")
"""What wrappers put before the names of a state_dict."""


@dataclass(frozen=True)
class Absorption:
    """What came back: the initializers that were replaced, and those that were not given (frozen ones, mostly)."""

    replaced: list[str]
    kept: list[str]
    validated_by: str | None = None
    """The framework that ONNX Runtime was compared with."""


def absorb(
    model: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    *,
    check: bool = True,
) -> Absorption:
    """Write a model file anew with trained weights in the place of its own.

    Args:
        model: the file that was handed over.
        weights: a safetensors file, or names and arrays (a torch ``state_dict()``, a nested dict of JAX ``params``).
            Names are those of the parameters, or of the initializers.
        output: the file to write; it appears only when all is right.
        check: whether to compare ONNX Runtime with a framework on the written file.

    Raises:
        BadModel: a file cannot be read.
        BadRequest: a name, a shape or a type does not fit.
        ModelsDiffer: ONNX Runtime and the framework compute different things from the written file.
        CannotWrite, Refused: see `errors`.
    """
    out = Path(output)
    program = read(model).program
    target = storage.load(model)
    sources = storage.source_files(Path(model), target)
    given = _read_safetensors(Path(weights)) if isinstance(weights, str | os.PathLike) else _flat(weights)
    if isinstance(weights, str | os.PathLike):
        sources.add(Path(weights).resolve())
    storage.check_output(out, sources)
    external = storage.needs_data_file(target) or len(storage.source_files(Path(model), target)) > 1
    result = _replace(program, target, given)
    with storage.publication(out) as written:
        writer.save(target, written, external=external)
        return replace(result, validated_by=_validate(written)) if check else result


def _replace(program: Program, target: ir.Model, given: Mapping[str, Callable[[], Array]]) -> Absorption:
    floating = [each for each in program.weights if ir.DataType(each.element_type).is_floating_point()]
    by_path = {each.path: each.initializer for each in floating}
    names = set(by_path.values())
    stored = {name: value for name, value in target.graph.initializers.items() if value.const_value is not None}
    found: dict[str, Callable[[], Array]] = {}
    for name, array in given.items():
        initializer = _initializer(name, by_path, names)
        if initializer not in stored:
            raise Refused(f"{initializer!r} is not stored as an initializer of the file: it cannot be replaced")
        if initializer in found:
            raise BadRequest(f"the weights hold {initializer!r} twice")
        found[initializer] = array
    missing = sorted({each.initializer for each in floating if each.role != "constant"} - set(found))
    if not found:
        raise BadRequest("the weights hold no tensor of this model")
    for name, array in found.items():
        old = stored[name].const_value
        assert old is not None
        stored[name].const_value = _checked(name, old, array)
    return Absorption(sorted(found), missing)


def _initializer(name: str, by_path: Mapping[str, str], names: set[str]) -> str:
    for prefix in ("", *PREFIXES):
        bare = name.removeprefix(prefix) if prefix else name.replace("._checkpoint_wrapped_module", "")
        if bare in by_path:
            return by_path[bare]
        if bare in names:
            return bare
    near = difflib.get_close_matches(name, [*by_path, *names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BadRequest(f"the weights hold {name!r}, which is no floating tensor of this model{hint}")


def _checked(name: str, old: ir.TensorProtocol, read_array: Callable[[], Array]) -> ir.TensorProtocol:
    array = read_array()
    shape = tuple(int(size) for size in old.shape.numpy())
    if array.shape != shape:
        raise BadRequest(f"{name!r} has the shape {array.shape} in the weights, {shape} in the model")
    new = np.ascontiguousarray(array.astype(old.dtype.numpy()))
    if not np.isfinite(new.astype(np.float32)).all():
        raise BadRequest(f"{name!r} holds values that are not finite as {old.dtype.name.lower()}")
    return ir.Tensor(new, name=name, dtype=old.dtype)


# -- where weights come from ------------------------------------------------------------------------------------


def _flat(weights: Mapping[str, Any], prefix: str = "") -> dict[str, Callable[[], Array]]:
    """Names and arrays of a flat or a nested mapping, the levels joined by dots."""
    found: dict[str, Callable[[], Array]] = {}
    for name, value in weights.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = lambda value=value: _as_numpy(value)  # type: ignore[misc]
    return found


def _as_numpy(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


_SAFETENSORS_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


def _read_safetensors(path: Path) -> dict[str, Callable[[], Array]]:
    """The tensors of a safetensors file, each read when it is asked for."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
    except (OSError, ValueError) as problem:
        raise BadModel(f"{path}: not a readable safetensors file ({problem})") from problem
    if not isinstance(header, dict):
        raise BadModel(f"{path}: not a safetensors file, or truncated")
    header.pop("__metadata__", None)
    found: dict[str, Callable[[], Array]] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = _SAFETENSORS_TYPES.get(entry["dtype"])
        if kind is None:
            raise BadRequest(f"{path}: {name!r} is of the type {entry['dtype']}; weights are floating")
        dtype = np.dtype(kind.numpy())
        count = math.prod(entry["shape"])
        if end - begin != count * dtype.itemsize or 8 + length + end > size:
            raise BadModel(f"{path}: truncated, or its header is wrong: {name!r} needs {count * dtype.itemsize} bytes")
        offset, shape = 8 + length + begin, tuple(entry["shape"])
        found[name] = lambda dtype=dtype, count=count, offset=offset, shape=shape: np.fromfile(  # type: ignore[misc]
            path, dtype, count, offset=offset
        ).reshape(shape)
    return found


# -- whether it is right ----------------------------------------------------------------------------------------


def _validate(path: Path) -> str:
    """Run the written file in ONNX Runtime and in a framework; which framework it was.

    Raises:
        ModelsDiffer: they disagree.
    """
    name, run = _framework_runner(path)
    runner = Runner(path, "cpu")
    for case in cases(analyse(path).dimensions):
        try:
            wanted = runner.run(case.feeds)
        except RuntimeError:
            continue  # lengths that this model does not take
        found = run(case.feeds)
        for output, want in wanted.items():
            got = found[output]
            scale = float(np.abs(want).max(initial=0.0)) or 1.0
            error = float(np.abs(got.astype(np.float64) - want).max(initial=0.0)) / scale
            if got.shape != want.shape or not error <= TOLERANCE:
                raise ModelsDiffer(f"ONNX Runtime and {name} disagree on {output!r} by {error:.1e} ({case.label})")
        return name
    raise Refused("no random inputs were found that ONNX Runtime takes: it cannot be validated")


def _framework_runner(path: Path) -> tuple[str, Callable[[Mapping[str, Array]], dict[str, Array]]]:
    try:
        import torch

        from hyperclone_onnx.frameworks.torch import load as load_module
    except ImportError:
        from hyperclone_onnx.frameworks.jax import load as load_function

        apply, params = load_function(path)
        program = read(path).program
        return "JAX", lambda feeds: _named(program, apply(params, **feeds), np.asarray)
    model = load_module(path)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            result = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return _named(model.program, result, lambda tensor: tensor.float().numpy())

    return "PyTorch", run


def _named(program: Program, result: Any, convert: Callable[[Any], Array]) -> dict[str, Array]:
    outputs = result if isinstance(result, dict) else {program.outputs[0]: result}
    return {name: convert(value) for name, value in outputs.items()}
