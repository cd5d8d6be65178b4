"""What a plan says of where it comes from: digests of the source's graph and weights, and of the options.

The weights' digest is of samples: of every tensor its name, type and shape, and of what it holds the first, the middle
and the last 4 KB, or all of it up to 64 KB. It tells one checkpoint from another at no cost; it is no proof that a
file is untouched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows

SAMPLE = 4096
WHOLE = 16 * SAMPLE


def provenance(model: ir.Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan records.

    Args:
        model: the normalised source.
        options: what was asked for, as plain data.

    Returns:
        ``graph``, ``weights`` and ``options``, digests of 128 bits in hexadecimal, and ``bytes``, the weights' size.
    """
    return {
        "graph": _graph(model),
        "weights": _weights(model),
        "bytes": sum(tensor.nbytes for tensor in _tensors(model).values() if tensor.dtype != ir.DataType.STRING),
        "options": _digest(json.dumps(options, sort_keys=True, separators=(",", ":")).encode()).hexdigest(),
    }


def _digest(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    stored = model.graph.initializers.items()
    return {name: value.const_value for name, value in stored if value.const_value is not None}


def _graph(model: ir.Model) -> str:
    """Of the opsets, the interface, and every node with its attributes, in order."""
    digest = _digest()
    digest.update(json.dumps(sorted(model.graph.opset_imports.items())).encode())
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name}: {value.type} {value.shape}\n".encode("utf-8", "surrogatepass"))
    for node in model.graph:
        text = ir.serde.serialize_node(node).SerializeToString(deterministic=True)
        digest.update(len(text).to_bytes(8, "little") + text)
    return str(digest.hexdigest())


def _weights(model: ir.Model) -> str:
    digest, scratch = _digest(), Scratch()
    for name, tensor in sorted(_tensors(model).items()):
        shape = list(map(int, tensor.shape.numpy()))
        digest.update(f"{name}: {tensor.dtype.name} {shape}\n".encode("utf-8", "surrogatepass"))
        if tensor.dtype == ir.DataType.STRING:
            digest.update(repr(tensor.numpy().tolist()).encode())
            continue
        size = tensor.nbytes
        stored = StoredRows(tensor, 1, size)
        places = [(0, size)] if size <= WHOLE else [(at, SAMPLE) for at in (0, size // 2, size - SAMPLE)]
        for start, count in places:
            digest.update(stored.read_bytes(start, count, scratch).tobytes())
        stored.close()
    return str(digest.hexdigest())
