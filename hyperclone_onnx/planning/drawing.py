"""Decides which tensors a law draws anew beside the source, and which keep to repeats of the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import is_code
from hyperclone_onnx.analysis.trainable import structural_roles
from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.strategies import Strategy, StrategyRule


def with_drawn_tensors(model: ir.Model, plan: Plan, rules: Sequence[StrategyRule]) -> Plan:
    """The plan, in which only trained tensors have a law that draws. Rotary tables and masks are repeated.

    Raises:
        BadRequest: the law is for some tensors only. Nothing would divide the sums of the others.
        Refused: a weight that grows is stored as codes, which cannot be drawn.
    """
    laws = {plan.strategy.law, *(rule.strategy(plan.strategy).law for rule in rules)}
    drawing = [law.name for law in laws if law.draws_the_rest]
    if not drawing:
        return plan
    if rules:
        raise BadRequest(
            f"the strategy {drawing[0]!r} is for the whole model, because nothing is divided with it: leave out the "
            "strategies of single tensors"
        )
    stored = model.graph.initializers
    roles = structural_roles(model)
    strategies: dict[str, Strategy] = {}
    for name, recipe in plan.tensors.items():
        for source in recipe.sources:
            tensor = stored[source].const_value
            if recipe.bits is not None or (tensor is not None and is_code(tensor.dtype)):
                raise Refused(f"{source!r} is stored as codes, and the strategy {drawing[0]!r} can draw no codes")
        if any(roles.get(source, ("constant", ""))[0] == "constant" for source in recipe.sources):
            strategies[name] = replace(plan.strategy, name="symmetric")
    return replace(plan, strategies=strategies)
