"""Tests faults at every moment of a run: a kill, a signal or a failed write, before each call to the file system.

    python -m fuzz.faults            # every call, and 200 kills at random moments; minutes
    python -m fuzz.faults --every 7  # every seventh call

A run is a copy of this process (fork), so that it starts at once. An audit hook (PEP 578) counts its calls to the file
system and strikes before one of them. After each fault, five things must hold. OUT is as it was before, or the complete
grown model. The source is unharmed. The message and the exit code say which of the two OUT is. Only a kill leaves other
files behind. And the next run succeeds, and removes these files.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import mmap
import multiprocessing.connection  # noqa: F401 - read now: another user may not read where Python lies
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hyperclone_onnx.entry import listen
from hyperclone_onnx.system.signals import STOPPING

CALLS = frozenset("open os.mkdir os.rename os.remove os.rmdir os.truncate os.link os.listdir os.scandir".split())
"""The audit events that are calls to the file system, if their arguments name a path."""

NOBODY = 65534


class Broken(AssertionError):
    """A run left a wrong state behind, or reported something false."""


# -- scenes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A command, and the folder in which it runs."""

    name: str
    root: Path
    source: str
    out: str
    before: str = ""
    """The form of the grown model that is at OUT before the run: "inline" or "split"; empty for none."""
    validate: bool = False
    factor: int = 2
    plan: str = ""
    """The file to which the plan is also written."""
    workers: int = 1
    """The number of workers. With several, each is a copy of the process, and a strike may hit it too."""

    @property
    def arguments(self) -> list[str]:
        """The arguments of the command."""
        paths = ["expand", str(self.root / self.source), "-o", str(self.root / self.out)]
        plan = ["--plan-out", str(self.root / self.plan)] if self.plan else []
        check = [] if self.validate else ["--no-validate"]
        workers = ["--workers", str(self.workers)]
        return [*paths, "--factor", str(self.factor), "--device", "cpu", *workers, *plan, *check]

    def reset(self) -> None:
        """Bring the folder into its first state."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        if Path(self.source).suffix == ".onnx":
            make_model(self.root / self.source, split="split" in self.source)
        else:
            (self.root / self.source / "onnx").mkdir(parents=True)
            make_model(self.root / self.source / "onnx" / "model.onnx", split=True)
            make_model(self.root / self.source / "other.onnx", split=False)
            (self.root / self.source / "config.json").write_text("{}")
        if self.before:
            make_model(self.root / self.out, split=self.before == "split", seed=7)
        if self.before == "split":
            assert (self.root / f"{self.out}.data").exists()


def make_model(path: Path, *, split: bool, seed: int = 1, width: int = 24) -> None:
    """A small model that grows, with its weights in a data file or in the model file."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array((rng.standard_normal(shape) * 0.2).astype(np.float32), name)

    text = """<ir_version: 10, opset_import: ["": 20]>
    g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
        h = Gather (embedding, ids) n = LayerNormalization (h, gain) u = MatMul (n, up) r = Relu (u)
        d = MatMul (r, down) y = Add (h, d) m = LayerNormalization (y, gain) logits = MatMul (m, head)
    }"""
    model = onnx.parser.parse_model(text)
    sizes = {"embedding": (31, width), "gain": (width,), "up": (width, 80), "down": (80, width), "head": (width, 31)}
    model.graph.initializer.extend(weight(name, *shape) for name, shape in sizes.items())
    if split:
        data = f"{path.name}.data"
        (path.parent / data).unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    else:
        onnx.save(model, path)


def scenes(folder: Path) -> list[Scene]:
    """The scenes: every way in which a command publishes files."""
    return [
        Scene("a file", folder / "scene", "small.onnx", "big.onnx"),
        Scene("a file, validated", folder / "scene", "small.onnx", "big.onnx", validate=True),
        Scene("a file over a file", folder / "scene", "small.onnx", "big.onnx", "inline"),
        Scene("a file over a pair", folder / "scene", "small.onnx", "big.onnx", "split"),
        Scene("a pair", folder / "scene", "split.onnx", "big.onnx"),
        Scene("a pair over a file", folder / "scene", "split.onnx", "big.onnx", "inline"),
        Scene("a pair over a pair", folder / "scene", "split.onnx", "big.onnx", "split"),
        Scene("a file and its plan", folder / "scene", "small.onnx", "big.onnx", plan="plan.json"),
        Scene("a folder", folder / "scene", "small", "big"),
        Scene("a pair by copies", folder / "scene", "split.onnx", "big.onnx", "split", validate=True, workers=2),
    ]


# -- what lies there --------------------------------------------------------------------------------------


def digest_of(path: Path) -> str:
    """The content of a model as text, whatever the name of its data file; or of a folder. Empty if nothing is there."""
    if path.is_dir():
        parts = [(str(file.relative_to(path)), digest_of(file)) for file in sorted(path.rglob("*")) if file.is_file()]
        parts = [(name, digest) for name, digest in parts if not name.endswith(".data")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if not path.exists():
        return ""
    if path.suffix != ".onnx":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    model = onnx.load(path)  # reads the data too, and fails where they are not complete
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def listing(root: Path) -> set[str]:
    """Every file and folder, by its path."""
    return {str(entry.relative_to(root)) for entry in root.rglob("*")}


def raw(root: Path, names: set[str]) -> dict[str, bytes]:
    """The content of files."""
    return {name: (root / name).read_bytes() for name in sorted(names) if (root / name).is_file()}


# -- runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative for a signal), its last line, and the number of its calls."""

    code: int
    last: str
    text: str


Strike = Callable[[], None]


def start(arguments: list[str], *, at: int | None = None, strike: Strike | None = None, first: Strike | None = None,
          counter: Path | None = None) -> tuple[int, int]:  # fmt: skip
    """Start a run in a copy of this process that strikes before its call number `at`; returns (process, stderr)."""
    from hyperclone_onnx.commands.main import main

    read, write = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the copy handles signals
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(write)
        return child, read
    code = 70
    try:
        os.close(read)
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        for number in STOPPING:  # a background job may have been started with ignored signals
            signal.signal(number, signal.SIG_DFL)
        listen()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # As for every user: the tests turn warnings into errors, and an interrupted import leaves files open.
        warnings.simplefilter("ignore", ResourceWarning)
        if first is not None:
            first()
        calls = _watch(at, strike)
        try:
            main(arguments, prog_name="hyperclone-onnx", standalone_mode=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        if counter is not None:
            counter.write_text(str(calls[0]))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as problem:
        os.write(2, f"Traceback: {problem!r}\n".encode())
    finally:
        os._exit(code)


def _watch(at: int | None, strike: Strike | None) -> list[int]:
    calls = [0]
    struck = mmap.mmap(-1, 1)  # shared by all copies of the process, each of which counts its calls

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and arguments and isinstance(arguments[0], str | bytes | int | os.PathLike):
            path = os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else ""
            if ".partial" in path or "scene" in path:
                calls[0] += 1
                if calls[0] - 1 == at and strike is not None and not struck[0]:
                    struck[0] = 1
                    strike()

    sys.addaudithook(hook)
    return calls


def finish(child: int, stderr: int, seconds: float = 120.0) -> Ended:
    """Wait for the end of a run."""
    with os.fdopen(stderr, "r", errors="replace") as pipe:
        text = pipe.read()
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Broken(f"a run did not end: {text[-300:]}")
        time.sleep(0.002)
    lines = text.strip().splitlines()
    return Ended(os.waitstatus_to_exitcode(status), lines[-1] if lines else "", text)


def run(arguments: list[str], **options: Any) -> Ended:
    """Start a run, and wait for its end."""
    return finish(*start(arguments, **options))


# -- strikes ----------------------------------------------------------------------------------------------


def kill() -> None:
    """Kill the process, like `kill -9`, or the system when memory is exhausted."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Interrupt the process, like Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """Terminate the process, like a scheduler."""
    os.kill(os.getpid(), signal.SIGTERM)


def hang_up() -> None:
    """Hang up, like a terminal that is closed."""
    os.kill(os.getpid(), signal.SIGHUP)


def disk_full() -> None:
    """The call fails with the error that the device is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_permission() -> None:
    """The call fails because permission is denied."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def disk_error() -> None:
    """The call fails with an input or output error."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


STRIKES: dict[str, Strike] = {
    fault.__name__: fault for fault in (kill, interrupt, terminate, hang_up, disk_full, no_permission, disk_error)
}


FAILING = {"disk_full", "no_permission", "disk_error"}


# -- what must be so afterwards ---------------------------------------------------------------------------


@dataclass
class Judge:
    """Compares the state after a fault with the allowed states."""

    scene: Scene

    def __post_init__(self) -> None:
        scene = self.scene
        scene.reset()
        self.first_names = listing(scene.root)
        self.first = raw(scene.root, self.first_names)
        self.old = digest_of(scene.root / scene.out)
        ended = run(scene.arguments)
        self.expect(ended.code == 0, ended, "the reference run fails")
        self.new = digest_of(scene.root / scene.out)
        self.new_names = listing(scene.root)
        self.expect(bool(self.new) and self.new != self.old, ended, "the reference run makes nothing")

    def expect(self, right: bool, ended: Ended, text: str) -> None:
        """Raise `Broken` unless a condition holds."""
        if not right:
            raise Broken(
                f"{self.scene.name}: {text} (exit {ended.code}, {ended.last!r}, {sorted(listing(self.scene.root))})"
            )

    def judge(self, ended: Ended, failing: bool = False) -> str:
        """Compare the state after a fault with the allowed states; returns the state of OUT."""
        scene = self.scene
        killed = ended.code == -signal.SIGKILL
        own = {name: data for name, data in self.first.items() if name.startswith(Path(scene.source).stem)}
        self.expect(raw(scene.root, set(own)) == own, ended, "the source is harmed")
        self.expect("Traceback" not in ended.text, ended, f"a traceback: {ended.text[-1500:]}")
        try:
            now = digest_of(scene.root / scene.out)
        except Exception as problem:
            raise Broken(f"{scene.name}: OUT is no whole model: {problem} ({ended.last})") from problem
        self.expect(now in (self.old, self.new), ended, "OUT is neither what it was nor what it should be")
        if not killed:
            # The commit is done for the model, but not for the files beside it: it cannot be undone.
            complete = (
                bool(scene.plan) and now == self.new and ended.code == 2 and "is written and complete" in ended.last
            )
            right = (ended.code == 0) == (now == self.new)
            self.expect(right or complete, ended, "the exit code does not say what became of OUT")
            self.expect(ended.code in (0, 2, 3, 4, 130), ended, "an exit code without a meaning")
            self.expect(ended.code == 0 or ended.last.startswith("error: "), ended, "no last line that says why")
            extra = listing(scene.root) ^ (self.new_names if now == self.new else self.first_names)
            extra -= {scene.plan} if complete else set()
            # If the failed call was part of cleaning up after the commit, the next run cleans up.
            left = all(".partial" in name or name.endswith(".data") for name in extra)
            self.expect(not extra or (failing and ended.code == 0 and left), ended, "leftovers")
        again = run(scene.arguments)
        stands = now == self.new and (scene.root / scene.out).is_dir()  # a folder is not replaced
        self.expect(again.code == (2 if stands else 0), again, f"the next run ends otherwise, after {ended.last!r}")
        self.expect(digest_of(scene.root / scene.out) == self.new, again, "the next run makes something else")
        left = listing(scene.root)
        data = [name for name in left - self.first_names if name.endswith(".data") and "/" not in name]
        self.expect(stands or not [name for name in left if ".partial" in name], again, "the next run reclaims nothing")
        self.expect(len(data) <= 1, again, "data files that no model has")
        return "new" if now == self.new else "old"


def count_calls(scene: Scene) -> int:
    """The number of calls to the file system in a run."""
    scene.reset()
    counter = scene.root.parent / "calls"
    ended = run(scene.arguments, counter=counter)
    if ended.code != 0:
        raise Broken(f"{scene.name}: {ended.text}")
    return int(counter.read_text())


def at_every_call(
    scene: Scene, strikes: dict[str, Strike], every: int = 1, offset: int = 0
) -> Iterator[tuple[str, str]]:
    """Strike before each call, or each n-th call, in each way; yields (strike, state of OUT)."""
    judge = Judge(scene)
    for at in range(offset, count_calls(scene) + 1, every):
        for name, strike in strikes.items():
            scene.reset()
            try:
                yield name, judge.judge(run(scene.arguments, at=at, strike=strike), failing=name in FAILING)
            except Broken as problem:
                raise Broken(f"{name} before call {at}: {problem}") from problem


def at_random_moments(scene: Scene, number: int, kills: int, seed: int = 0) -> Iterator[str]:
    """Send a signal after a random time; yields the state of OUT."""
    judge = Judge(scene)
    draw = random.Random(seed)
    scene.reset()
    begun = time.monotonic()
    run(scene.arguments)
    usual = time.monotonic() - begun
    for _ in range(kills):
        scene.reset()
        child, stderr = start(scene.arguments)
        time.sleep(draw.uniform(0.0, 1.3 * usual))
        with suppress(ProcessLookupError):
            os.kill(child, number)
        yield judge.judge(finish(child, stderr))


def two_at_once(scene: Scene, times: int) -> Iterator[str]:
    """Two runs write the same OUT: at least one succeeds, a failed one says why, and OUT is complete."""
    judge = Judge(scene)
    for _ in range(times):
        scene.reset()
        runs = [start(scene.arguments) for _ in range(2)]
        ends = [finish(*run) for run in runs]
        codes = sorted(end.code for end in ends)
        judge.expect(codes in ([0, 0], [0, 2]), ends[0], f"two runs end with {codes}: {ends[1].last}")
        for end in ends:
            says_why = "another run" in end.last or "exists already" in end.last or "another" in end.last
            judge.expect(end.code == 0 or says_why, end, "the one that gives way does not say why")
        judge.expect(digest_of(scene.root / scene.out) == judge.new, ends[0], "OUT is not the whole grown model")
        judge.expect(not [n for n in listing(scene.root) if ".partial" in n], ends[0], "leftovers")
        yield "both" if codes == [0, 0] else "one"


def source_changes(scene: Scene, every: int = 4) -> Iterator[str]:
    """The source is touched, lengthened or replaced during reading: the run is refused, unless all of it was read."""
    judge = Judge(scene)
    source = scene.root / scene.source
    file = source if source.is_file() else source / "onnx" / "model.onnx"
    data = file.with_name(f"{file.name}.data")
    victim = data if data.exists() else file

    def touched() -> None:
        os.utime(victim, ns=(1, 1))

    def lengthened() -> None:
        with victim.open("ab") as stream:
            stream.write(b"\0")

    def replaced() -> None:
        copy = victim.with_name("copy")
        shutil.copy2(victim, copy)
        os.replace(copy, victim)

    for change in (touched, lengthened, replaced):
        for at in range(2, count_calls(scene), every):
            scene.reset()
            struck: list[int] = []

            def strike(change: Strike = change, struck: list[int] = struck) -> None:
                if not struck:
                    struck.append(1)
                    change()

            ended = run(scene.arguments, at=at, strike=strike)
            now = digest_of(scene.root / scene.out)
            judge.expect(ended.code in (0, 4), ended, f"{change.__name__}: another exit code")
            judge.expect(
                (ended.code == 0) == (now == judge.new), ended, f"{change.__name__}: OUT does not fit the exit code"
            )
            judge.expect(
                not [n for n in listing(scene.root) if ".partial" in n], ended, f"{change.__name__}: leftovers"
            )
            yield "refused" if ended.code == 4 else "too late, or before it was read"


# -- limits -----------------------------------------------------------------------------------------------


def file_size_limits(scene: Scene, steps: int = 12) -> Iterator[str]:
    """Limit the size of files (RLIMIT_FSIZE), from nothing to enough."""
    judge = Judge(scene)
    largest = max((scene.root / name).stat().st_size for name in judge.new_names if (scene.root / name).is_file())
    for step in range(steps + 1):
        limit = (largest + 4096) * step // steps
        scene.reset()
        ended = run(
            scene.arguments, first=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        yield judge.judge(ended)


def mounted(folder: Path, kilobytes: int) -> bool:
    """Mount a small file system at a folder; False if that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None and not subprocess.run(command, capture_output=True, check=False).returncode
    )


def unmount(folder: Path) -> None:
    """Unmount the file system."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def full_disks(folder: Path, split: bool, sizes: range) -> Iterator[str]:
    """OUT is on a file system that is too small, in several sizes; "skipped" if none can be mounted."""
    name = "split.onnx" if split else "small.onnx"
    make_model(folder / name, split=split)
    source = raw(folder, listing(folder))
    for kilobytes in sizes:
        disk = folder / "disk"
        if not mounted(disk, kilobytes):
            yield "skipped"
            return
        try:
            out = disk / "big.onnx"
            arguments = ["expand", str(folder / name), "-o", str(out), "--factor", "2", "--no-validate"]
            ended = run(arguments)
            left = listing(disk)
            whole = ended.code == 0 and bool(digest_of(out))
            if not (whole or (ended.code == 2 and not left and ended.last.startswith("error: "))):
                raise Broken(f"a disk of {kilobytes} kB: exit {ended.code}, {ended.last!r}, left {left}")
            if raw(folder, set(source)) != source:
                raise Broken("the source is harmed")
            yield "written" if whole else "refused"
        finally:
            unmount(disk)


def without_permission(folder: Path) -> Iterator[str]:
    """The user may not read the source, or may not write OUT; "skipped" if the user cannot be changed."""
    if os.geteuid() != 0:
        yield "skipped"
        return
    make_model(folder / "small.onnx", split=False)
    folder.chmod(0o755)
    for parent in folder.parents:
        if not parent.stat().st_mode & 0o001:
            yield "skipped"
            return

    def nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    (folder / "open").mkdir(mode=0o777)
    (folder / "open").chmod(0o777)
    cases = [("small.onnx", "closed.onnx", 0o644, 2), ("small.onnx", "open/big.onnx", 0o600, 4),
             ("small.onnx", "open/big.onnx", 0o644, 0)]  # fmt: skip
    for source, out, mode, code in cases:
        (folder / source).chmod(mode)
        before = listing(folder)
        arguments = ["expand", str(folder / source), "-o", str(folder / out), "--factor", "2", "--no-validate"]
        ended = run(arguments, first=nobody)
        if ended.code != code or (code and listing(folder) != before):
            raise Broken(f"{source} -> {out}: exit {ended.code} instead of {code}: {ended.last!r}")
        yield f"exit {code}"


# -- all of it --------------------------------------------------------------------------------------------


def main() -> int:
    """Run everything, and print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="strike before every n-th call only")
    parser.add_argument("--kills", type=int, default=200, help="kills at random moments")
    parser.add_argument("--scene", help="one way to publish alone, such as 'a pair'; or 'limits', which are not of one")
    arguments = parser.parse_args()
    import hyperclone_onnx.folders
    import hyperclone_onnx.reports.expansion
    import hyperclone_onnx.reports.folder  # noqa: F401  before the copies are made

    failed = 0

    def part(name: str, outcomes: Iterator[Any]) -> None:
        nonlocal failed
        counts: Counter[Any] = Counter()
        begun = time.monotonic()
        try:
            for outcome in outcomes:
                counts[outcome] += 1
        except Broken as problem:
            failed += 1
            print(f"BROKEN {name}: {problem}")
        shown = ", ".join(f"{' '.join(k) if isinstance(k, tuple) else k} {n}" for k, n in sorted(counts.items()))
        print(f"{name}: {sum(counts.values())} faults in {time.monotonic() - begun:.0f} s ({shown})", flush=True)

    with tempfile.TemporaryDirectory(prefix="hyperclone-faults.") as name:
        folder = Path(name)
        every = scenes(folder)
        share = -(-arguments.kills // len(every))
        chosen = [scene for scene in every if arguments.scene in (None, scene.name)]
        for scene in chosen:
            part(f"{scene.name}, struck before each call", at_every_call(scene, STRIKES, arguments.every))
        for scene in chosen:
            part(f"{scene.name}, killed at random", at_random_moments(scene, signal.SIGKILL, share))
            part(f"{scene.name}, interrupted at random", at_random_moments(scene, signal.SIGINT, 10))
            part(f"{scene.name}, terminated at random", at_random_moments(scene, signal.SIGTERM, 10))
            part(f"{scene.name}, two at once", two_at_once(scene, 10))
            part(f"{scene.name}, file size limits", file_size_limits(scene))
        for scene in chosen:
            if scene in (every[0], every[4], every[8]):
                part(f"{scene.name}, source changed", source_changes(scene))
        if arguments.scene not in (None, "limits"):
            return 1 if failed else 0
        for number, split in enumerate((False, True)):
            (folder / f"full{number}").mkdir()
            part(
                f"full disks{', a pair' if split else ''}",
                full_disks(folder / f"full{number}", split, range(4, 120, 4)),
            )
        with tempfile.TemporaryDirectory(
            prefix="hyperclone-faults.", dir="/tmp" if Path("/tmp").is_dir() else None
        ) as other:
            part("permissions", without_permission(Path(other)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
