"""Each operator's rule against random models of one node: op(grow(x)) must be grow(op(x)), in double precision."""

from __future__ import annotations

import pytest
import rule_rows
from rule_rows.harness import COVERED, ROWS, Build, check

from hyperclone_onnx.rules import registry

assert rule_rows  # importing it registers the rows


def test_every_rule_has_a_row() -> None:
    assert set(registry.ruled()) == COVERED


@pytest.mark.parametrize("key, build, seeds", ROWS)
def test_grown_operator_computes_the_same(key: tuple[str, str], build: Build, seeds: int) -> None:
    for seed in range(seeds):
        check(key, build, seed)
