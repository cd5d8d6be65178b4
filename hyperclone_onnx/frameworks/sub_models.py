"""Sub-models: a model cut off after some of its layers, with its own head. They are the first stage of bert2BERT.

bert2BERT trains in two stages (Chen et al., arXiv 2110.07143, "Two-stage Pre-training" and Algorithm 1). In the first
stage, each step chooses one of several sub-models at random. A sub-model has the bottom layers of the whole model and
its head. The step updates the head and the top layers of the sub-model: those that the next smaller sub-model does not
have. In the second stage, the whole model is trained as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, PathLike, compile_model
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import check_fits, rewrite
from hyperclone_onnx.transforms.bottom_layers import keep_bottom, parts_of
from hyperclone_onnx.transforms.source import source_of


@dataclass(frozen=True)
class CompiledSubModel:
    """A sub-model: its number of layers, its program, and the initializers that its steps update."""

    layers: int
    compiled: CompiledModel
    updated: frozenset[str]


def compile_sub_models(
    model: PathLike,
    layers: Sequence[int] | None = None,
    *,
    every: int | None = None,
    plan: Plan | PathLike | None = None,
    stack: str | None = None,
) -> list[CompiledSubModel]:
    """Compile the sub-models of a model file, from the smallest to the whole model.

    Args:
        model: path of the ONNX file. With a plan: the file of the small model that the plan grows.
        layers: the number of layers of each sub-model, e.g. ``[3, 6, 9, 12]``.
        every: in the place of `layers`: one sub-model for each so many layers.
        plan: grow `model` by this plan first.
        stack: the name of the stack of layers, where the graph has several (an encoder and a decoder).

    Raises:
        BadRequest: the graph has no layers, or not those that were asked for.
        BadModel: the file (or the plan) cannot be read.
        Refused: the model has an operator that is not supported.
    """
    parts = parts_of(_read(model, plan), stack)
    total = len(parts.layers) * parts.period
    counts = _counts(layers, every, total, parts.period)
    result: list[CompiledSubModel] = []
    before = 0
    for count in counts:
        units = count // parts.period
        cut = keep_bottom(_read(model, plan), units, stack)
        updated = parts.behind.union(*parts.layers[before:units])
        result.append(CompiledSubModel(count, compile_model(cut), updated))
        before = units
    return result


def _read(model: PathLike, plan: Plan | PathLike | None) -> ir.Model:
    if plan is None:
        return source_of(model, ()).model
    if not isinstance(plan, Plan):
        plan = Plan.read(plan)
    source = source_of(model, plan.transforms).model
    check_fits(plan, source)
    return rewrite(source, plan)


def _counts(layers: Sequence[int] | None, every: int | None, total: int, period: int) -> list[int]:
    if (layers is None) == (every is None):
        raise BadRequest("say which sub-models there are: either layers=[3, 6, ...] or every=3")
    if every is not None and every < 1:
        raise BadRequest(f"one sub-model for each {every} layers: the number is at least 1")
    counts = list(layers) if layers is not None else sorted({*range(every or total, total, every or total), total})
    wrong = [count for count in counts if not 1 <= count <= total or count % period]
    if wrong:
        groups = f", in groups of {period}" if period > 1 else ""
        raise BadRequest(f"a sub-model of {wrong[0]} layers: this model has {total}{groups}")
    if counts != sorted(set(counts)):
        raise BadRequest(f"the sub-models {counts} are not in order from the smallest to the largest")
    return counts
