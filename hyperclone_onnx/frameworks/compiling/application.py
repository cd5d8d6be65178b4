"""A program as a pure function of its stored tensors and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.compiling.blocks import block_paths
from hyperclone_onnx.frameworks.compiling.program import Program
from hyperclone_onnx.frameworks.compiling.source import compiled, function_source

Tree = Mapping[str, Any]
"""Stored tensors under their paths, a level for each dot."""


class Application:
    """``apply(params, *inputs, **inputs)`` in one framework; `code` is its source.

    What `params` lacks of the program's stored tensors is in `constants`.
    """

    def __init__(self, program: Program, constants: Tree, framework: str) -> None:
        self.program = program
        self.constants = constants
        self.code = function_source("apply", "weights", program.body, _item, _called(program))
        self._namespace = import_module(f"hyperclone_onnx.frameworks.compiling.namespaces.{framework}")
        self._function = compiled(self.code, framework)
        self._blocks = tuple(
            compiled(function_source("block", "weights", body, _item, _item), framework) for body in program.blocks
        )

    def __call__(self, params: Tree, /, *inputs: Any, **named: Any) -> Any:
        """The graph's one output, or a dict of its outputs by name."""
        given = [
            self._namespace.numbers(value) if entry.host and not isinstance(value, int | tuple) else value
            for entry, value in zip(self.program.inputs, bind(self.program, inputs, named), strict=True)
        ]
        weights = {**_merged(params, self.constants), "blocks": self._blocks}
        values = self._function(weights, *given)
        names = self.program.outputs
        return values[0] if len(names) == 1 else dict(zip(names, values, strict=True))


def bind(program: Program, positional: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The values of a program's inputs in its order; they are given by position and by name.

    Raises:
        BadRequest: one is missing, unknown, or given twice.
    """
    names = [entry.name for entry in program.inputs]
    if len(positional) > len(names):
        raise BadRequest(f"{len(positional)} inputs given, the model has {len(names)}: {', '.join(names)}")
    given = dict(zip(names, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise BadRequest(f"the model has no input {name!r}; it has {', '.join(names)}")
        if name in given:
            raise BadRequest(f"the input {name!r} is given twice")
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise BadRequest(f"the model's inputs {', '.join(missing)} are missing")
    return [given[name] for name in names]


def _item(path: str) -> str:
    """How the source reads a stored tensor, or a layer's tensors."""
    return "weights" + "".join(f"[{part!r}]" for part in path.split("."))


def _called(program: Program) -> Callable[[str], str]:
    """How the source calls a layer: its block's function, given its tensors."""
    blocks = dict(block_paths(program))
    return lambda path: f'partial(weights["blocks"][{blocks[path]}], {_item(path)})'


def _merged(one: Tree, other: Tree) -> dict[str, Any]:
    """Two trees as one."""
    both = {**other, **one}
    for name in one.keys() & other.keys():
        both[name] = _merged(one[name], other[name])
    return both
