"""Inputs with defaults: stored tensors that are inputs of the graph too, so that a caller may replace them.

Adapters are stored in this way. In the graph that we analyse, an input with a default is an input like others: the
tensor of a caller may have another shape, and it cannot be divided among clones as a weight can. We keep the default
aside and put it back, grown, into the grown graph.

Before IR version 4, all weights had to be inputs, and some exporters list them still. These are weights, not defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

_DEFAULT = "hyperclone_onnx.default"
"""The key of an input's default in its `meta`."""

FIRST_WITH_DEFAULTS = 4
"""From this IR version on, a stored tensor that is also an input is a default. Others need not be inputs."""


def set_defaults_aside(model: ir.Model) -> None:
    """Turn inputs with defaults into ordinary inputs.

    If most of the stored floating-point numbers are in listed tensors, an exporter has listed its weights. Then only
    tensors whose declared shape has symbols are defaults, because a weight has a fixed shape.
    """
    if model.ir_version < FIRST_WITH_DEFAULTS:
        return
    graph = model.graph
    listed = [value for value in graph.inputs if value.name in graph.initializers and value.const_value is not None]
    weights = sum(map(_floats, graph.initializers.values()))
    lists_weights = 2 * sum(map(_floats, listed)) > weights
    for value in listed:
        if not lists_weights or _has_symbols(value):
            value.meta[_DEFAULT] = value.const_value
            del graph.initializers[value.name or ""]
            value.const_value = None


def _floats(value: ir.Value) -> int:
    """The number of floating-point elements that a value stores."""
    tensor = value.const_value
    return tensor.size if tensor is not None and tensor.dtype.is_floating_point() else 0


def _has_symbols(value: ir.Value) -> bool:
    """Whether callers may give tensors of other shapes than the default's."""
    return value.shape is None or not value.shape.is_static()


def defaults_of(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The inputs that have a default, and the defaults."""
    for value in model.graph.inputs:
        if _DEFAULT in value.meta:
            yield value, value.meta[_DEFAULT]


def put_defaults_back(
    model: ir.Model, changed: Callable[[ir.Value, ir.TensorProtocol], ir.TensorProtocol] = lambda _, tensor: tensor
) -> None:
    """Give inputs their defaults again.

    Args:
        model: the model, which is changed.
        changed: makes the default of a model that has grown.
    """
    for value, tensor in list(defaults_of(model)):
        value.const_value = changed(value, tensor)
        del value.meta[_DEFAULT]
        model.graph.initializers[value.name or ""] = value


def store_defaults(model: ir.Model) -> None:
    """Turn all defaults into weights, and remove their inputs."""
    with_default = [value for value, _ in defaults_of(model)]
    put_defaults_back(model)
    for value in with_default:
        model.graph.inputs.remove(value)
