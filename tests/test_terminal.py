"""What a terminal shows: lines that are wrapped at words, caches in one line, roles in plain words, and a bar."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import perceptron
from rich.console import Console

import hyperclone_onnx
from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.commands.printing import progress
from hyperclone_onnx.reports.inspection import collapsed_values, print_inspection


def printed(path: Path, width: int, *, terminal: bool) -> str:
    out = io.StringIO()
    print_inspection(
        Console(file=out, width=width, force_terminal=terminal, highlight=False, color_system=None), analyse(path)
    )
    return out.getvalue()


def test_a_narrow_terminal_breaks_lines_between_words(zoo: Callable[[str], Path]) -> None:
    path = zoo("llama.cached")
    narrow, wide = (printed(path, width, terminal=True) for width in (80, 400))
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines()))
    assert set(narrow.split()) == set(wide.split())


def test_a_file_gets_whole_lines(zoo: Callable[[str], Path]) -> None:
    long = [line for line in printed(zoo("llama.cached"), 80, terminal=False).splitlines() if len(line) > 80]
    assert any(line.startswith("output present.*.key x2: ") for line in long)


def test_caches_share_a_line_and_roles_are_explained(zoo: Callable[[str], Path]) -> None:
    lines = printed(zoo("llama.cached"), 400, terminal=True).splitlines()
    assert "input past_key_values.*.value x2: batch_size kv_heads past_sequence_length head_dim" in lines
    words = [" ".join(line.split()) for line in lines]
    assert any(line.startswith("kv_heads key/value heads: ") for line in words)
    assert any(line.startswith("heads query heads: ") for line in words)
    assert not any(line.startswith("positions ") for line in words)  # the model has none


def test_values_that_differ_in_more_than_numbers_have_lines_of_their_own() -> None:
    values = {"x.0": "batch ffn.0", "x.1": "batch hidden", "y": None, "z.2": "batch 2"}
    assert collapsed_values(values) == ["x.0: batch ffn.0", "x.1: batch hidden", "y: of unknown rank", "z.2: batch 2"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_counts_bytes_and_says_how_long_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress() as (notify, written):
        assert written is not None
        notify("writing")
        for megabytes in (4, 8, 12):
            written(megabytes * 10**6, 16 * 10**6)
    last = [line for line in out.getvalue().splitlines() if "writing" in line][-1]
    assert "12.0/16.0 MB" in last and "to go" in last


def test_a_stage_that_writes_nothing_has_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    with progress() as (notify, written):
        assert written is not None
        written(8, 16)
        notify("validating")
    last = [line for line in out.getvalue().splitlines() if "validating" in line][-1]
    assert "/" not in last and "to go" not in last


def test_progress_is_told_in_bytes() -> None:
    steps: list[tuple[int, int]] = []
    result = hyperclone_onnx.expand(
        perceptron(), factor=2, check=False, workers=1, progress=lambda done, total: steps.append((done, total))
    )
    weights = [tensor for tensor in result.model.graph.initializer if tensor.name.startswith(("up", "down", "head"))]
    done, totals = zip(*steps, strict=True)
    assert len(set(totals)) == 1 and list(done) == sorted(done) and done[-1] == totals[0]
    # The rest is the embedding, and small tensors.
    assert 0.5 * totals[0] < sum(len(tensor.raw_data) for tensor in weights) < totals[0]
