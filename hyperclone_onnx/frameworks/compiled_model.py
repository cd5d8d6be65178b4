"""A model file, compiled: what each framework's `load` begins with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiling.blocks import with_blocks
from hyperclone_onnx.frameworks.compiling.compiler import compile_program
from hyperclone_onnx.frameworks.compiling.naming import paths
from hyperclone_onnx.frameworks.compiling.preparation import prepare, prepare_model
from hyperclone_onnx.frameworks.compiling.program import Program, Weight
from hyperclone_onnx.frameworks.compiling.trainable import Reasons, overridden, structural_roles
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import check_fits, rewrite
from hyperclone_onnx.transforms.source import source_of

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CompiledModel:
    """A program, and the stored tensors that it uses; a tensor is read when a framework asks for it."""

    program: Program
    tensors: dict[str, ir.TensorProtocol]
    """By initializer."""
    plan: Plan | None = None
    """How the model was grown; None where its file carries no plan."""


def compile_model(
    model: PathLike | ir.Model,
    *,
    plan: Plan | PathLike | None = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
) -> CompiledModel:
    """Compile a model file, or a model in memory (which is changed).

    Args:
        model: the model or, with a plan, the small model that the plan grows.
        plan: what to compile is the model that this plan makes; its tensors are computed when they are asked for.
        freeze: globs of initializer names that are not to be trained.
        train: globs of initializer names that are to be trained, whatever the structure says.

    Raises:
        BadModel, BadRequest, Refused: see `errors`.
        MissingExtra: neither extra is installed.
    """
    try:
        return _compile(model, plan, freeze, train)
    except ModuleNotFoundError as problem:
        raise MissingExtra("torch", problem) from problem


def _compile(
    model: PathLike | ir.Model, plan: Plan | PathLike | None, freeze: Sequence[str], train: Sequence[str]
) -> CompiledModel:
    if plan is not None:
        if isinstance(model, ir.Model):
            raise BadRequest("a plan grows a model file, not a model in memory: rewrite it first")
        model = _grown(model, plan)
    prepared = prepare_model(model) if isinstance(model, ir.Model) else prepare(model)
    carried = Plan.carried_by(prepared.metadata_props)
    structural = structural_roles(prepared, train)
    structural |= _divisors(structural, carried)
    program = with_blocks(compile_program(prepared, structural, paths(prepared.graph.initializers)))
    # Blocks come first: `freeze` and `train` then change no path, and a checkpoint fits whatever was trained.
    asked = overridden(structural, freeze, train)
    program = replace(program, weights=tuple(_with_role(weight, asked) for weight in program.weights))
    tensors = {
        name: value.const_value for name, value in prepared.graph.initializers.items() if value.const_value is not None
    }
    return CompiledModel(program, tensors, carried)


def _divisors(tensors: Iterable[str], plan: Plan | None) -> Reasons:
    """Numbers that growth put in to divide by: they are not trained."""
    if plan is None:
        return {}
    return {name: ("constant", "a divisor that growth put in") for name in tensors if plan.brings_in(name)}


def _grown(model: PathLike, plan: Plan | PathLike) -> ir.Model:
    """The grown model, of which nothing is computed yet."""
    if not isinstance(plan, Plan):
        plan = Plan.read(plan)
    source = source_of(model, plan.transforms).model
    check_fits(plan, source)
    return rewrite(source, plan)


def _with_role(weight: Weight, asked: Reasons) -> Weight:
    role, reason = asked.get(weight.initializer, (weight.role, weight.reason))
    return replace(weight, role=role, reason=reason)
