"""The gate catches what docs/mutations.md says that it catches: some cells of that table, made again."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, TYPES, Impossible, cells, mutated, verdict

PAGE = cells((ROOT / "docs" / "mutations.md").read_text(encoding="utf-8"))

CELLS = [
    # Right models pass, or the other rows would prove nothing.
    ("nothing", "float32", "no plan"),
    ("nothing", "bfloat16", "full"),
    ("nothing", "int4", "algebraic"),
    # The check of tensors.
    ("a weight off by 1 %", "float32", "algebraic"),
    ("a weight off by 1 %", "bfloat16", "algebraic"),
    ("one head's scale off by 1 %", "bfloat16", "algebraic"),
    ("two rows swapped", "int4", "algebraic"),
    # The comparison of outputs.
    ("a weight off by 1 %", "float16", "no plan"),
    ("a weight off by 1 %", "int8", "no plan"),
    ("a missing division", "float32", "no plan"),
    ("an edit missing from the plan", "float32", "full"),
    # The check of the graph, before and instead of a run.
    ("a missing division", "float16", "first layers"),
    # The plan is made anew.
    ("an edit missing from the plan", "float32", "algebraic"),
]


@pytest.mark.parametrize(("label", "kind", "mode"), CELLS, ids=[", ".join(cell) for cell in CELLS])
def test_a_cell_of_the_table(label: str, kind: str, mode: str, tmp_path: Path) -> None:
    (mutation,) = (mutation for mutation in MUTATIONS if mutation.label == label)
    assert verdict(*mutated(kind, mutation, tmp_path), mode) == PAGE[label, kind, mode]


def test_the_page_has_a_row_for_every_mutation() -> None:
    assert {label for label, _, _ in PAGE} == {mutation.label for mutation in MUTATIONS}
    assert {kind for _, kind, _ in PAGE} == set(TYPES)


def test_right_models_pass_and_wrong_ones_are_caught_in_a_full_validation() -> None:
    for (label, kind, mode), word in PAGE.items():
        if label == "nothing":
            assert word == "passes", (kind, mode)
        elif mode in ("full", "no plan"):
            assert word in ("caught", "refused"), (label, kind, mode)


def test_what_cannot_be_made_wrong_is_no_row(tmp_path: Path) -> None:
    (division,) = (mutation for mutation in MUTATIONS if mutation.label == "a missing division")
    with pytest.raises(Impossible):
        mutated("int4", division, tmp_path)
