"""Writes ONNX files. The place of everything in a file is computed before the first byte is written.

A model file that contains its weights is one protobuf message. We stream the tensors to their places in the message, so
that memory never contains the whole message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, CannotWrite
from hyperclone_onnx.progress import Progress
from hyperclone_onnx.publishing.publication import data_name
from hyperclone_onnx.reading.loading import tensors
from hyperclone_onnx.writing.streaming import Check, Layout, Placed, write

SMALL = 256
"""Tensors with at most this number of bytes stay in the model file, as in onnx_ir."""

ALIGNED = 1 << 20
"""Tensors with more bytes than this begin at a page of the data file."""
PAGE = 4096
"""The bytes of a page. A tensor that begins at a page can be mapped, as the ONNX specification advises."""

LARGEST_MESSAGE = (1 << 31) - 1
"""The most bytes of a protobuf message."""

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""The field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data."""

INLINE_LIMIT = 1_500_000_000
"""Models with more bytes of weights get a data file, because a protobuf message has at most 2 GB."""


def needs_data_file(model: ir.Model) -> bool:
    """Whether the weights of a model are too large for one protobuf message."""
    return sum(tensor.nbytes for tensor in tensors(model)) > INLINE_LIMIT


def save(
    model: ir.Model,
    path: Path,
    *,
    external: bool,
    max_shard_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    keep: bool = False,
    check: Check | None = None,
) -> list[Any]:
    """Write a model file. Its tensors are streamed block by block.

    Args:
        model: the model. It is not changed.
        path: the model file, in an existing folder.
        external: whether the tensors are written to a data file beside the model file.
        max_shard_size: the most bytes of a data file, with `external`. Further tensors are written to further files
            (``big.onnx-00001-of-00003.data``). A larger tensor gets a file for itself.
        workers: the number of processes that compute and write (see `parallel.workers_for`). The files do not depend
            on it.
        progress: called after each tensor, with the bytes of all written tensors and those of all tensors.
        keep: whether the files stay in the page cache, because they are read next.
        check: see `streaming.write`. It can read the model file as soon as the graph is in it, so only with `external`.

    Returns:
        The answers of `check`.

    Raises:
        BadRequest: `max_shard_size` is below 1.
        CannotWrite: a file cannot be created, the space is too small, or the model does not fit in one message.
        BadModel: a source file cannot be read any more.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise BadRequest(f"max_shard_size is {max_shard_size}: a data file needs at least 1 byte")
    layout = _external(model, path, max_shard_size) if external else _inline(model, path)
    return write(layout, workers, progress, keep=keep, check=check if external else None)


def data_files(path: Path, sizes: Iterable[int], max_shard_size: int | None) -> list[tuple[str, int]]:
    """The data file and the offset of each tensor.

    Args:
        path: the model file.
        sizes: the bytes of the tensors, in order.
        max_shard_size: the most bytes of a data file; None for one file.
    """
    placed: list[tuple[int, int]] = []
    shard = end = 0
    for size in sizes:
        offset = -(-end // PAGE) * PAGE if size > ALIGNED else end
        if max_shard_size is not None and end and offset + size > max_shard_size:
            shard, offset = shard + 1, 0
        placed.append((shard, offset))
        end = offset + size
    name = data_name(path)
    return [(shard_name(name, index, shard + 1), offset) for index, offset in placed]


def shard_name(name: str, index: int, count: int) -> str:
    """The name of one of several files, in the form of transformers: ``model-00001-of-00003.safetensors``.

    >>> shard_name("big.onnx.data", 0, 3)
    'big.onnx-00001-of-00003.data'
    """
    if count == 1:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{index + 1:05d}-of-{count:05d}{dot}{suffix}"


def _external(model: ir.Model, path: Path, max_shard_size: int | None) -> Layout:
    """The layout of a model file with data files beside it."""
    stored = [value for value in _initializers(model) if value.const_value is not None]
    large = [value for value in stored if _size(value) > SMALL]
    placed = data_files(path, map(_size, large), max_shard_size)
    sizes = {path.with_name(name): offset + _size(value) for value, (name, offset) in zip(large, placed, strict=True)}
    references = {value: _reference(value, *place, path) for value, place in zip(large, placed, strict=True)}
    tensors = [
        Placed(_tensor(value), path.with_name(name), offset)
        for value, (name, offset) in zip(large, placed, strict=True)
    ]
    references |= {value: _loaded(value) for value in stored if value not in references}
    with _replaced(references):
        message = _serialised(path, ir.to_proto(model))
    return Layout({**sizes, path: len(message)}, [(path, 0, message)], tensors)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    return tensor


def _size(value: ir.Value) -> int:
    """The number of bytes that a tensor takes in a data file; 0 for strings, which cannot be in a data file."""
    tensor = _tensor(value)
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def _reference(value: ir.Value, name: str, offset: int, path: Path) -> ir.TensorProtocol:
    """The entry in the model file for a tensor whose data is in another file."""
    tensor = _tensor(value)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or "", base_dir=path.parent
    )


def _loaded(value: ir.Value) -> ir.TensorProtocol:
    """A tensor whose data is in the model file."""
    tensor = _tensor(value)
    if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
        return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
    return tensor


@contextmanager
def _replaced(tensors: dict[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """Replace the tensors of values until the end of the `with` block."""
    before = {value: value.const_value for value in tensors}
    try:
        for value, tensor in tensors.items():
            value.const_value = tensor
        yield
    finally:
        for value, original in before.items():
            value.const_value = original


def _serialised(path: Path, proto: onnx.ModelProto | onnx.GraphProto) -> bytes:
    try:
        message: bytes = proto.SerializeToString(deterministic=True)
        return message
    except Exception as problem:  # protobuf has an error class of its own for a too large message
        raise CannotWrite(f"{path}: its graph does not fit in one protobuf message ({problem})") from problem


def _inline(model: ir.Model, path: Path) -> Layout:
    """The layout of a model file that contains its weights: the message, with gaps for the bytes of large tensors.

    The fields of a protobuf message may have any order. We put the graph last in the model, and the initializers last
    in the graph.
    """
    stored = [value for value in _initializers(model) if value.const_value is not None]
    top_level = set(model.graph.initializers.values())
    large = {value.name: value for value in stored if value in top_level and _size(value) > SMALL}
    references = {
        value: _reference(value, "-", 0, path) if value.name in large and value in top_level else _loaded(value)
        for value in stored
    }
    with _replaced(references):
        proto = ir.to_proto(model)
    fixed: list[tuple[int, bytes]] = []
    gaps: list[tuple[int, ir.TensorProtocol]] = []
    end = 0
    for initializer in proto.graph.initializer:
        size = _size(large[initializer.name]) if initializer.name in large else 0
        if size:
            initializer.ClearField("external_data")
            initializer.ClearField("data_location")
        entry = initializer.SerializeToString(deterministic=True) + (_head(_RAW_DATA, size) if size else b"")
        entry = _head(_INITIALIZER, len(entry) + size) + entry
        fixed.append((end, entry))
        end += len(entry)
        if size:
            gaps.append((end, _tensor(large[initializer.name])))
            end += size
    del proto.graph.initializer[:]
    graph = _serialised(path, proto.graph)
    proto.ClearField("graph")
    front = _serialised(path, proto) + _head(_GRAPH, len(graph) + end) + graph
    base = len(front)
    if base + end > LARGEST_MESSAGE:
        raise CannotWrite(f"{path}: {base + end} bytes do not fit in one protobuf message")
    return Layout(
        {path: base + end},
        [(path, 0, front), *((path, base + offset, entry) for offset, entry in fixed)],
        [Placed(tensor, path, base + offset) for offset, tensor in gaps],
    )


def _head(field: int, length: int) -> bytes:
    """The tag and the length of a field that holds a message or bytes."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    """A whole number in protobuf's encoding: 7 bits to a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
