"""Measures time and memory of `expand`, compared with `cat` of the same bytes, on a Llama with random weights.

    python benchmarks/expand.py [--pairs 5] [--size 1] [--sizes 0.25 0.5 1] [--larger 4] [--write] [--folder /var/tmp]
    python benchmarks/expand.py --factor 1.5 --sizes [--write]

It builds a model of 418 M float32 parameters (times --size; 1.7 GB) and doubles it (5.9 GB), or grows it by
--factor. `expand` and `cat` of the result run in pairs, and each of them runs first in every other pair. The result
is the median of the ratios of all pairs, so that other load on the machine slows both. Both start in the same
state: their input is in the page cache, their output does not exist, and the disk is synchronised and had a few
seconds of rest. The peak memory is the largest resident set of any process (ru_maxrss), with the file pages that it
maps. Modules are compiled before, as pip does it. --larger also measures the memory of models that are larger by
this factor: one in depth and vocabulary, and one in width. All files are removed in the end. --write puts the
tables and the plot into docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pages import put  # noqa: E402

from models.large import SMALL, Sizes, scaled, write  # noqa: E402

PLOT = ROOT / "docs" / "benchmarks.png"
STRATEGIES = ("symmetric", "noisy-symmetric")
TARGETS = {"symmetric": 0.8, "noisy-symmetric": 1.2}
UNEVEN_TARGETS = {"symmetric": 1.2, "noisy-symmetric": 1.6}
"""Where some indices are repeated once more than others."""
MODES: dict[str, tuple[str, ...]] = {
    "expand --no-validate": ("--no-validate",),
    "expand --validate algebraic": ("--validate", "algebraic"),
    "expand --validate full": ("--validate", "full"),
}

REST = 2.0
"""The seconds of rest before a run. After gigabytes are deleted, the disk stays busy for a while."""


@dataclass(frozen=True)
class Run:
    """One process: its seconds on the clock, the processor seconds of all its threads, and its peak memory in MB."""

    seconds: float
    cpu: float
    peak: float


@dataclass(frozen=True)
class Model:
    """A model to grow, and the paths of the results."""

    path: Path
    parameters: int
    factor: str = "2"

    @property
    def targets(self) -> dict[str, float]:
        return TARGETS if float(self.factor).is_integer() else UNEVEN_TARGETS

    @property
    def big(self) -> Path:
        return self.path.with_name("big.onnx")

    @property
    def data(self) -> Path:
        """The file that holds the grown weights."""
        beside = self.big.with_name(f"{self.big.name}.data")
        return beside if beside.exists() else self.big

    @property
    def result(self) -> Path:
        """The grown weights that `cat` copies."""
        return self.path.with_name("result")

    def clear(self) -> None:
        for file in self.path.parent.glob("big.onnx*"):
            file.unlink()

    def settle(self) -> None:
        """Bring the machine into the state in which every run starts."""
        self.clear()
        for file in (self.path.with_name(f"{self.path.name}.data"), self.result):
            if file.exists():
                subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
        os.sync()
        time.sleep(REST)


HELPER = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - begin
print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, status]), file=sys.stderr)
"""
"""Runs a command from a small process, because a new process inherits the peak memory of its parent."""


def measured(command: Sequence[str | Path], folder: Path, output: Any = subprocess.DEVNULL) -> Run:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", HELPER, *map(str, command)],
        stdout=output, stderr=subprocess.PIPE, cwd=ROOT, env=environment, check=True, text=True,
    )  # fmt: skip
    *said, last = ended.stderr.splitlines()
    seconds, cpu, peak, status = json.loads(last)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {said[-1:]}")
    return Run(seconds, cpu, peak / (2**20 if sys.platform == "darwin" else 2**10))


def expand(model: Model, strategy: str, *options: str) -> Run:
    model.settle()
    command = [sys.executable, "-m", "hyperclone_onnx", "expand", model.path, "--factor", model.factor, "-o", model.big]
    return measured([*command, "--strategy", strategy, *options, "--device", "cpu", "--json"], model.path.parent)


def cat(model: Model) -> Run:
    model.settle()
    copy = model.path.with_name("copy")
    with copy.open("wb") as file:
        run = measured(["cat", model.result], model.path.parent, file)
    copy.unlink()
    return run


def build(folder: Path, sizes: Sizes, name: str, factor: str = "2") -> Model:
    path = folder / f"{name}.onnx"
    return Model(path, write(sizes, path), factor)


def prepare(folder: Path, size: float, factor: str = "2") -> Model:
    """Build a model, and the grown weights that `cat` copies."""
    needed = 4 * 9 * 418e6 * size
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"{folder}: a model of size {size:g} needs {needed / 1e9:.0f} GB while it is measured")
    model = build(folder, scaled(size), f"{size:g}", factor)
    expand(model, "symmetric", "--no-validate")
    model.data.rename(model.result)
    return model


def remove(model: Model) -> None:
    model.clear()
    model.result.unlink(missing_ok=True)
    for file in model.path.parent.glob(f"{model.path.name}*"):
        file.unlink()


def pairs(model: Model, count: int) -> dict[str, list[tuple[Run, Run]]]:
    runs: dict[str, list[tuple[Run, Run]]] = {strategy: [] for strategy in STRATEGIES}
    for number in range(count):
        for strategy in STRATEGIES:
            copied = cat(model) if number % 2 else None
            grown = expand(model, strategy, "--no-validate")
            copied = copied or cat(model)
            runs[strategy].append((grown, copied))
            say(f"{strategy}: expand {grown.seconds:.2f} s, cat {copied.seconds:.2f} s")
    return runs


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def against_cat(model: Model, count: int) -> str:
    rows = [["strategy", "expand --no-validate", "cat of the result", "ratio, median (all)", "target", "peak memory"]]
    for strategy, runs in pairs(model, count).items():
        ratios = [grown.seconds / copied.seconds for grown, copied in runs]
        rows.append(
            [
                strategy,
                f"{statistics.median(grown.seconds for grown, _ in runs):.2f} s",
                f"{statistics.median(copied.seconds for _, copied in runs):.2f} s",
                f"**{statistics.median(ratios):.2f}** ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
                f"{model.targets[strategy]:.1f}",
                f"{max(grown.peak for grown, _ in runs):.0f} MB",
            ]
        )
    return table(rows)


def by_mode(model: Model) -> str:
    rows = [["command", "wall", "processor", "peak memory"]]
    for name, options in MODES.items():
        run = expand(model, "noisy-symmetric", *options)
        say(f"{name}: {run.seconds:.2f} s, {run.peak:.0f} MB")
        rows.append([f"`{name}`", f"{run.seconds:.2f} s", f"{run.cpu:.2f} s", f"{run.peak:.0f} MB"])
    return table(rows)


def by_size(folder: Path, sizes: Sequence[float], count: int) -> tuple[str, list[tuple[int, dict[str, float]]]]:
    rows = [["parameters", "grown", *STRATEGIES, "cat of the result", "peak memory"]]
    points: list[tuple[int, dict[str, float]]] = []
    for size in sizes:
        model = prepare(folder, size)
        by_strategy = pairs(model, count)
        seconds = {name: statistics.median(grown.seconds for grown, _ in runs) for name, runs in by_strategy.items()}
        seconds["cat"] = statistics.median(copied.seconds for runs in by_strategy.values() for _, copied in runs)
        peak = max(grown.peak for runs in by_strategy.values() for grown, _ in runs)
        grown_bytes = model.result.stat().st_size
        remove(model)
        points.append((model.parameters, seconds))
        times = [f"{seconds[name]:.2f} s" for name in (*STRATEGIES, "cat")]
        rows.append([f"{model.parameters / 1e6:.0f} M", f"{grown_bytes / 1e9:.2f} GB", *times, f"{peak:.0f} MB"])
    return table(rows), points


def when_larger(folder: Path, times: float) -> str:
    """A table of the peak memory of the model, and of two models that are `times` as large."""
    wide = math.sqrt(times)
    wider = Sizes(
        hidden=round(SMALL.hidden * wide),
        heads=round(SMALL.heads * wide),
        kv_heads=round(SMALL.kv_heads * wide),
        ffn=round(SMALL.ffn * wide),
        vocab=round(SMALL.vocab * wide),
    )
    rows = [["model", "parameters", "grown", *(f"peak memory, {strategy}" for strategy in STRATEGIES)]]
    for name, sizes in (("1", SMALL), (f"{times:g}, deeper", scaled(times)), (f"{times:g}, wider", wider)):
        model = build(folder, sizes, "larger")
        peaks = [expand(model, strategy, "--no-validate").peak for strategy in STRATEGIES]
        say(f"{name}: {peaks}")
        grown = model.data.stat().st_size
        remove(model)
        cells = [f"{model.parameters / 1e6:.0f} M", f"{grown / 1e9:.1f} GB", *(f"{peak:.0f} MB" for peak in peaks)]
        rows.append([name, *cells])
    return table(rows)


def plot(points: list[tuple[int, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, style in (("symmetric", "o-"), ("noisy-symmetric", "s-"), ("cat", "^--")):
        label = "cat of the result" if name == "cat" else f"expand --no-validate, {name}"
        axes.plot([count / 1e6 for count, _ in points], [seconds[name] for _, seconds in points], style, label=label)
    axes.set_xlabel("parameters of the source (millions, float32)")
    axes.set_ylabel("seconds (median)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return f"{len(os.sched_getaffinity(0))} cores ({name}), {memory:.0f} GB; load {load:.1f} when it began"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=float, default=1.0, help="size of the model that is compared with cat")
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.25, 0.5, 1.0], help="sizes of the plotted models")
    parser.add_argument("--factor", default="2", help="the growth of the model that is compared with cat")
    parser.add_argument("--larger", type=float, help="also measure the memory of models that are this times as large")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--write", action="store_true", help="put the result into docs/")
    options = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory(prefix="expand-benchmark.", dir=options.folder) as name:
        folder = Path(name)
        model = prepare(folder, options.size, options.factor)
        say(f"{model.parameters:,} parameters")
        first = against_cat(model, options.pairs)
        modes = by_mode(model)
        remove(model)
        sizes, points = by_size(folder, options.sizes, max(1, options.pairs // 2 + 1)) if options.sizes else ("", [])
        doubled = options.factor == "2"
        title = f"{model.parameters / 1e6:.0f} M parameters, {'doubled' if doubled else f'grown x{options.factor}'}"
        parts = [f"Measured on {where}.", f"### {title}", first, modes]
        if sizes:
            parts += ["### By size", sizes, "![Seconds by size](benchmarks.png)"]
        if options.larger:
            parts += ["### Memory", when_larger(folder, options.larger)]
        text = "\n\n".join(parts)
        print(text)
        if options.write:
            put("benchmarks.md", "expand" if doubled else f"expand x{options.factor}", text)
            if points:
                plot(points, PLOT)
        elif points:
            picture = Path("out") / "expand-benchmark.png"
            picture.parent.mkdir(exist_ok=True)
            plot(points, picture)
            print(json.dumps(points))


if __name__ == "__main__":
    main()
