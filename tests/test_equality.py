"""A wrong model is not published: for example with a missing edit, or a factor whose error only float64 shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hyperclone_onnx import ModelsDiffer, Strategy, expand
from hyperclone_onnx.expansion import request
from hyperclone_onnx.plan.plans import Plan

Zoo = Callable[[str], Path]
Edit = Callable[[np.ndarray], None]


def test_a_wrong_plan_is_not_published(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of its edits, the grown graph is wrong, and no file appears."""
    make_plan = request.make_plan

    def forgetful(*arguments: object, **options: object) -> Plan:
        plan = make_plan(*arguments, **options)  # type: ignore[arg-type]
        return Plan(**{**vars(plan), "edits": plan.edits[1:]})

    monkeypatch.setattr(request, "make_plan", forgetful)
    with pytest.raises(ModelsDiffer):
        expand(zoo("llama.distinct"), tmp_path / "big.onnx", 2)
    assert list(tmp_path.iterdir()) == []


def test_double_precision_shows_errors_that_single_hides(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor that is wrong by 1e-9 is within rounding in float32, and an error in float64."""
    make_plan = request.make_plan

    def scaled(*arguments: object, **options: object) -> Plan:
        plan = make_plan(*arguments, **options)  # type: ignore[arg-type]
        name, recipe = next((n, r) for n, r in plan.tensors.items() if r.shared)
        wrong = type(recipe)(recipe.source, recipe.axes, recipe.shared, 1 + 1e-9)
        return Plan(**{**vars(plan), "tensors": {**plan.tensors, name: wrong}})

    monkeypatch.setattr(request, "make_plan", scaled)
    source, out = zoo("llama.distinct"), tmp_path / "big.onnx"
    assert expand(source, out, 2, strategy=Strategy("noisy-diagonal", 0.0)).validation is not None
    with pytest.raises(ModelsDiffer, match="float64"):
        expand(source, tmp_path / "other.onnx", 2, precision="float64")
