"""Shared by the examples: bytes to train on, batches of bytes, and the curve of losses that is drawn at the end."""

from __future__ import annotations

import argparse
import csv
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx"
Array = np.ndarray[Any, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--steps", type=int, default=50, help="the number of all steps, also before an interruption")
    result.add_argument("--batch", type=int, default=8)
    result.add_argument("--length", type=int, default=128)
    result.add_argument("--rate", type=float, default=3e-4)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--output", type=Path, default=Path("out"), help="the folder to write into")
    result.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    return result


def arguments(description: str | None) -> argparse.Namespace:
    """A parser for an example that takes a model."""
    with_model = parser(description)
    with_model.add_argument(
        "model", nargs="?", type=Path, help="an ONNX model over bytes (default: tiny_gpt grown by 2)"
    )
    options = with_model.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        options.model = grown(options.output)
    return options


def grown(folder: Path) -> Path:
    """The committed model, twice as wide."""
    from hyperclone_onnx import expand

    path = folder / "tiny_gpt_big.onnx"
    if not path.exists():
        expand(SMALL, path, 2, check=False)
    return path


def corpus() -> Array:
    """Some of Python's own standard library, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\0".join(file.read_bytes() for file in files), dtype=np.uint8)


def batches(options: argparse.Namespace, first: int = 0) -> Iterator[tuple[Array, Array]]:
    """Random windows from step `first` on: (bytes, the byte that follows each)."""
    data = corpus()
    for step in range(first, options.steps):
        rng = np.random.default_rng([options.seed, step])
        starts = rng.integers(0, len(data) - options.length - 1, (options.batch, 1))
        window = data[starts + np.arange(options.length + 1)].astype(np.int64)
        yield window[:, :-1], window[:, 1:]


def progress(steps: Iterable[Any], total: int, show: bool = True) -> Iterator[Any]:
    """A progress bar."""
    from rich.progress import track

    yield from track(steps, "training", total=total, disable=not show)


def write_losses(losses: Sequence[float], path: Path) -> None:
    """Write the loss of each step as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses)])


def read_losses(path: Path) -> list[float]:
    """Read the file that `write_losses` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def draw_losses(losses: Sequence[float], path: Path) -> None:
    """Print the first and the last loss; write all losses as CSV, and as a picture if matplotlib is installed."""
    write_losses(losses, path)
    tenth = max(1, len(losses) // 10)
    first, last = (sum(some) / tenth for some in (losses[:tenth], losses[-tenth:]))
    print(f"loss {first:.3f} -> {last:.3f} nats per byte (means of {tenth} steps)")
    try:
        import matplotlib as mpl
    except ImportError:
        print("pip install matplotlib draws the curve, too")
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    smooth = np.convolve(np.pad(losses, tenth // 2, mode="edge"), np.ones(tenth) / tenth, mode="valid")[: len(losses)]
    axes.plot(losses, linewidth=0.8, alpha=0.5, label="each step")
    axes.plot(smooth, label=f"mean of {tenth}")
    axes.set(xlabel="step", ylabel="nats per byte", title=path.stem.removesuffix("_losses"))
    axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
