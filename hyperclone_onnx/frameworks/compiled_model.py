"""Compile a model file into a program. The `load` of every framework begins with this."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from hyperclone_onnx.analysis.trainable import Reasons, overridden, structural_roles
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiling.blocks import with_blocks
from hyperclone_onnx.frameworks.compiling.compiler import compile_program
from hyperclone_onnx.frameworks.compiling.naming import paths
from hyperclone_onnx.frameworks.compiling.preparation import prepare, prepare_model
from hyperclone_onnx.frameworks.compiling.program import Program, Weight
from hyperclone_onnx.frameworks.continuation import Continuation, continuations
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import check_fits, rewrite
from hyperclone_onnx.transforms.source import source_of

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CompiledModel:
    """A program and the stored tensors that it uses. A tensor is read only when a framework needs its values."""

    program: Program
    tensors: dict[str, ir.TensorProtocol]
    """The stored tensors, by initializer name."""
    plan: Plan | None = None
    """The plan by which the model was grown; None if the file contains no plan."""

    @property
    def continuations(self) -> dict[str, Continuation]:
        """How the parameters follow the source in training, by path."""
        names = {weight.path: weight.initializer for weight in self.program.weights if weight.role != "constant"}
        known = continuations(self.plan, names.values())
        return {path: known[name] for path, name in names.items()}


def compile_model(
    model: PathLike | ir.Model,
    *,
    plan: Plan | PathLike | None = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    router_logits: bool = False,
    values: Sequence[str] = (),
) -> CompiledModel:
    """Compile a model file, or a model in memory. A model in memory is changed in place.

    Args:
        model: the model to compile. With a plan: the file of the small model that the plan grows.
        plan: grow `model` by this plan and compile the grown model. A grown tensor is computed when it is read.
        freeze: globs of initializer names; the matching tensors are not trained.
        train: globs of initializer names; the matching tensors are trained, even where the graph's structure says that
            they are constants.
        router_logits: also give the scores of the routers of mixtures of experts as outputs.
        values: names of values inside the graph that are also given as outputs.

    Raises:
        BadModel: the file (or the plan) cannot be read, or is incomplete.
        BadRequest: a glob matches no tensor, the plan is for another model, a plan is given with a model in memory, or
            the model has no router, or no value, that was asked for.
        Refused: the model has an operator, or a form of an operator, that is not supported.
        MissingExtra: neither the extra for PyTorch nor the one for JAX is installed.
    """
    try:
        return _compile(model, plan, freeze, train, router_logits, values)
    except ModuleNotFoundError as problem:
        raise MissingExtra("torch", problem) from problem


def _compile(
    model: PathLike | ir.Model,
    plan: Plan | PathLike | None,
    freeze: Sequence[str],
    train: Sequence[str],
    router_logits: bool,
    values: Sequence[str],
) -> CompiledModel:
    if plan is not None:
        if isinstance(model, ir.Model):
            raise BadRequest("a plan grows a model file, not a model in memory: give the path of the small model")
        model = _grown(model, plan)
    prepared = (
        prepare_model(model, router_logits=router_logits, values=values)
        if isinstance(model, ir.Model)
        else prepare(model, router_logits=router_logits, values=values)
    )
    carried = Plan.carried_by(prepared.metadata_props)
    structural = structural_roles(prepared, train)
    structural |= _divisors(structural, carried)
    program = with_blocks(compile_program(prepared, structural, paths(prepared.graph.initializers)))
    # `freeze` and `train` are applied after the blocks are made, so they change no parameter's path. A checkpoint then
    # fits the model with any choice of trained tensors.
    roles = overridden(structural, freeze, train)
    program = replace(program, weights=tuple(_with_role(weight, roles) for weight in program.weights))
    tensors = {
        name: value.const_value for name, value in prepared.graph.initializers.items() if value.const_value is not None
    }
    return CompiledModel(program, tensors, carried)


def _divisors(tensors: Iterable[str], plan: Plan | None) -> Reasons:
    """The roles of the tensors that growth added as divisors: constants, because training must not change them."""
    if plan is None:
        return {}
    return {name: ("constant", "a constant that growth put in") for name in tensors if plan.brings_in(name)}


def _grown(model: PathLike, plan: Plan | PathLike) -> ir.Model:
    """Grow a model file by a plan. The values of grown tensors are not computed yet."""
    if not isinstance(plan, Plan):
        plan = Plan.read(plan)
    source = source_of(model, plan.transforms).model
    check_fits(plan, source)
    return rewrite(source, plan)


def _with_role(weight: Weight, asked: Reasons) -> Weight:
    role, reason = asked.get(weight.initializer, (weight.role, weight.reason))
    return replace(weight, role=role, reason=reason)
