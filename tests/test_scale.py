"""The work grows in proportion to the graph, and not to its square. It is counted, never timed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import hyperclone_onnx
from hyperclone_onnx import analyse, plan_expansion, rewrite
from hyperclone_onnx.expansion.expanding import plan_file
from hyperclone_onnx.planning import sharing
from hyperclone_onnx.reports.inspection import inspection
from hyperclone_onnx.rules.dimensions import Use
from models.large import LLAMA_405B, Sizes, write

PACKAGE = str(Path(hyperclone_onnx.__file__).parent)
LAYERS = (2, 4, 8)


def instructions(call: Callable[[], Any]) -> int:
    """The number of bytecode instructions that this package, and the code of a test, executes during a call."""
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return local

    def entered(frame: FrameType, _event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith((PACKAGE, __file__)):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def work(folder: Path, layers: int, stages: tuple[str, ...]) -> dict[str, int]:
    """The instructions of each stage, on a Llama with the given number of layers."""
    path = folder / f"{layers}.onnx"
    write(Sizes(hidden=64, layers=layers, heads=8, kv_heads=2, ffn=96, vocab=128), path, sparse=True)
    analysis = analyse(path)
    plan = plan_expansion(analysis, 2)
    calls: dict[str, Callable[[], Any]] = {
        "analyse": lambda: analyse(path),
        "plan": lambda: plan_expansion(analysis, 2),
        "rewrite": lambda: rewrite(analysis.model, plan),
        "inspect": lambda: inspection(analysis),
    }
    return {stage: instructions(calls[stage]) for stage in stages or calls}


def excess(folder: Path, *stages: str) -> dict[str, float]:
    """How much more the last doubling of layers added than twice the one before; 0 if the work is linear."""
    few, some, many = (work(folder, layers, stages) for layers in LAYERS)
    return {stage: (many[stage] - some[stage]) / (2 * (some[stage] - few[stage])) - 1 for stage in few}


def test_every_stage_is_linear_in_the_layers(tmp_path: Path) -> None:
    assert {stage: round(ratio, 2) for stage, ratio in excess(tmp_path).items() if ratio > 0.03} == {}


def test_a_search_through_every_layer_in_every_layer_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An implementation with quadratic work, as `marks_of` once had."""

    def marks_of(self: sharing._Divider, use: Use) -> Any:
        for mark in self.carried.values():
            if use in mark.marks:
                return frozenset(a for a in mark.marks[use] if self.terms.grows(self.dimensions.use_axes[use][a]))
        return frozenset()

    monkeypatch.setattr(sharing._Divider, "marks_of", marks_of)
    assert excess(tmp_path, "plan")["plan"] > 0.03


def test_405_billion_parameters_are_planned_without_a_byte_of_them(tmp_path: Path) -> None:
    """With a sparse file; and no recursion is as deep as the number of layers."""
    assert write(LLAMA_405B, tmp_path / "model.onnx", sparse=True) == 405_853_388_800
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + LLAMA_405B.layers - 10)
    try:
        result = plan_file(tmp_path / "model.onnx", 2)
    finally:
        sys.setrecursionlimit(limit)
    assert result.parameters_after > 1_614e9
    grew = {dim.role: dim.map.grown // dim.map.size for dim in result.plan.dims.values()}
    assert grew == {"hidden": 2, "heads": 2, "ffn": 2}
    assert (tmp_path / "model.onnx.data").stat().st_blocks * 512 < 1e6
