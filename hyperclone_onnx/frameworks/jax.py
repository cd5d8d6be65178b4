"""A model file as a pure function and its parameters: ``apply, params = load("big.onnx")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.blocks import block_paths
from hyperclone_onnx.frameworks.handoff import PathLike, bind, read
from hyperclone_onnx.frameworks.program import Program
from hyperclone_onnx.frameworks.source import compiled, function_source

try:
    import jax

    from hyperclone_onnx.frameworks.namespaces import jax as namespace
except ImportError as problem:
    raise MissingExtra("jax", problem) from problem

Params = dict[str, Any]


def load(
    model: PathLike | Any, *, freeze: Sequence[str] = (), train: Sequence[str] = ()
) -> tuple[Callable[..., Any], Params]:
    """A model file (or an onnx_ir model) as ``apply(params, *inputs, **inputs)`` and ``params``.

    `params` is a nested dict of the trainable tensors under their initializers' names, the dots as levels; what is not
    trained is a constant of `apply`. `apply` is pure, takes the graph's inputs by position or by name, and returns the
    one output, or a dict of them.

    Raises:
        BadModel: the file is not a readable, complete ONNX model.
        BadRequest: a glob matches nothing.
        Refused: an operator, or a form of one, is not covered.
    """
    handoff = read(model, freeze=freeze, train=train)
    params: Params = {}
    constants: Params = {}
    for weight in handoff.program.weights:
        array = jax.numpy.asarray(handoff.tensors[weight.initializer].numpy())
        *folders, leaf = weight.path.split(".")
        level = params if weight.role == "trainable" else constants
        for name in folders:
            level = level.setdefault(name, {})
        level[leaf] = array
    return _Apply(handoff.program, constants), params


class _Apply:
    """The graph as a pure function of its parameters and inputs; `code` is its source."""

    def __init__(self, program: Program, constants: Params) -> None:
        self.program = program
        self.constants = constants
        self.code = function_source("apply", "weights", program.body, _item, _called(program))
        self._function = compiled(self.code, "jax")
        self._blocks = tuple(
            compiled(function_source("block", "weights", body, _item, _item), "jax") for body in program.blocks
        )

    def __call__(self, params: Params, /, *inputs: Any, **named: Any) -> Any:
        given = bind(self.program, inputs, named)
        given = [
            namespace.numbers(value) if each.host and not isinstance(value, int | tuple) else value
            for each, value in zip(self.program.inputs, given, strict=True)
        ]
        weights = _merged(params, self.constants) | {"blocks": self._blocks}
        values = self._function(weights, *given)
        names = self.program.outputs
        return values[0] if len(names) == 1 else dict(zip(names, values, strict=True))


def _item(path: str) -> str:
    """How the source reads a stored tensor, or a layer's tensors."""
    return "weights" + "".join(f"[{part!r}]" for part in path.split("."))


def _called(program: Program) -> Callable[[str], str]:
    blocks = dict(block_paths(program))
    return lambda path: f'partial(weights["blocks"][{blocks[path]}], {_item(path)})'


def _merged(one: Params, other: Params) -> Params:
    """Two nested dicts as one."""
    both = {**other, **one}
    for name in one.keys() & other.keys():
        both[name] = _merged(one[name], other[name])
    return both
