"""A model file as a pure function and its parameters: ``apply, params = load("big.onnx")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.application import Application
from hyperclone_onnx.frameworks.compiling.naming import nested
from hyperclone_onnx.frameworks.compiling.program import Weight
from hyperclone_onnx.frameworks.slices import read_slice, read_whole
from hyperclone_onnx.plan.plans import Plan

try:
    import jax

    from hyperclone_onnx.frameworks.compiling.namespaces import jax as _namespace  # noqa: F401 - says what is missing
except ImportError as problem:
    raise MissingExtra("jax", problem) from problem

Params = dict[str, Any]


Placement = Callable[[str, tuple[int, ...]], Any]
"""Where a parameter lives: (its path, its shape) -> a `jax.sharding.Sharding`."""


def load(
    model: PathLike | ir.Model,
    *,
    plan: Plan | PathLike | None = None,
    shard: Placement | Any = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
) -> tuple[Callable[..., Any], Params]:
    """A model file (or an onnx_ir model) as ``apply(params, *inputs, **inputs)`` and ``params``.

    `params` is a nested dict of the trainable tensors under their initializers' names, the dots as levels; what is not
    trained is a constant of `apply`. `apply` is pure, takes the graph's inputs by position or by name, and returns the
    one output, or a dict of them.

    Args:
        model: the file.
        plan: grow the model while it is loaded: `model` is then the small file, and each tensor is computed from it
            where it is needed. A `Plan`, or the JSON file that ``expand --plan-out`` wrote.
        shard: load each parameter in parts, no process more than its own: a `jax.sharding.Mesh`, over all of which the
            longest axis that divides is sharded, or a function of a parameter's path and shape that gives its sharding.
        freeze: globs of initializer names that are not to be trained.
        train: globs of initializer names that are to be trained, whatever their place in the graph says.

    Raises:
        BadModel: the file (or the plan) is not readable and complete.
        BadRequest: a glob matches nothing, or the plan is for another model.
        Refused: an operator, or a form of one, is not covered.
    """
    compiled_model = compile_model(model, plan=plan, freeze=freeze, train=train)
    place = _over(shard) if isinstance(shard, jax.sharding.Mesh) else shard
    params: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for weight in compiled_model.program.weights:
        tensor = compiled_model.tensors[weight.initializer]
        kind = params if weight.role == "trainable" else constants
        if place is None:
            kind[weight.path] = jax.numpy.asarray(read_whole(tensor))
        elif weight.role == "constant":  # every process has its own, and tracing makes it a literal
            kind[weight.path] = read_whole(tensor)
        else:
            kind[weight.path] = _in_parts(tensor, place(weight.path, weight.shape), weight)
    return Application(compiled_model.program, nested(constants), "jax"), nested(params)


def _in_parts(tensor: ir.TensorProtocol, sharding: Any, weight: Weight) -> Any:
    if weight.role == "frozen" and not sharding.is_fully_addressable:
        raise BadRequest(
            f"{weight.initializer!r} is frozen, and so a constant of apply, which no process holds whole: "
            "train it and mask its updates instead (optax.masked)"
        )

    def part(index: tuple[slice, ...]) -> Any:
        windows = tuple(slice(*each.indices(size)[:2]) for each, size in zip(index, weight.shape, strict=True))
        return read_slice(tensor, windows)

    return jax.make_array_from_callback(weight.shape, sharding, part)


def _over(mesh: Any) -> Placement:
    def place(_path: str, shape: tuple[int, ...]) -> Any:
        fitting = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
        longest = max(fitting, key=lambda axis: shape[axis], default=None)
        spec = [mesh.axis_names if axis == longest else None for axis in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return place
