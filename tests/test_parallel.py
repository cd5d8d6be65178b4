"""Copies of this process share work: all of it is done, or an error says why not, and no copy is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import names_in, perceptron

from hyperclone_onnx import CannotWrite, expand, validate_files
from hyperclone_onnx.system import isolation, parallel
from hyperclone_onnx.system.parallel import SMALL, share_out, workers_for
from hyperclone_onnx.tensors import table as tables

pytestmark = pytest.mark.skipif(not isolation.POSSIBLE, reason="processes cannot be copied here")


def children() -> set[str]:
    """The child processes that this process has not waited for."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_argument_has_its_answer(workers: int) -> None:
    answers: list[tuple[int, int]] = []
    share_out(lambda: lambda number: (number * number, os.getpid()), list(range(20)), workers, answers.append)
    assert sorted(square for square, _ in answers) == [number * number for number in range(20)]
    where = {pid for _, pid in answers}
    assert len(where) <= workers and (os.getpid() in where) == (workers == 1)


def test_copies_work_at_the_same_time(tmp_path: Path) -> None:
    """Each of them waits until all have begun."""

    def meet(number: int) -> bool:
        (tmp_path / str(number)).touch()
        deadline = time.monotonic() + 60
        while len(names_in(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(names_in(tmp_path)) == 4

    met: list[bool] = []
    share_out(lambda: meet, list(range(4)), 4, met.append)
    assert met == [True] * 4


def test_an_error_is_raised_here_and_no_copy_goes_on(tmp_path: Path) -> None:
    def work(number: int) -> None:
        if number == 3:
            raise OSError(28, "No space left on device", str(tmp_path))
        time.sleep(0.01 if number < 3 else 60)

    before = children()
    with pytest.raises(OSError, match="No space left") as caught:
        share_out(lambda: work, list(range(8)), 3, lambda _: None)
    assert caught.value.errno == 28 and children() == before


def test_a_copy_that_is_killed_is_reported(tmp_path: Path) -> None:
    def work(number: int) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    before = children()
    with pytest.raises(CannotWrite, match=r"ended .*SIGKILL.*--workers 1"):
        share_out(lambda: work, list(range(8)), 2, lambda _: None)
    assert children() == before


@pytest.mark.usefixtures("hearing_signals")
def test_an_interrupt_leaves_no_copy() -> None:
    """The signal may come at any moment: while copies are started, and while they are awaited."""
    before = children()
    for delay in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1):
        timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            share_out(lambda: lambda _: time.sleep(0.02), list(range(1000)), 3, lambda _: None)
        timer.join()
        assert children() == before


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_cores", lambda: 64)
    assert [workers_for(size) for size in (0, SMALL - 1, SMALL, 1 << 40)] == [1, 1, 4, 4]
    assert [workers_for(0, count) for count in (1, 3, 64)] == [1, 3, 64]
    monkeypatch.setattr(isolation, "POSSIBLE", False)
    assert [workers_for(1 << 40), workers_for(0, 3)] == [1, 1]


def test_files_and_reports_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = tmp_path / "small.onnx"
    onnx.save(perceptron(64, 128), source)
    results = [expand(source, tmp_path / f"{n}.onnx", 2, workers=n, max_shard_size=1 << 12) for n in (1, 2, 4)]
    first, *others = sorted(name for name in names_in(tmp_path) if name != "small.onnx" and name[0] == "1"), "2", "4"
    for name in first:
        for other in others:
            mine = (tmp_path / name).read_bytes().replace(b"1.onnx", b"N.onnx")
            assert (tmp_path / f"{other}{name[1:]}").read_bytes().replace(f"{other}.onnx".encode(), b"N.onnx") == mine
    reports = [result.validation.tensors for result in results if result.validation is not None]
    assert len(reports) == 3 and reports[0] == reports[1] == reports[2]


def test_an_error_about_a_tensor_comes_back_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grown weights are changed on their way to the file."""
    source = tmp_path / "small.onnx"
    onnx.save(perceptron(64, 128), source)
    packed = tables.Table._packed

    def spoiled(table: tables.Table, rows: Any) -> Any:
        changed = packed(table, rows).copy()
        changed.reshape(-1)[3] += 1.0
        return changed

    with monkeypatch.context() as before:
        before.setattr(tables.Table, "_packed", spoiled)
        expand(source, tmp_path / "big.onnx", 2, workers=2, check=False)
    for workers in (1, 2):
        report = validate_files(source, tmp_path / "big.onnx", mode="algebraic", workers=workers)
        assert not report.equal and report.tensors is not None and len(report.tensors.wrong) > 2
