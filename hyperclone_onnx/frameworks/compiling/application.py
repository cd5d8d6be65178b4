"""Turn a program into a pure function of its stored tensors and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.compiling.blocks import block_paths
from hyperclone_onnx.frameworks.compiling.program import Program
from hyperclone_onnx.frameworks.compiling.source import compiled, function_source
from hyperclone_onnx.frameworks.continuation import Continuation

Tree = Mapping[str, Any]
"""Stored tensors in nested dicts, with a level for each dot of their paths."""


class Application:
    """The function ``apply(params, *inputs, **inputs)`` in one framework. `code` is its source.

    `params` may lack stored tensors of the program; these are in `constants`. `continuations` says how each parameter
    follows the source in training, by path. `products` is the name of the type in which products run; None for the
    types of their operands.
    """

    def __init__(
        self,
        program: Program,
        constants: Tree,
        framework: str,
        continuations: Mapping[str, Continuation] | None = None,
        products: str | None = None,
    ) -> None:
        self.program = program
        self.continuations = continuations or {}
        self.constants = constants
        self.code = function_source("apply", "weights", program.body, _item, _called(program))
        self._namespace = import_module(f"hyperclone_onnx.frameworks.compiling.namespaces.{framework}")
        self._function = compiled(self.code, framework, products)
        self._blocks = tuple(
            compiled(function_source("block", "weights", body, _item, _item), framework, products)
            for body in program.blocks
        )

    def __call__(self, params: Tree, /, *inputs: Any, **named: Any) -> Any:
        """Return the output of the graph, or a dict of its outputs by name if it has several."""
        arguments = [
            self._namespace.numbers(value) if entry.host and not isinstance(value, int | tuple) else value
            for entry, value in zip(self.program.inputs, bind(self.program, inputs, named), strict=True)
        ]
        weights = {**_merged(params, self.constants), "blocks": self._blocks}
        values = self._function(weights, *arguments)
        names = self.program.outputs
        return values[0] if len(names) == 1 else dict(zip(names, values, strict=True))


def bind(program: Program, positional: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """Bind arguments to the inputs of a program: values in the order of the inputs, None for an absent one.

    Raises:
        BadRequest: an input is missing, unknown, or given twice.
    """
    names = [entry.name for entry in program.inputs]
    if len(positional) > len(names):
        raise BadRequest(f"{len(positional)} inputs given, the model has {len(names)}: {', '.join(names)}")
    values = dict(zip(names, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise BadRequest(f"the model has no input {name!r}; it has {', '.join(names)}")
        if name in values:
            raise BadRequest(f"the input {name!r} is given twice")
        values[name] = value
    missing = [entry.name for entry in program.inputs if entry.name not in values and not entry.optional]
    if missing:
        raise BadRequest(f"the model's inputs {', '.join(missing)} are missing")
    return [values.get(name) for name in names]


def _item(path: str) -> str:
    """The source that reads a stored tensor, or the tensors of a layer."""
    return "weights" + "".join(f"[{part!r}]" for part in path.split("."))


def _called(program: Program) -> Callable[[str], str]:
    """A function from the path of a layer to the source that calls its block with its tensors."""
    blocks = dict(block_paths(program))
    return lambda path: f'partial(weights["blocks"][{blocks[path]}], {_item(path)})'


def _merged(one: Tree, other: Tree) -> dict[str, Any]:
    """The tensors of two trees in one tree."""
    merged = {**other, **one}
    for name in one.keys() & other.keys():
        merged[name] = _merged(one[name], other[name])
    return merged
