"""Load a model file as a pure JAX function and its parameters: ``apply, params = load("big.onnx")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.application import Application
from hyperclone_onnx.frameworks.compiling.naming import nested
from hyperclone_onnx.frameworks.compiling.program import Weight
from hyperclone_onnx.frameworks.distillation import AnyTeacher, find_teacher
from hyperclone_onnx.frameworks.pairing import Pairing
from hyperclone_onnx.frameworks.slices import read_slice, read_whole
from hyperclone_onnx.frameworks.sub_models import compile_sub_models
from hyperclone_onnx.plan.plans import Plan

try:
    import jax

    from hyperclone_onnx.frameworks.compiling.namespaces import jax as _namespace
except ImportError as problem:
    raise MissingExtra("jax", problem) from problem

Params = dict[str, Any]


Placement = Callable[[str, tuple[int, ...]], Any]
"""How a parameter is sharded: (path of the parameter, shape of the parameter) -> a `jax.sharding.Sharding`."""


def load(
    model: PathLike | ir.Model,
    *,
    plan: Plan | PathLike | None = None,
    shard: Placement | Any = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    dtype: Any = None,
    router_logits: bool = False,
    values: Sequence[str] = (),
) -> tuple[Application, Params]:
    """Load a model file (or an onnx_ir model) as a function ``apply(params, *inputs, **inputs)`` and its ``params``.

    `params` is a nested dict of the trainable tensors. Their names are the initializers' names, split into levels at
    the dots. Every tensor that is not trainable is a constant inside `apply`. `apply` is pure. It takes the graph's
    inputs by position or by name. It returns the output, or a dict of outputs by name if the graph has several.

    Args:
        model: path of the ONNX file, or the model.
        plan: grow the model while loading it. `model` is then the small file, and each grown tensor is computed when it
            is read. A `Plan`, or the path of the JSON file that ``expand --plan-out`` wrote.
        shard: load each parameter sharded, so that each process reads only its own shards. Give a `jax.sharding.Mesh`:
            the longest axis whose size is divisible by the mesh's size is then sharded over the whole mesh. Or give a
            function that takes a parameter's path and shape and returns its sharding.
        freeze: globs of initializer names; the matching tensors are not trained.
        train: globs of initializer names; the matching tensors are trained, even where the graph's structure says that
            they are constants.
        dtype: the type in which products of matrices run, forward and backward: "bfloat16" or "float16". Parameters,
            norms, softmaxes and sums keep their types. To cast the parameters alone would not do that: a product with
            an activation in float32 runs in float32.
        router_logits: also return the scores of the routers of mixtures of experts, for a loss that balances the load.
        values: also return these values inside the graph, by name, for a loss on hidden values (see `load_teacher`).

    Raises:
        BadModel: the file (or the plan) cannot be read, or is incomplete.
        BadRequest: a glob matches no tensor, the plan is for another model, or `dtype` is no floating type.
        Refused: the model has an operator, or a form of an operator, that is not supported.
    """
    products = None if dtype is None else _floating(dtype)
    compiled_model = compile_model(
        model, plan=plan, freeze=freeze, train=train, router_logits=router_logits, values=values
    )
    place = over(shard) if isinstance(shard, jax.sharding.Mesh) else shard
    params: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for weight in compiled_model.program.weights:
        tensor = compiled_model.tensors[weight.initializer]
        kind = params if weight.role == "trainable" else constants
        if place is None:
            kind[weight.path] = jax.numpy.asarray(read_whole(tensor))
        elif weight.role == "constant":  # every process needs all of it: tracing turns it into a literal
            kind[weight.path] = read_whole(tensor)
        else:
            kind[weight.path] = _in_parts(tensor, place(weight.path, weight.shape), weight)
    apply = Application(compiled_model.program, nested(constants), "jax", compiled_model.continuations, products)
    return apply, nested(params)


def _floating(dtype: Any) -> str:
    """The name of a floating type.

    Raises:
        BadRequest: it is no floating type.
    """
    try:
        kind = jax.numpy.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jax.numpy.issubdtype(kind, jax.numpy.floating):
        raise BadRequest(f"dtype is {dtype!r}: give a floating type, such as 'bfloat16'")
    return str(kind.name)


@dataclass(frozen=True)
class SubModel:
    """The bottom layers of a model with its head, for the first stage of bert2BERT (see `frameworks.sub_models`).

    Args:
        layers: the number of its layers.
        apply: ``apply(params, *inputs, **inputs)``, with the parameters of the whole model.
        updated: the paths of the parameters that a step updates: the top layers and the head.
    """

    layers: int
    apply: Callable[..., Any]
    updated: frozenset[str]

    def mask(self, params: Params) -> Params:
        """For each parameter of the whole model whether a step updates it, e.g. for ``optax.masked``."""
        return _masked(params, self.updated, "")


def sub_models(
    model: PathLike,
    layers: Sequence[int] | None = None,
    *,
    every: int | None = None,
    plan: Plan | PathLike | None = None,
    stack: str | None = None,
) -> list[SubModel]:
    """The sub-models of a model file, for the first stage of bert2BERT.

    The paper (Chen et al., arXiv 2110.07143, "Two-stage Pre-training" and Algorithm 1) chooses one at random in each
    step, and updates its top layers and the head: the gradients of all others are not applied. Then it trains the whole
    model.

    Args:
        model: path of the ONNX file. With a plan: the file of the small model that the plan grows.
        layers: the number of layers of each sub-model, e.g. ``[3, 6, 9, 12]``.
        every: in the place of `layers`: one sub-model for each so many layers.
        plan: the plan that was given to `load`.
        stack: the name of the stack of layers, where the graph has several (an encoder and a decoder).

    Raises:
        BadRequest: the graph has no layers, or not those that were asked for.
    """
    result = []
    for part in compile_sub_models(model, layers, every=every, plan=plan, stack=stack):
        constants, updated = {}, set()
        for weight in part.compiled.program.weights:
            if weight.role != "trainable":
                constants[weight.path] = jax.numpy.asarray(read_whole(part.compiled.tensors[weight.initializer]))
            elif weight.initializer in part.updated:
                updated.add(weight.path)
        apply = Application(part.compiled.program, nested(constants), "jax")
        result.append(SubModel(part.layers, apply, frozenset(updated)))
    return result


class Teacher(AnyTeacher):
    """A large model that gives a student its targets. Its parameters are not trained. `load_teacher` makes one.

    Args:
        apply: the function of the teacher. It also gives the hidden values that are compared.
        params: its parameters.
        pairing: what is compared.
    """

    def __init__(self, apply: Application, params: Params, pairing: Pairing) -> None:
        super().__init__(pairing, _namespace)
        self.params = params
        self._program = apply.program
        self._apply = jax.jit(apply)

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """Run the teacher under jit. Return what the student is compared with, by name.

        Call it outside of the student's jit, and pass the targets in: the teacher's parameters are then no constants of
        the student's step.
        """
        given = self._apply(self.params, *inputs, **named)
        return self._program.by_name(given)


def load_teacher(teacher: PathLike | None = None, *, student: PathLike, shard: Any = None) -> Teacher:
    """Load a model as the teacher of a smaller (or larger) one.

    One step of distillation::

        targets = teacher(ids, mask)
        loss = lambda params: teacher.loss(apply(params, ids, mask), targets, hidden=1.0)

    Hidden values are compared if one of the two was made of the other by `shrink` or `expand`: the plan that one of
    them carries says which channels belong together.

    Args:
        teacher: path of the teacher's ONNX file. It may be left out if `student` is a folder that names it.
        student: path of the student's ONNX file, or the folder that ``handoff --teacher`` wrote for it.
        shard: as in `load`.

    Raises:
        BadModel: a file cannot be read, or is incomplete.
        BadRequest: the two models have nothing in common that could be compared, or the folder names no teacher.
        Refused: the teacher has an operator, or a form of an operator, that is not supported.
    """
    file, pairing = find_teacher(teacher, student)
    apply, params = load(file, shard=shard, values=pairing.names("teacher"))
    return Teacher(apply, params, pairing)


def _masked(params: Params, updated: frozenset[str], path: str) -> Params:
    return {
        name: _masked(value, updated, f"{path}{name}.") if isinstance(value, dict) else f"{path}{name}" in updated
        for name, value in params.items()
    }


def _in_parts(tensor: ir.TensorProtocol, sharding: Any, weight: Weight) -> Any:
    if weight.role == "frozen" and not sharding.is_fully_addressable:
        raise BadRequest(
            f"{weight.initializer!r} is frozen, so it is a constant of apply, and no process can read all its shards: "
            "train it and mask its updates instead (optax.masked)"
        )

    def part(index: tuple[slice, ...]) -> Any:
        windows = tuple(slice(*window.indices(size)[:2]) for window, size in zip(index, weight.shape, strict=True))
        return read_slice(tensor, windows)

    return jax.make_array_from_callback(weight.shape, sharding, part)


def over(mesh: Any) -> Placement:
    """Shard each parameter along its longest axis that the mesh divides."""

    def place(_path: str, shape: tuple[int, ...]) -> Any:
        divisible = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
        longest = max(divisible, key=lambda axis: shape[axis], default=None)
        spec = [mesh.axis_names if axis == longest else None for axis in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return place
