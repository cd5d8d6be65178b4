"""Computes the provenance that a plan records: digests of the source's graph, of its weights, and of the options.

The digest of the weights covers samples. Of every tensor it has the name, the type and the shape, and the first, the
middle and the last 4 KB of the content. A tensor of up to 64 KB is covered as a whole. The digest tells one checkpoint
from another in little time. It does not prove that a file is unchanged.
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
"""The bytes of one sample."""
WHOLE = 16 * SAMPLE
"""Tensors of up to this number of bytes are covered as a whole."""


def provenance(model: ir.Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a plan.

    Args:
        model: the normalised source.
        options: the options of the request, as plain data.

    Returns:
        ``graph``, ``weights`` and ``options``: digests of 128 bits (BLAKE2b) in hexadecimal; ``bytes``: the size of all
        weights.
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
    """The digest of the opsets, of the inputs and outputs, and of every node with its attributes, in order."""
    digest = _digest()
    digest.update(json.dumps(sorted(model.graph.opset_imports.items())).encode())
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name}: {value.type} {value.shape}\n".encode("utf-8", "surrogatepass"))
    for node in model.graph:
        text = ir.serde.serialize_node(node).SerializeToString(deterministic=True)
        digest.update(len(text).to_bytes(8, "little") + text)
    return str(digest.hexdigest())


def _weights(model: ir.Model) -> str:
    """The digest of the samples of all tensors, in order of their names."""
    digest, scratch = _digest(), Scratch()
    for name, tensor in sorted(_tensors(model).items()):
        shape = list(map(int, tensor.shape.numpy()))
        digest.update(f"{name}: {tensor.dtype.name} {shape}\n".encode("utf-8", "surrogatepass"))
        if tensor.dtype == ir.DataType.STRING:
            digest.update(repr(tensor.numpy().tolist()).encode())
            continue
        size = tensor.nbytes
        stored = StoredRows(tensor, 1, size)
        places = [(0, size)] if size <= WHOLE else [(start, SAMPLE) for start in (0, size // 2, size - SAMPLE)]
        for start, count in places:
            digest.update(stored.read_bytes(start, count, scratch).tobytes())
        stored.close()
    return str(digest.hexdigest())
