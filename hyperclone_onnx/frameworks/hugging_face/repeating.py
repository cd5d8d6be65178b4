"""Make the graph of a model with many layers from the graph of the same model with two.

PyTorch traces every layer, which takes seconds for each. Layers that are alike have the same nodes. So the model with
two layers is exported, its last layer is repeated in the graph, and each repeat reads the tensors of its own layer.

Layers count as alike if the modules of all of them have the same classes and settings, apart from the layer's own
number, and if the configuration has no list that tells layers apart. The caller compares outputs besides: but a short
input does not show a window of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.frameworks.hugging_face.shortening import without_numbers
from hyperclone_onnx.layers.numbering import Numbered, numbered
from hyperclone_onnx.transforms.deepening import Place, deepen
from hyperclone_onnx.transforms.layers import stacks_of


def with_all_layers(graph: ir.Model, model: Any, tensor_of: Callable[[str, Any], ir.TensorProtocol]) -> bool:
    """Repeat the layers of a graph until it has those of the whole model, and give it the whole model's tensors.

    Args:
        graph: the graph of the model with two layers, which is changed. Its stored tensors have the model's names.
        model: the whole model.
        tensor_of: gives the tensor to store for a parameter, from its name and the parameter.

    Returns:
        Whether every tensor of the whole model has its place. If not, the graph is of no use.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))  # a tied tensor may have either name
    stored = graph.graph.initializers
    placed = {without_numbers(name) for name in stored if name in tensors}
    for stack in stacks_of(graph):
        columns = list(zip_longest(*(unit.stored for unit in stack.units)))
        if stack.period != 1 or not all(map(_is_alike, columns)):
            return False
        forms = [form for form in map(_form, columns) if form is not None and form.name(0) in tensors]
        counts = {_count(form, tensors) for form in forms}
        if len(counts) != 1:
            return False
        count = counts.pop()
        if not all(layers_are_alike(model, form.before, count) for form in forms):
            return False
        last = len(stack.units) - 1
        deepen(graph.graph, stack, [Place(min(number, last)) for number in range(count)])
    for name, value in stored.items():
        if name not in tensors:
            continue
        if value.shape is None or tuple(value.shape.numpy()) != tuple(tensors[name].shape):
            return False
        value.const_value = tensor_of(name, tensors[name])
    there = {id(tensors[name]) for name in stored if name in tensors}
    return all(id(tensor) in there for name, tensor in tensors.items() if without_numbers(name) in placed)


def _form(column: tuple[ir.Value | None, ...]) -> Numbered | None:
    """The form of the names of what matches in the layers of a graph."""
    return numbered([(value.name or "") if value is not None else "" for value in column])


def _is_alike(column: tuple[ir.Value | None, ...]) -> bool:
    """Whether a constant has the same numbers in all layers. Parameters have names that run with the layers."""
    tensors = [None if value is None else value.const_value for value in column]
    if _form(column) is not None:
        return True
    return all(
        tensor is not None and tensors[0] is not None and np.array_equal(tensor.numpy(), tensors[0].numpy())
        for tensor in tensors
    )


def _count(form: Numbered, tensors: Mapping[str, Any]) -> int:
    """The number of layers for which the whole model has a tensor whose name has this form."""
    count = 0
    while form.name(count) in tensors:
        count += 1
    return count


def layers_are_alike(model: Any, path: str, count: int) -> bool:
    """Whether all layers of a list but the first have modules of the same classes with the same settings.

    Args:
        model: the model.
        path: the path of the list, with a dot at its end.
        count: the number of layers.
    """
    try:
        layers = [model.get_submodule(f"{path}{number}") for number in range(count)]
    except AttributeError:
        return False
    if any(len(set(map(str, entries))) > 1 for entries in _lists(model.config.to_dict(), count)):
        return False
    first, number = layers[-1], count - 1
    return all(_same_modules(first, number, layer, other) for other, layer in enumerate(layers[1:], 1))


def _lists(fields: Any, length: int) -> Iterator[list[Any]]:
    """The lists of this length in a configuration."""
    for value in fields.values() if isinstance(fields, Mapping) else ():
        if isinstance(value, list | tuple) and len(value) == length:
            yield list(value)
        yield from _lists(value, length)


def _same_modules(one: Any, number: int, other: Any, other_number: int) -> bool:
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    return ours.keys() == theirs.keys() and all(
        type(module) is type(theirs[name]) and _same_settings(module, number, theirs[name], other_number)
        for name, module in ours.items()
    )


def _same_settings(one: Any, number: int, other: Any, other_number: int) -> bool:
    ours, theirs = _settings(one), _settings(other)
    return ours.keys() == theirs.keys() and all(
        value == theirs[name] or (value == number and theirs[name] == other_number) for name, value in ours.items()
    )


def _settings(module: Any) -> dict[str, Any]:
    """The plain attributes of a module."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, bool | int | float | str | None)
    }
