"""The zoo's graphs from other exporters, fused ones, and hand-built ones: each grows once, in its own way.

`make test` grows half of them, `make test-long` all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo_harness import Expected, Zoo, assert_computes_the_same, parameters

from hyperclone_onnx import Strategy, expand
from hyperclone_onnx.plan.strategies import STRATEGIES
from models import zoo_store

BOTH_SIZINGS = {name.split(".")[0] for name in zoo_store.names() if name.endswith(".collide")}
NAMES = [
    name
    for name in zoo_store.names()
    if name.split(".")[1] not in ("distinct", "collide") or name.split(".")[0] not in BOTH_SIZINGS
]


@pytest.mark.parametrize(
    ("index", "name"),
    [
        pytest.param(index, name, marks=pytest.mark.slow if (index // len(STRATEGIES)) % 3 else [])
        for index, name in enumerate(NAMES)
    ],
)
def test_grown_variants_compute_the_same(index: int, name: str, zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    source, out, factor = zoo(name), tmp_path / "big.onnx", 2 + index % 2
    assert all(0.1 < float(outputs[0].std()) < 10 for _, outputs in expected(name)), "not of order one"
    result = expand(source, out, factor, strategy=Strategy(STRATEGIES[index % len(STRATEGIES)], seed=3), device="cpu")
    assert_computes_the_same(out, expected(name))
    assert result.validation is not None and result.validation.equal and result.validation.problems == []
    assert {dim.role for dim in result.plan.dims.values()} <= {"hidden", "ffn", "heads", "width"}
    behind = [dim for dim in result.kept if dim.role in ("hidden", "ffn", "heads")]
    assert {dim.reason for dim in behind} <= {"another factor of the same width grows"}
    assert parameters(out) > 0.72 * factor**2 * parameters(source)
