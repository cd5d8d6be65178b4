"""Plans that somebody edited: a clear message says if the data is no plan."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hyperclone_onnx import BadModel, Plan, Strategy

EMPTY = json.loads(Plan({}, {}, (), (), (), (), Strategy()).dumps())


def test_the_empty_plan_is_a_plan() -> None:
    assert Plan.from_json(EMPTY).to_json() == EMPTY


@pytest.mark.parametrize(
    "key, value",
    [
        ("feeds", [["a"]]),
        ("feeds", [{}]),
        ("inputs", [{}]),
        ("edits", 3),
        ("edits", [{"edit": "Nope"}]),
        ("edits", [{"edit": "SetInput", "node": "n"}]),
        ("strategy", {"nam": "symmetric"}),
        ("tensors", {"w": {"source": "v", "axes": [[1.5]]}}),
        ("dims", {"a": {"role": "x", "size": 3, "tile": "2"}}),
        ("dims", {"a": {"role": "x", "size": 3, "index": [0, 0]}}),
        ("dims", {"a": {"role": "x", "size": 3}}),
        ("dims", []),
        ("tensors", [1]),
        ("edits", [3]),
        ("strategy", {"name": "unheard-of"}),
        ("tensors", {"w": {"source": "v", "axes": [["no such dimension"]]}}),
    ],
)
def test_malformed_plans_are_refused(key: str, value: Any) -> None:
    with pytest.raises(BadModel, match="malformed"):
        Plan.from_json({**EMPTY, key: value})


@pytest.mark.parametrize("key", [key for key in EMPTY if key != "version"])
def test_a_plan_without_a_part_is_refused(key: str) -> None:
    with pytest.raises(BadModel, match="malformed"):
        Plan.from_json({name: value for name, value in EMPTY.items() if name != key})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused(version: Any) -> None:
    with pytest.raises(BadModel, match="reads version 1"):
        Plan.from_json({**EMPTY, "version": version})
