"""Finds edits that a plan lacks, without running anything: the plan is made anew for the same sizes, and compared.

A plan may come from a file, or from an older release. If it gives all tensors the same recipes as the new plan, and
all its edits are edits of the new plan, then the other edits of the new plan are missing in it. If it differs in
another way, it divides its sums elsewhere, and nothing can be said.
"""

from __future__ import annotations

from hyperclone_onnx.errors import HypercloneError
from hyperclone_onnx.plan.edits import Edit
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.request import size
from hyperclone_onnx.rules.dimensions import Dimensions


def missing_edits(dimensions: Dimensions, plan: Plan) -> list[Edit]:
    """The edits that a plan lacks, as far as that is certain.

    Args:
        dimensions: the dimensions of the plan's source.
        plan: the plan.
    """
    for untie in (False, True):
        try:
            growth = size(dimensions, maps=plan.maps)
            anew = make_plan(growth, plan.strategy, untie=untie, keep_interface=plan.keep_interface)
        except HypercloneError:
            continue
        if _division(anew) == _division(plan) and set(plan.edits) <= set(anew.edits):
            return [edit for edit in anew.edits if edit not in plan.edits]
    return []


def _division(plan: Plan) -> dict[str, tuple[object, ...]]:
    """For each tensor, how its repeats share its numbers, and the number that multiplies them."""
    return {name: (recipe.axes, recipe.shared, recipe.scale) for name, recipe in plan.tensors.items()}
