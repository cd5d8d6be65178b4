"""Work in a copy of the process: a crash of the copy does not end the command, and the command's end ends the copy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ROOT, Command, build_model, names_in, perceptron, with_signals

from hyperclone_onnx import Refused
from hyperclone_onnx.system.isolation import POSSIBLE, BrokenDown, Isolated
from hyperclone_onnx.validation import sessions
from hyperclone_onnx.validation.sessions import Runner

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="processes cannot be copied here")


def never(_argument: object) -> None:
    time.sleep(600)


def fail(_argument: object) -> None:
    raise ValueError("so it is")


def ends(number: int) -> Callable[[object], None]:
    return lambda _: os.kill(os.getpid(), number)


def pid_of(_argument: object) -> int:
    return os.getpid()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_copy_returns_a_result_for_its_arguments() -> None:
    state: list[int] = []

    def collect(number: int) -> list[int]:
        state.append(number)
        return state

    isolated = Isolated(lambda: collect)
    assert isolated(1) == [1] and isolated(2) == [1, 2] and state == []
    large = np.arange(1 << 20)
    assert np.array_equal(Isolated(lambda: lambda array: array + 1)(large), large + 1)


def test_errors_come_through() -> None:
    isolated = Isolated(lambda: fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="so it is"):
            isolated(0)
    with pytest.raises(ZeroDivisionError):
        Isolated(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="no answer can be given"):
        Isolated(lambda: lambda _: lambda: 0)(0)  # a nested function cannot be pickled


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_the_error_says_how_a_copy_ended(number: int) -> None:
    isolated = Isolated(lambda: ends(number))
    for _ in range(2):
        with pytest.raises(BrokenDown, match=f"it ended by {signal.Signals(number).name}"):
            isolated(0)
    with pytest.raises(BrokenDown, match=signal.Signals(number).name):
        Isolated(lambda: os.kill(os.getpid(), number))  # type: ignore[arg-type, return-value]


def test_a_crash_of_a_copy_is_not_seen() -> None:
    """Here, Python writes its report of a crash to a copy of stderr, as under pytest."""
    code = (
        "import faulthandler, os; faulthandler.enable(file=os.dup(2))\n"
        "from hyperclone_onnx.system.isolation import BrokenDown, Isolated\n"
        "try:\n    Isolated(os.abort)\nexcept BrokenDown as problem:\n    print(problem, flush=True)\n"
        "os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "it ended by SIGABRT\n"
    # The report on stderr is that of the first process.
    assert done.returncode == -signal.SIGABRT and done.stderr.count("Fatal Python error") == 1


def test_one_that_does_not_come_to_an_end() -> None:
    isolated = Isolated(lambda: never, patience=0.2)
    with pytest.raises(BrokenDown, match="does not come to an end"):
        isolated(0)


def test_a_copy_ends_with_its_object() -> None:
    isolated = Isolated(lambda: pid_of)
    other = Isolated(lambda: pid_of)
    pid, second = isolated(0), other(0)
    assert len({pid, second, os.getpid()}) == 3
    del isolated
    assert gone(pid) and not gone(second)


@pytest.mark.skipif(sys.platform != "linux", reason="who is told of a parent's end")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_copy_ends_with_the_command(number: int) -> None:
    """Ctrl-C takes effect at once although the copy is busy, and a kill leaves no process behind."""
    code = (
        "import os, time; from hyperclone_onnx.system.isolation import Isolated\n"
        "pids = lambda _: os.getpid()\n"
        "def work(_):\n    time.sleep(600)\n"
        "one, other = Isolated(lambda: pids), Isolated(lambda: lambda n: work(n) if n else os.getpid())\n"
        "print(one(0), other(0), flush=True); other(1)"
    )
    command = with_signals([sys.executable, "-c", code])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert process.stdout is not None
    copies = list(map(int, process.stdout.readline().split()))
    assert len(copies) == 2 and not any(map(gone, copies))
    process.send_signal(number)
    process.wait(timeout=20)
    deadline = time.monotonic() + 20
    while not all(map(gone, copies)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(map(gone, copies))
    process.stdout.close()


# -- ONNX Runtime -----------------------------------------------------------------------------------------


class Aborting:
    """A session that ends its process when it is created or when it runs, as ONNX Runtime does on some graphs."""

    def __init__(self, session: Any, when: str) -> None:
        self.session, self.when = session, when
        if when == "load":
            os.abort()

    def __getattr__(self, name: str) -> Any:
        if name == "run" and self.when == "run":
            os.abort()
        return getattr(self.session, name)


@pytest.mark.parametrize("when", ["load", "run"])
@pytest.mark.parametrize("victim", ["small", "big"])
def test_an_abort_of_onnx_runtime(
    when: str, victim: str, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with one line and an exit code. OUT is as before, no file is left, and the next run succeeds."""
    onnx.save(perceptron(), tmp_path / "small.onnx")
    out = tmp_path / "big.onnx"
    out.write_text("what was there before")
    plain = sessions._session

    def aborting(ort: Any, path: Any, *others: Any) -> Any:
        session = plain(ort, path, *others)
        return Aborting(session, when) if Path(path).name.startswith(victim) else session

    monkeypatch.setattr(sessions, "_session", aborting)
    arguments = ("expand", tmp_path / "small.onnx", "--factor", "2", "-o", out, "--device", "cpu")
    outcome = cli(*arguments)
    differs = victim == "big" and when == "run"
    assert outcome.code == (1 if differs else 3), outcome.error
    assert "ONNX Runtime breaks down on it" in outcome.error and "SIGABRT" in outcome.error
    assert differs or "--no-validate" in outcome.error
    assert out.read_text() == "what was there before" and names_in(tmp_path) == {"small.onnx", "big.onnx"}
    monkeypatch.undo()
    assert cli(*arguments).code == 0


def test_an_abort_of_the_command_itself(small: Path, tmp_path: Path) -> None:
    """ONNX Runtime runs in the command's own process: OUT is not there, and the next run removes the other files."""
    out = tmp_path / "big.onnx"
    code = (
        "import os; from hyperclone_onnx.system import isolation; isolation.POSSIBLE = False\n"
        "from hyperclone_onnx.validation import sessions\n"
        "start = sessions._session\n"
        "sessions._session = lambda ort, path, *more: os.abort() if 'big' in str(path) else start(ort, path, *more)\n"
        "from hyperclone_onnx.entry import main; main()"
    )
    arguments = ["expand", str(small), "--factor", "2", "-o", str(out), "--device", "cpu"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "cwd": ROOT, "timeout": 120}
    assert subprocess.run([sys.executable, "-c", code, *arguments], **options).returncode == -signal.SIGABRT
    assert names_in(tmp_path) == {".big.onnx.partial"}
    assert subprocess.run([sys.executable, "-m", "hyperclone_onnx", *arguments], **options).returncode == 0
    assert names_in(tmp_path) == {"big.onnx"}


def test_a_graph_on_which_onnx_runtime_aborts(tmp_path: Path) -> None:
    """A Split that declares one output and has two. Other releases of ONNX Runtime may refuse it instead."""
    graph = "g (float[n, 12] x) => (float[n, 6] y, float[n, 6] z) { y, z = Split <axis = 1, num_outputs = 1> (x) }"
    onnx.save(build_model(graph, {}), tmp_path / "split.onnx")
    with pytest.raises(Refused, match=r"ONNX Runtime (breaks down on it .it ended by SIG|cannot load it)"):
        Runner(tmp_path / "split.onnx", "cpu", isolated=True)


def test_runners_alone_and_not(small: Path) -> None:
    feeds = {"ids": np.arange(6).reshape(2, 3)}
    alone, here = Runner(small, "cpu", isolated=True), Runner(small, "cpu")
    assert (alone.provider, alone.inputs, alone.outputs) == (here.provider, here.inputs, here.outputs)
    assert np.array_equal(alone.run(feeds)["logits"], here.run(feeds)["logits"])
    for runner in (alone, here):
        with pytest.raises(RuntimeError, match="ids"):
            runner.run({})
    with pytest.raises(Refused, match="cannot load it"):
        Runner(small.with_name("none.onnx"), "cpu", isolated=True)


def test_a_loop_that_never_ends(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command does so, in one line."""
    graph = """g (float[n, 12] x, bool go) => (float[n, 12] y) {
        h = MatMul (x, w) limit = Constant <value = int64 {9223372036854775807}> ()
        y = Loop (limit, go, h) <body = b (int64 i, bool before, float[n, 12] h_in)
            => (bool after, float[n, 12] h_out) { after = Identity (before) h_out = Identity (h_in) }>
    }"""
    onnx.save(build_model(graph, {"w": np.ones((12, 12), np.float32)}), tmp_path / "small.onnx")
    monkeypatch.setattr(sessions, "PATIENCE", 2.0)
    outcome = cli("expand", tmp_path / "small.onnx", "--set", "width=2", "-o", tmp_path / "big.onnx")
    assert outcome.code == 3, outcome.error
    assert "does not come to an end within 2 s" in outcome.error
    assert names_in(tmp_path) == {"small.onnx"}
