"""Counts the parts of a protobuf file before it is parsed.

A message of two bytes takes a hundred bytes when parsed, and a node a thousand more. So a file of some megabytes can
need more memory than there is. The walk reads only lengths, skips texts and bulk data, and ends when there are too many
parts.
"""

from __future__ import annotations

import mmap
from pathlib import Path

Schema = dict[int, str]

SCHEMAS: dict[str, Schema] = {
    "model": {7: "graph", 8: "leaf", 14: "leaf", 20: "leaf", 25: "function", 26: "leaf"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 14: "leaf", 15: "sparse", 16: "leaf"},
    "function": {7: "node", 9: "leaf", 11: "attribute", 12: "value", 14: "leaf"},
    "node": {5: "attribute", 9: "leaf", 10: "leaf"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 14: "type", 15: "type"}
    | {22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "leaf", 16: "leaf"},
    "value": {2: "type", 4: "leaf"},
    "type": {1: "tensor type", 4: "element", 5: "element", 8: "tensor type", 9: "element"},
    "element": {1: "type", 2: "type"},
    "tensor type": {2: "shape"},
    "shape": {1: "leaf"},
    "leaf": {},
}
"""The fields of onnx.proto that are messages, by number. In a leaf, only its own fields are counted."""

DEEPEST = 100
"""The deepest nesting of messages that protobuf reads."""


class Malformed(Exception):
    """Raised if the bytes are no protobuf message, or nest too deeply."""


def count_parts(path: Path, most: int) -> int:
    """The number of fields of all messages in a model file. Counting ends soon after `most`.

    Raises:
        Malformed: the file is no protobuf, is cut short, or nests too deeply.
    """
    if not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return _count(view, most)


def _count(view: mmap.mmap, most: int) -> int:
    """Source: protobuf's encoding, https://protobuf.dev/programming-guides/encoding/."""
    parts = 0
    waiting = [(0, len(view), SCHEMAS["model"], 1)]
    while waiting:
        at, end, schema, depth = waiting.pop()
        if depth > DEEPEST:
            raise Malformed("nested too deeply")
        while at < end:
            parts += 1
            if parts > most:
                return parts
            tag = view[at]
            at += 1
            if tag > 127:
                tag, at = _number(view, at - 1, end)
            kind = tag & 7
            if kind == 2:
                if at >= end:
                    raise Malformed("cut short")
                length = view[at]
                at += 1
                if length > 127:
                    length, at = _number(view, at - 1, end)
                if at + length > end:
                    raise Malformed("cut short")
                inner = schema.get(tag >> 3)
                if inner is not None:
                    waiting.append((at, at + length, SCHEMAS[inner], depth + 1))
                at += length
            elif kind == 0:
                _, at = _number(view, at, end)
            elif kind == 1 or kind == 5:
                at += 8 if kind == 1 else 4
            else:  # groups, which no ONNX message has, and numbers that mean nothing
                raise Malformed("no protobuf")
        if at != end:
            raise Malformed("cut short")
    return parts


def _number(view: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number that begins at a position, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise Malformed("cut short")
