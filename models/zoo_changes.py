"""The differences between a new graph of the zoo and the committed one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx

from models import zoo_store


def changes(old: onnx.ModelProto, new: onnx.ModelProto) -> list[str]:
    """The differences between two stripped graphs, one line for each."""
    before, after = features(old), features(new)
    lines = [
        f"{entry}: {before[entry]} -> {after[entry]}"
        for entry in sorted(before | after)
        if before[entry] != after[entry]
    ]
    if not lines and old != new:
        lines.append("the same nodes, initializers and interface by count; order, names, attributes or values differ")
    return lines


def features(model: onnx.ModelProto) -> Counter[str]:
    """How often the graph has each operator, opset, initializer and interface value.

    Initializers the exporter only numbered are counted by their shapes: those numbers shift at every change.
    """
    random = zoo_store.distributions(model)
    entries = Counter(f"node {node.op_type}" for node in model.graph.node)
    entries.update(f"opset {opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
    for tensor in model.graph.initializer:
        name = tensor.name if "." in tensor.name else "(unnamed)"
        kind = "random" if tensor.name in random else "constant"
        entries[f"initializer {name} {_shaped(tensor.data_type, tensor.dims)} {kind}"] += 1
    for role, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            of = value.type.tensor_type
            shape = [dim.dim_param or dim.dim_value for dim in of.shape.dim]
            entries[f"{role} {value.name} {_shaped(of.elem_type, shape)}"] += 1
    return entries


def _shaped(dtype: int, shape: Iterable[int | str]) -> str:
    return f"{onnx.TensorProto.DataType.Name(dtype)}[{', '.join(map(str, shape))}]"


def refresh(name: str, new: onnx.ModelProto, check: bool = False) -> bool:
    """Print how the graph differs from the committed one of that name, replace it unless only checking.

    Returns whether it differs.
    """
    path = zoo_store.path_of(name)
    data = new.SerializeToString(deterministic=True)
    lines = changes(onnx.load(path), new) if path.exists() else ["new"]
    print("\n    ".join([f"{name}: {len(data) / 1024:.0f} KB", *(lines or ["unchanged"])]), flush=True)
    if lines and not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return bool(lines)
