"""The mutation fuzzer: a randomly changed graph must be refused in one line, or grow and compute the same.

python -m fuzz.mutate --cases 10000 --workers 1       # the number of a case is its seed
python -m fuzz.mutate --case 1234 --keep .            # repeat one case, and keep its files
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fuzz.mutations import mutate, pick
from fuzz.oracle import TOLERANCE, Unrun, compare, run_source, sensitivity
from fuzz.seeds import write_beginnings, write_zoo
from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, HypercloneError, Refused
from hyperclone_onnx.expansion.expanding import expand
from hyperclone_onnx.plan.strategies import Strategy

LIMIT = 40.0
"""A case that takes more processor seconds than this hangs. On the clock it may take ten times as long."""

MEMORY = 6 << 30
"""The most bytes of address space of a worker."""
WHOLE = 0.1
"""The fraction of cases that change a whole graph instead of a beginning."""

CONDITION = 30.0
"""The allowed difference of a grown model, divided by the effect of rounding the source's weights."""

SOURCE, GROWN = "running the source", "running the grown model"

BAD = ("WRONG", "CRASH", "HANG", "KILLED")


def options_of(rng: np.random.Generator) -> dict[str, Any]:
    """Random arguments of `expand` for a case."""
    requests: list[dict[str, int]] = [{}, {}, {}, {"head_dim": 2}, {"ffn": 3}, {"heads": 1}, {"hidden": 1, "ffn": 2}]
    return {
        "factor": int(rng.choice([2, 2, 2, 3])),
        "requests": requests[int(rng.integers(len(requests)))],
        "strategy": Strategy(str(rng.choice(["symmetric", "symmetric", "noisy-symmetric", "diagonal"]))),
        "keep_interface": bool(rng.random() < 0.5),
        "untie": bool(rng.random() < 0.2),
        "check": False,
    }


Notify = Callable[[str], object]
"""Called with the next stage of a case."""

Seeds = tuple[list[Path], list[Path]]
"""(beginnings of graphs, whole graphs)"""


def run_case(number: int, seeds: Seeds, folder: Path, notify: Notify = lambda _: None) -> tuple[str, str]:
    """Change and grow one graph; returns (verdict, reason)."""
    rng = np.random.default_rng([5, number])
    seed = pick(seeds[rng.random() < WHOLE], rng)
    model = onnx.load(seed)
    changes = mutate(model, rng)
    options = options_of(rng)
    case = f"{seed.stem} {'+'.join(changes)} {options['factor']} {options['requests']}"
    small, big = folder / "small.onnx", folder / "big.onnx"
    big.unlink(missing_ok=True)
    try:
        small.write_bytes(model.SerializeToString())
    except ValueError as problem:
        return "unwritten", f"{case}: {problem}"
    try:
        try:
            expand(small, big, **options)
        except BadRequest:  # the graph does not have the requested role
            options["requests"] = {}
            expand(small, big, **options)
    except (BadModel, BadRequest, Refused, CannotWrite) as problem:
        if "\n" in str(problem).strip() or big.exists():
            return "CRASH", f"{case}: a refusal of several lines, or one that leaves a model: {problem!r}"
        return f"refused {problem.exit_code}", f"{case}: {problem}"
    except HypercloneError as problem:
        return "CRASH", f"{case}: {problem!r}"
    except MemoryError:
        return "CRASH", f"{case}: no memory: {traceback.format_exc(limit=-3)}"
    except Exception:
        return "CRASH", f"{case}: {traceback.format_exc(limit=-6)}"
    notify(SOURCE)
    try:
        ran = run_source(small, number)
    except Unrun as problem:
        return "source does not run", f"{case}: {problem}"
    notify(GROWN)
    if options["strategy"].name != "symmetric" and not all(
        np.isfinite(output).all() for _, outputs in ran for output in outputs if output.dtype.kind == "f"
    ):
        return "infinite", case  # infinity times a share of 0, or the sum of both infinities, is not a number
    difference = compare(big, ran)
    if difference and "does not run" not in difference:
        moves = sensitivity(small, ran)
        if moves > TOLERANCE / CONDITION:
            return (
                "badly conditioned",
                f"{case} {options}: {difference}; a rounding of the weights moves it by {moves:.1e}",
            )
    return ("WRONG", f"{case} {options}: {difference}") if difference else ("equal", case)


def _serve(pipe: Connection, seeds: Seeds) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    with tempfile.TemporaryDirectory(prefix="hyperclone-fuzz.") as folder:
        while (number := pipe.recv()) is not None:
            pipe.send(run_case(number, seeds, Path(folder), pipe.send))


class Worker:
    """A process that runs cases. It is replaced if it hangs or dies."""

    def __init__(self, seeds: Seeds) -> None:
        self.seeds = seeds
        self.start()

    def start(self) -> None:
        """Start a new process."""
        context = multiprocessing.get_context("fork")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, self.seeds), daemon=True)
        self.process.start()
        child_end.close()
        self.number: int | None = None

    def give(self, number: int) -> None:
        """Start a case."""
        self.number, self.since, self.used = number, time.monotonic(), self._processor_seconds()
        self.stage = "growing"
        self.pipe.send(number)

    def take(self) -> tuple[str, str] | None:
        """The (verdict, reason) of the case; None while it runs."""
        try:
            while self.pipe.poll(0.01):
                message = self.pipe.recv()
                if not isinstance(message, str):
                    return message  # type: ignore[no-any-return]
                self.stage = message
        except (EOFError, ConnectionResetError):
            self.process.join()
            code, stage = self.process.exitcode, self.stage
            self.start()
            # ONNX Runtime aborts the process on some graphs. If it does so on the source, growth is not the cause.
            end = "source ends ONNX Runtime" if stage == SOURCE else "KILLED"
            return end, f"{stage}: the process ended with {code}"
        if self._processor_seconds() - self.used > LIMIT or time.monotonic() - self.since > 10 * LIMIT:
            self.process.kill()
            self.process.join()
            self.start()
            return "HANG", f"more than {LIMIT:.0f} s"
        return None

    def _processor_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Run cases; returns 1 if one of them was wrong, crashed or hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=Path, help="a folder of graphs; the zoo's by default")
    parser.add_argument("--beginnings", type=Path, help="a folder for beginnings of them; made where it is empty")
    parser.add_argument("--case", type=int, help="run this one here")
    parser.add_argument("--keep", type=Path, default=Path(), help="where its files go")
    parser.add_argument("--log", type=Path, help="a line of JSON for each case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hyperclone-zoo.") as folder:
        zoo = write_zoo(arguments.seeds or Path(folder))
        seeds = write_beginnings(zoo, arguments.beginnings or Path(folder) / "beginnings"), zoo
        if arguments.case is not None:
            print(*run_case(arguments.case, seeds, arguments.keep), sep="\n")
            return 0
        return campaign(arguments, seeds)


def campaign(arguments: argparse.Namespace, seeds: Seeds) -> int:
    """Run the cases with some workers, and print the numbers of verdicts."""
    begun = time.monotonic()
    verdicts: Counter[str] = Counter()
    waiting = iter(range(arguments.first, arguments.first + arguments.cases))
    workers = [Worker(seeds) for _ in range(arguments.workers)]
    log = arguments.log.open("a") if arguments.log else None
    busy = list(workers)
    while busy:
        for worker in list(busy):
            running = worker.number
            if running is not None:
                ended = worker.take()
                if ended is None:
                    continue
                verdicts[ended[0]] += 1
                if ended[0] in BAD:
                    print(f"{ended[0]} case {running}: {ended[1]}", flush=True)
                if log:
                    print(json.dumps([running, *ended]), file=log, flush=True)
            number = next(waiting, None) if time.monotonic() - begun < 60 * arguments.minutes else None
            if number is None:
                worker.pipe.send(None)
                busy.remove(worker)
            else:
                worker.give(number)
    took = time.monotonic() - begun
    print(
        f"{sum(verdicts.values())} graphs in {took:.0f} s: " + ", ".join(f"{n} {v}" for v, n in verdicts.most_common())
    )
    return 1 if any(verdicts[verdict] for verdict in BAD) else 0


if __name__ == "__main__":
    raise SystemExit(main())
