"""How much a protobuf file holds besides bulk data, found before it is parsed.

A message of two bytes takes a hundred when parsed, and a node a thousand more. Bulk data (the bytes of a tensor) takes
what it takes; everything else in a model file is small, and is measured here by walking over the lengths alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

Span = tuple[int, int]

# Field numbers of onnx.proto.
MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER = 7, 1, 5
NODE_ATTRIBUTE, ATTRIBUTE_TENSOR, ATTRIBUTE_FLOATS, ATTRIBUTE_INTS = 5, 5, 7, 8
TENSOR_BULK = frozenset([4, 5, 7, 9, 10, 11])
"""float_data, int32_data, int64_data, raw_data, double_data, uint64_data."""

SMALL = 4096
"""Nodes of fewer bytes are not looked into: they hold no bulk data that would matter."""


class Malformed(Exception):
    """The bytes are no protobuf message."""


def structure_bytes(path: Path) -> int:
    """The bytes of a model file that are not bulk data of stored tensors.

    Raises:
        Malformed: the file is no protobuf, or is cut short.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return len(view) - _bulk_of_model(view)


def _bulk_of_model(view: mmap.mmap) -> int:
    bulk = 0
    for graph in _spans(view, (0, len(view)), MODEL_GRAPH):
        for field, start, end in _fields(view, graph):
            if field == GRAPH_INITIALIZER:
                bulk += _bulk_of_tensor(view, (start, end))
            elif field == GRAPH_NODE and end - start > SMALL:
                for attribute in _spans(view, (start, end), NODE_ATTRIBUTE):
                    for tensor in _spans(view, attribute, ATTRIBUTE_TENSOR):
                        bulk += _bulk_of_tensor(view, tensor)
    return bulk


def _bulk_of_tensor(view: mmap.mmap, tensor: Span) -> int:
    return sum(end - start for field, start, end in _fields(view, tensor) if field in TENSOR_BULK)


def _spans(view: mmap.mmap, message: Span, wanted: int) -> Iterator[Span]:
    return ((start, end) for field, start, end in _fields(view, message) if field == wanted)


def _fields(view: mmap.mmap, message: Span) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: number, start and end; the others are passed over.

    Source: protobuf's encoding, https://protobuf.dev/programming-guides/encoding/.
    """
    at, end = message
    while at < end:
        tag, at = _varint(view, at, end)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(view, at, end)
        elif kind == 2:
            length, at = _varint(view, at, end)
            if at + length > end:
                raise Malformed
            yield tag >> 3, at, at + length
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:  # groups, which no ONNX message has, and numbers that mean nothing
            raise Malformed
    if at != end:
        raise Malformed


def _varint(view: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise Malformed
