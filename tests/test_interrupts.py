"""Ctrl-C or a scheduler's SIGTERM ends the command with one line at any time, also while Python imports modules."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, names_in, with_signals

from hyperclone_onnx.commands import guard

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")

ENTRIES = {
    "console script": [sys.executable, "-c", "from hyperclone_onnx.entry import main; main()"],
    "python -m": [sys.executable, "-m", "hyperclone_onnx"],
    "python cli.py": [sys.executable, str(ROOT / "cli.py")],
}

STRIKER = """
import os, signal, sys, weakref
def strike():
    os.kill(os.getpid(), {number})
    sum(range(1000))  # Python looks for signals between its steps
def directly():
    strike()
def in_a_finalizer():
    weakref.finalize(set(), strike)  # what it raises goes nowhere
def in_a_module_that_makes_another_error_of_it():
    try:
        strike()
    except BaseException:
        raise ImportError("initialization failed")
class Striker:
    count = 0
    def find_spec(self, name, path=None, target=None):
        if (signal.getsignal(signal.SIGINT).__module__ or "").startswith("hyperclone_onnx"):
            Striker.count += 1
            if Striker.count == {at}:
                {how}()
sys.meta_path.insert(0, Striker())
from hyperclone_onnx.entry import main
try:
    main()
finally:
    print(Striker.count)
"""
"""Run the command, and strike before one of its imports, counted from the moment when it handles signals."""


def struck(at: int, how: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = STRIKER.format(at=at, how=how, number=int(number))
    command = with_signals([sys.executable, "-c", code, *arguments])
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


@pytest.mark.parametrize("how", ["directly", "in_a_finalizer", "in_a_module_that_makes_another_error_of_it"])
def test_an_interrupt_at_many_imports(how: str, small: Path, tmp_path: Path) -> None:
    arguments = ["expand", str(small), "--factor", "2", "-o", str(tmp_path / "big.onnx"), "--no-validate"]
    imports = int(struck(0, how, signal.SIGINT, *arguments).stdout.split()[-1])
    (tmp_path / "big.onnx").unlink()
    assert imports > 200
    ends = []
    for number, at in enumerate([1, 2, 3, *range(10, imports, imports // 4)]):
        done = struck(at, how, (signal.SIGINT, signal.SIGTERM)[number % 2], *arguments)
        lines = done.stderr.splitlines()
        ends.append(done.returncode)
        if done.returncode == 0:  # the signal came too late, or an optional module turned it into an ImportError
            (tmp_path / "big.onnx").unlink()
            continue
        assert (done.returncode, lines[-1]) == (130, "error: interrupted; nothing was written"), (at, done.stderr)
        assert all(line.endswith(" ...") for line in lines[:-1]), (at, done.stderr)
        assert names_in(tmp_path) == set()
    assert ends.count(130) > len(ends) // 2


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_interrupt_after_some_time(entry: str, small: Path) -> None:
    """Before the first line of the command, in the first hundredths of a second, Python itself answers signals."""
    ends = set()
    for delay in (0.3, 0.5, 0.7):
        command = with_signals([*ENTRIES[entry], "inspect", str(small)])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        ends.add(process.returncode)
        if process.returncode == 0:
            assert "hidden" in out
        elif process.returncode == -signal.SIGINT:
            assert "in main" not in errors, errors
        else:
            assert (process.returncode, errors) == (130, "error: interrupted; nothing was written\n"), delay
    assert ends & {0, 130}


def test_an_interrupt_as_the_command_ends(small: Path) -> None:
    """Once the result is written, the exit code says so, even if a signal comes while Python shuts down."""
    code = (
        "import atexit, os, signal, sys, weakref; from hyperclone_onnx.entry import main\n"
        "class Last:\n    def __del__(self, kill=os.kill, pid=os.getpid()):\n        kill(pid, 2); kill(pid, 15)\n"
        "sys.last = Last(); atexit.register(os.kill, os.getpid(), 2); main()"
    )
    command = with_signals([sys.executable, "-c", code, "inspect", str(small)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "") and "hidden" in done.stdout


class Initialising(ExtensionFileLoader):
    """A C++ extension that runs Python code while it is imported."""

    def exec_module(self, _module: Any) -> None:
        guard._stop(signal.SIGINT, sys._getframe())


@pytest.mark.parametrize(
    "place",
    [
        lambda: guard._unraisable(SimpleNamespace(exc_type=KeyboardInterrupt)),  # type: ignore[arg-type]
        lambda: Initialising("m", "m.so").exec_module(None),
    ],
    ids=["the hook for lost ones", "C++ that is being imported"],
)
def test_an_interrupt_where_nothing_gets_out_comes_again(
    place: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python ignores an exception there with a traceback, or aborts."""
    begun: list[int] = []

    def again() -> None:
        begun.append(1)
        if len(begun) < 3:
            guard._stop(signal.SIGINT, sys._getframe())

    monkeypatch.setattr(guard, "_ending", False)
    monkeypatch.setattr(guard, "_interrupted", False)
    monkeypatch.setattr(guard, "_interrupt_soon", again)
    monkeypatch.setattr(guard.publication, "finished", lambda: None)
    place()
    assert len(begun) == 3 and guard._interrupted
    with pytest.raises(KeyboardInterrupt):
        guard._stop(signal.SIGINT, sys._getframe())
