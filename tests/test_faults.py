"""Whatever happens to a run, OUT is as before or the complete grown model: the short version of `make faults`."""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from conftest import ROOT, Command, names_in, perceptron

from hyperclone_onnx import BadRequest, CannotWrite, Plan
from hyperclone_onnx.publishing import locked_folder
from hyperclone_onnx.publishing.locked_folder import partial_folder, take_folder
from hyperclone_onnx.publishing.publication import data_name, publication, publication_folder
from hyperclone_onnx.system import file_lock
from hyperclone_onnx.system.isolation import Isolated

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are copies of a process")
faults = pytest.importorskip("fuzz.faults") if hasattr(os, "fork") else None

SCENES = {
    "a file": 19,
    "a pair": 19,
    "a pair over a pair": 13,
    "a file and its plan": 19,
    "a folder": 17,
    "a pair by copies": 89,
}
"""The distance between the calls before which a fault is tried: more where a run is long. `make faults` tries all."""


def scene(folder: Path, name: str) -> faults.Scene:  # type: ignore[name-defined]
    return next(candidate for candidate in faults.scenes(folder) if candidate.name == name)


@pytest.mark.parametrize(("name", "every"), SCENES.items())
def test_a_fault_before_some_calls(tmp_path: Path, name: str, every: int) -> None:
    strikes = {strike: faults.STRIKES[strike] for strike in ("kill", "terminate", "disk_full")}
    ends = Counter(faults.at_every_call(scene(tmp_path, name), strikes, every=every, offset=1))
    assert {strike for strike, _ in ends} == set(strikes)
    assert ends["kill", "old"] and ends["disk_full", "old"]


@pytest.mark.parametrize("call", range(-8, 0))
def test_a_kill_in_the_last_calls(tmp_path: Path, call: int) -> None:
    """The calls of the commit: data file, model, the old data file, and cleaning up."""
    published = scene(tmp_path, "a pair over a pair")
    at = faults.count_calls(published) + call
    assert [end for _, end in faults.at_every_call(published, {"kill": faults.kill}, every=1000, offset=at)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_random_moments(tmp_path: Path, number: int) -> None:
    assert len(list(faults.at_random_moments(scene(tmp_path, "a pair"), number, 4))) == 4


@pytest.mark.parametrize("name", ["a pair", "a folder"])
def test_two_runs_onto_one_output(tmp_path: Path, name: str) -> None:
    assert len(list(faults.two_at_once(scene(tmp_path, name), 2))) == 2


@pytest.mark.parametrize("name", ["a file", "a pair"])
def test_limits_of_file_sizes(tmp_path: Path, name: str) -> None:
    ends = list(faults.file_size_limits(scene(tmp_path, name), 3))
    assert ends[0] == "old" and ends[-1] == "new"


def test_disks_that_are_full(tmp_path: Path) -> None:
    ends = list(faults.full_disks(tmp_path, True, range(4, 160, 50)))
    if "skipped" in ends:
        pytest.skip("nothing may be mounted here")
    assert ends[0] == "refused" and ends[-1] == "written"


def test_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    ends = list(faults.without_permission(tmp_path))
    if "skipped" in ends:
        pytest.skip("another user cannot be taken, or cannot reach this folder")
    assert ends == ["exit 2", "exit 4", "exit 0"]


def test_a_source_that_changes(tmp_path: Path) -> None:
    assert "refused" in set(faults.source_changes(scene(tmp_path, "a pair"), every=9))


def test_the_judge_notices_wrong_states(tmp_path: Path) -> None:
    """These checks can fail: they notice half a model, leftover files, and a wrong message."""
    published = scene(tmp_path, "a file")
    judge = faults.Judge(published)
    done = faults.Ended(2, "error: no space", "")
    published.reset()
    (published.root / published.out).write_bytes(b"half a model")
    with pytest.raises(faults.Broken, match="no whole model"):
        judge.judge(done)
    published.reset()
    (published.root / ".big.onnx.partial").mkdir()
    with pytest.raises(faults.Broken, match="leftovers"):
        judge.judge(done)
    published.reset()
    with pytest.raises(faults.Broken, match="exit code does not say"):
        judge.judge(faults.Ended(0, "wrote it", ""))
    published.reset()
    (published.root / published.source).write_bytes(b"")
    with pytest.raises(faults.Broken, match="harmed"):
        judge.judge(done)


# -- the state machine by itself --------------------------------------------------------------------------


def test_a_plan_appears_with_its_model_or_not_at_all(
    cli: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "big.onnx", tmp_path / "plan.json"
    plan.write_text("what was there before")
    arguments = ("expand", small, "--factor", "2", "--no-validate", "-o", out, "--plan-out", plan)
    replace = os.replace

    def no_rename(victim: Path) -> None:
        def failing(source: Path, target: Path) -> None:
            if target == victim:
                raise OSError(5, "Input/output error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)

    no_rename(out)
    outcome = cli(*arguments)
    assert outcome.code == 2 and outcome.error.startswith(f"error: {out}: cannot be written")
    assert names_in(tmp_path) == {"plan.json"} and plan.read_text() == "what was there before"
    no_rename(plan)
    outcome = cli(*arguments)
    assert outcome.code == 2 and f"{out} is written and complete, but {plan} cannot be written" in outcome.error
    assert names_in(tmp_path) == {"big.onnx", "plan.json"} and plan.read_text() == "what was there before"
    monkeypatch.undo()
    place = take_folder(plan)
    outcome = cli(*arguments)
    assert outcome.code == 2 and f"{plan}: another run" in outcome.error
    place.remove()
    assert cli(*arguments).code == 0 and plan.read_text() == Plan.loads(plan.read_text()).dumps(indent=1) + "\n"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "made"
    with pytest.raises(ZeroDivisionError), publication_folder(out) as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert names_in(tmp_path) == set()
    out.mkdir()  # an empty folder is no obstacle
    with publication_folder(out) as folder:
        assert folder.name == "made" and folder.parent.parent == tmp_path
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("whole")
        assert names_in(out) == set()
    assert names_in(tmp_path) == {"made"} and (out / "below" / "file").read_text() == "whole"
    with pytest.raises(BadRequest, match="exists already"), publication_folder(out):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="exists already"), publication_folder(tmp_path / "file"):
        pass
    with pytest.raises(CannotWrite, match="does not exist"), publication_folder(tmp_path / "no" / "made"):
        pass


def test_a_folder_that_fills_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "made"
    with pytest.raises(CannotWrite), publication_folder(out) as folder:
        (folder / "file").write_text("ours")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert names_in(out) == {"theirs"} and names_in(tmp_path) == {"made"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    with publication(out) as written:
        with (
            pytest.raises(CannotWrite, match=f"another run .process {os.getpid()}. is writing it"),
            publication(out),
        ):
            pass
        written.write_text("first")
        with publication(tmp_path / "other.onnx") as other:  # another output is not concerned
            other.write_text("other")
    assert out.read_text() == "first" and names_in(tmp_path) == {"big.onnx", "other.onnx"}


HOLDER = """
import sys, time; from pathlib import Path
from hyperclone_onnx.publishing.locked_folder import take_folder
place = take_folder(Path(sys.argv[1]))
(place.folder / "half").write_text("of a model")
print("locked", flush=True); time.sleep(600)
"""
"""Prepares OUT and never comes to an end."""


def test_a_run_in_another_process_is_named_and_unlocked_by_its_end(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        for _ in range(2):  # being refused changes nothing about the lock, nor the number in it
            with pytest.raises(CannotWrite, match=f"another run .process {holder.pid}. is writing it"):
                take_folder(out)
        holder.kill()
        holder.wait()
    with publication(out) as written:
        written.write_text("whole")
    assert names_in(tmp_path) == {"big.onnx"} and out.read_text() == "whole"


def test_a_copy_of_the_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    place = take_folder(out)
    copy = Isolated(lambda: lambda _: len(locked_folder._held))
    place._unlock()
    take_folder(out).remove()
    assert copy(0) == 0 and names_in(tmp_path) == set()


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: a folder that another run has made may be in use, and stays as it is."""

    def no_locks(_descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locked_folder, "try_lock", no_locks)
    out = tmp_path / "big.onnx"
    with publication(out) as written:
        with pytest.raises(CannotWrite, match=r"no locks here that tell which\): when none runs, remove"):
            take_folder(out)
        written.write_text("whole")
    assert names_in(tmp_path) == {"big.onnx"} and out.read_text() == "whole"
    partial_folder(out).mkdir()
    with pytest.raises(CannotWrite, match="no locks"), publication(out):
        pass
    assert names_in(tmp_path) == {"big.onnx", partial_folder(out).name}


def test_a_lock_that_fails_otherwise_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_descriptor: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locked_folder, "try_lock", fails)
    before = names_in(Path("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    with pytest.raises(CannotWrite, match="Input/output error"):
        take_folder(tmp_path / "big.onnx")
    assert before in (set(), names_in(Path("/proc/self/fd")))


def test_locks_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for its module: one byte is locked, where it keeps nobody from reading the process number."""
    locked: list[tuple[int, int, int]] = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        if locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        locked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "platform", "win32")
    windows = runpy.run_path(file_lock.__file__)
    monkeypatch.undo()
    monkeypatch.setattr(locked_folder, "try_lock", windows["try_lock"])
    place = take_folder(tmp_path / "big.onnx")
    assert locked == [(1 << 30, 2, 1)]
    with pytest.raises(CannotWrite, match=f"another run .process {os.getpid()}. is writing it"):
        take_folder(tmp_path / "big.onnx")
    place.remove()
    assert names_in(tmp_path) == set()


def test_the_next_run_removes_the_files_of_a_killed_run(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    place = take_folder(out)
    (place.folder / "half").write_text("of a model")
    (place.folder / "float64").mkdir()
    place._unlock()  # as the kernel does when a process ends
    with publication(out) as written:
        assert names_in(written.parent) == {".lock"}
        written.write_text("whole")
    assert names_in(tmp_path) == {"big.onnx"}


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("precious")
    partial_folder(out).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotWrite, match="in the way"), publication(out):
        pass
    assert (tmp_path / "elsewhere" / "precious").read_text() == "precious"


def test_names_of_data_files(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    assert data_name(out) == "big.onnx.data"
    for expected, taken in (
        ("big.onnx.data", None),
        ("big.onnx.1.data", "big.onnx.data"),
        ("big.onnx.2.data", "big.onnx.1-00001-of-00002.data"),
        ("big.onnx.2.data", "other.onnx.2.data"),
    ):
        if taken:
            (tmp_path / taken).write_text("")
        with publication(out) as written:
            assert data_name(written) == expected
            written.write_text("")


def test_a_pair_is_replaced_at_once(cli: Command, tmp_path: Path) -> None:
    """The old model keeps its data until the new model is there. Then they are removed, and the name is free again."""
    onnx.save(
        perceptron(), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    arguments = ("expand", tmp_path / "model.onnx", "-o", tmp_path / "big.onnx", "--no-validate", "--factor")
    for factor, data in (("2", "big.onnx.data"), ("3", "big.onnx.1.data"), ("2", "big.onnx.data")):
        assert cli(*arguments, factor).code == 0
        assert names_in(tmp_path) == {"model.onnx", "weights.bin", "big.onnx", data}
        assert cli("validate", tmp_path / "model.onnx", tmp_path / "big.onnx", "--device", "cpu").code == 0


@pytest.mark.parametrize("name", ["big.onnx.data", "big.onnx.1.data", "big.onnx-00001-of-00002.data"])
def test_data_of_the_source_is_never_taken_for_old_data(cli: Command, tmp_path: Path, name: str) -> None:
    """A copied model refers to the same data file: growth that replaces the first model would remove it."""
    onnx.save(perceptron(), tmp_path / "big.onnx", save_as_external_data=True, location=name, size_threshold=0)
    shutil.copy(tmp_path / "big.onnx", tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx")
    assert outcome.code == 2 and "overwrite the source" in outcome.error
    assert cli("inspect", tmp_path / "model.onnx").code == 0


def test_a_source_in_the_folder_that_is_cleared(cli: Command, tmp_path: Path) -> None:
    (tmp_path / ".big.onnx.partial").mkdir()
    onnx.save(perceptron(), tmp_path / ".big.onnx.partial" / "model.onnx")
    outcome = cli("expand", tmp_path / ".big.onnx.partial" / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx")
    assert outcome.code == 2 and "cleared" in outcome.error
    assert (tmp_path / ".big.onnx.partial" / "model.onnx").exists()


def test_a_hard_link_to_the_source(cli: Command, tmp_path: Path) -> None:
    onnx.save(perceptron(), tmp_path / "model.onnx")
    os.link(tmp_path / "model.onnx", tmp_path / "big.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx")
    assert outcome.code == 2 and "overwrite the source" in outcome.error
