"""Optional values: an input of the graph that may be absent is None."""

from __future__ import annotations

from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array, implements


@implements("Optional")
def optional(xp: Any, value: Array | None = None, *, type: Any = None) -> Array | None:
    """the value, or None"""
    return value


@implements("OptionalGetElement")
def get_element(xp: Any, value: Array) -> Array:
    """the value, which must be there"""
    return value


@implements("OptionalHasElement")
def has_element(xp: Any, value: Array | None = None) -> Array:
    """whether there is a value"""
    return xp.lift(value is not None, 9, xp.device_of(value))
