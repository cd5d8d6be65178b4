"""What both examples share: bytes to train on, batches of them, and what is written at the end."""

from __future__ import annotations

import argparse
import csv
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx"
Array = np.ndarray[Any, Any]


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="an ONNX model over bytes (default: tiny_gpt grown by 2)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out"), help="the folder to write into")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        options.model = grown(options.output)
    return options


def grown(folder: Path) -> Path:
    """The committed model, twice as wide."""
    from hyperclone_onnx import expand

    path = folder / "tiny_gpt_big.onnx"
    expand(SMALL, path, 2, check=False)
    return path


def corpus() -> Array:
    """Some of Python's own standard library, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\0".join(file.read_bytes() for file in files), dtype=np.uint8)


def batches(options: argparse.Namespace) -> Iterator[tuple[Array, Array]]:
    """Random windows: (bytes, the byte that follows each)."""
    data, rng = corpus(), np.random.default_rng(options.seed)
    for _ in range(options.steps):
        starts = rng.integers(0, len(data) - options.length - 1, (options.batch, 1))
        window = data[starts + np.arange(options.length + 1)].astype(np.int64)
        yield window[:, :-1], window[:, 1:]


def write_losses(losses: Sequence[float], path: Path) -> None:
    """The loss at both ends, that of each step as CSV, and as a picture where matplotlib is installed."""
    tenth = max(1, len(losses) // 10)
    first, last = (sum(some) / tenth for some in (losses[:tenth], losses[-tenth:]))
    print(f"loss {first:.3f} -> {last:.3f} nats per byte (means of {tenth} steps)")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses)])
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    plt.plot(losses)
    plt.xlabel("step")
    plt.ylabel("nats per byte")
    plt.savefig(path.with_suffix(".png"), dpi=120)
