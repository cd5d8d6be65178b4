"""ONNX files: where everything in them lies, worked out before a byte is written.

A model with its weights inside is one protobuf message; its tensors are streamed to their places in it too, so that
the message is never whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, CannotWrite
from hyperclone_onnx.progress import Progress
from hyperclone_onnx.publishing.publication import data_name
from hyperclone_onnx.reading.loading import tensors
from hyperclone_onnx.writing.streaming import Layout, Placed, write

SMALL = 256
"""Tensors of no more bytes stay in the model file, as onnx_ir has it."""

ALIGNED = 1 << 20
PAGE = 4096
"""Larger tensors than this begin at a page of the data file, as the ONNX specification advises: they can be mapped."""

LARGEST_MESSAGE = (1 << 31) - 1
"""A protobuf message ends at 2 GB."""

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto, GraphProto and TensorProto."""


INLINE_LIMIT = 1_500_000_000
"""Models with more bytes of weights get a data file of their own: a protobuf ends at 2 GB."""


def needs_data_file(model: ir.Model) -> bool:
    """Whether a model's weights are too many for one protobuf file."""
    return sum(tensor.nbytes for tensor in tensors(model)) > INLINE_LIMIT


def save(
    model: ir.Model,
    path: Path,
    *,
    external: bool,
    max_shard_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model, its tensors streamed block by block.

    Args:
        model: the model; it is not changed.
        path: the model file; its folder exists.
        external: whether the tensors go into a data file beside it.
        max_shard_size: with `external`, begin another data file before one has more bytes than this
            (``big.onnx-00001-of-00003.data``); a larger tensor has a file of its own.
        workers: processes that compute and write; see `parallel.workers_for`. The files do not
            depend on it.
        progress: told of each tensor written.

    Raises:
        CannotWrite: a file cannot be made, there is too little space, or the model does not fit in one message.
        BadModel: a source cannot be read any more.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise BadRequest(f"a data file of at most {max_shard_size} bytes holds nothing")
    layout = _external(model, path, max_shard_size) if external else _inline(model, path)
    write(layout, workers, progress)


def data_files(path: Path, sizes: Iterable[int], max_shard_size: int | None) -> list[tuple[str, int]]:
    """The data file and the offset of each of some tensors, given their bytes in order."""
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
    """The name of one of several files, as transformers has it: ``model-00001-of-00003.safetensors``.

    >>> shard_name("big.onnx.data", 0, 3)
    'big.onnx-00001-of-00003.data'
    """
    if count == 1:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{index + 1:05d}-of-{count:05d}{dot}{suffix}"


# -- weights beside the model -----------------------------------------------------------------------------


def _external(model: ir.Model, path: Path, max_shard_size: int | None) -> Layout:
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
    with _in_their_place(references):
        text = _checked(path, ir.to_proto(model))
    return Layout({**sizes, path: len(text)}, [(path, 0, text)], tensors)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    return tensor


def _size(value: ir.Value) -> int:
    """The bytes that a tensor takes in a file; strings have no such form."""
    tensor = _tensor(value)
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def _reference(value: ir.Value, name: str, offset: int, path: Path) -> ir.TensorProtocol:
    """What the model file says of a tensor that lies elsewhere."""
    tensor = _tensor(value)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or "", base_dir=path.parent
    )


def _loaded(value: ir.Value) -> ir.TensorProtocol:
    """A tensor that lies nowhere but in the model file."""
    tensor = _tensor(value)
    if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
        return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
    return tensor


@contextmanager
def _in_their_place(tensors: dict[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """Let values have other tensors for a while."""
    before = {value: value.const_value for value in tensors}
    try:
        for value, tensor in tensors.items():
            value.const_value = tensor
        yield
    finally:
        for value, own in before.items():
            value.const_value = own


def _checked(path: Path, proto: onnx.ModelProto | onnx.GraphProto) -> bytes:
    try:
        text: bytes = proto.SerializeToString(deterministic=True)
        return text
    except Exception as problem:  # protobuf's own error for a message that is too large
        raise CannotWrite(f"{path}: its graph does not fit in one protobuf message ({problem})") from problem


# -- weights in the model ---------------------------------------------------------------------------------


def _inline(model: ir.Model, path: Path) -> Layout:
    """The message with gaps where the bytes of large tensors belong.

    A message is a sequence of fields in any order: the graph comes last in the model, and its initializers last in it.
    """
    stored = [value for value in _initializers(model) if value.const_value is not None]
    own = set(model.graph.initializers.values())
    large = {value.name: value for value in stored if value in own and _size(value) > SMALL}
    references = {
        value: _reference(value, "-", 0, path) if value.name in large and value in own else _loaded(value)
        for value in stored
    }
    with _in_their_place(references):
        proto = ir.to_proto(model)
    fixed: list[tuple[int, bytes]] = []
    gaps: list[tuple[int, ir.TensorProtocol]] = []
    end = 0
    for each in proto.graph.initializer:
        size = _size(large[each.name]) if each.name in large else 0
        if size:
            each.ClearField("external_data")
            each.ClearField("data_location")
        text = each.SerializeToString(deterministic=True) + (_head(_RAW_DATA, size) if size else b"")
        text = _head(_INITIALIZER, len(text) + size) + text
        fixed.append((end, text))
        end += len(text)
        if size:
            gaps.append((end, _tensor(large[each.name])))
            end += size
    del proto.graph.initializer[:]
    graph = _checked(path, proto.graph)
    proto.ClearField("graph")
    front = _checked(path, proto) + _head(_GRAPH, len(graph) + end) + graph
    base = len(front)
    if base + end > LARGEST_MESSAGE:
        raise CannotWrite(f"{path}: {base + end} bytes do not fit in one protobuf message")
    return Layout(
        {path: base + end},
        [(path, 0, front), *((path, base + at, text) for at, text in fixed)],
        [Placed(tensor, path, base + at) for at, tensor in gaps],
    )


def _head(field: int, length: int) -> bytes:
    """The tag and the length of a field that holds a message or bytes."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
