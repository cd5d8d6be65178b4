"""Measures how far off the forecast of a larger model is. The fit sees no run of a larger model.

    python benchmarks/forecast.py [--output DIR] [--workers N] [--steps N] [--write]

It trains models of widths 16, 32 and 48 from random weights, for one, two and four times N steps and with two seeds.
`hyperclone-onnx forecast` fits its law to their curves. Then models of widths 64 and 128 are trained for two and four
times N steps, and their losses are compared with the forecast. Learning rates fall with the width. After an
interruption, the same command continues. It takes about half an hour on two cores, and needs torch and scipy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from growing.findings import write_random  # noqa: E402
from growing.network import shape  # noqa: E402
from growing.progress import progress  # noqa: E402
from growing.runs import Lab, Random, Run, Settings  # noqa: E402
from growing.tasks import Recipe  # noqa: E402
from pages import put  # noqa: E402

from hyperclone_onnx.forecasting.answers import Estimate, Target, forecast  # noqa: E402
from hyperclone_onnx.forecasting.curves import choose  # noqa: E402
from hyperclone_onnx.forecasting.numbers import written  # noqa: E402
from hyperclone_onnx.forecasting.reading import Given, read_curves  # noqa: E402

SMALL, LARGE = (16, 32, 48), (64, 128)
"""The widths whose curves are given, and those that are forecast."""
LENGTHS, FORECAST_LENGTHS = (1, 2, 4), (2, 4)
RATE, WIDTH = 1.6e-2, 32
"""The best rate of width 32. Other widths have this rate times the ratio of the widths."""
SEEDS = (0, 1)
SAMPLES = 400


@dataclass(frozen=True)
class Row:
    """A forecast and the losses of the runs that it is compared with."""

    width: int
    weights: int
    read: float
    """The bytes that the model reads."""
    forecast: Estimate
    losses: tuple[float, ...]
    """The final loss of each seed."""

    @property
    def measured(self) -> float:
        """The mean of the final losses."""
        return sum(self.losses) / len(self.losses)

    @property
    def error(self) -> float:
        """The relative error of the forecast."""
        return self.forecast.value / self.measured - 1.0


def run(width: int, steps: int, seed: int) -> Run:
    """A training from random weights."""
    return Run(Random(shape(width), seed), Recipe(RATE * WIDTH / width), steps, seed)


def rows(lab: Lab, steps: int, folder: Path) -> Iterator[Row]:
    """Train the small models, forecast, train the large models, and compare."""
    small = lab.do([run(width, part * steps, seed) for width in SMALL for part in LENGTHS for seed in SEEDS], "small")
    write_random(small, lab, folder / "random.csv")
    curves = read_curves(str(folder / "random.csv"), Given())
    chosen = choose(curves)
    for width in LARGE:
        large = [[run(width, part * steps, seed) for seed in SEEDS] for part in FORECAST_LENGTHS]
        lab.do([one for runs in large for one in runs], f"width {width}")
        for runs in large:
            outcomes = lab.do(runs, f"width {width}")
            weights, read = runs[0].shape.multiplied(), lab.tokens(runs[0], runs[0].steps)
            answer = forecast(curves, chosen, Target(weights, read), None, SAMPLES, 0)
            yield Row(width, weights, read, answer.loss, tuple(outcome.loss for outcome in outcomes))


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| forecast of | bytes for each weight | forecast | range | measured (seeds) | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seeds = ", ".join(f"{loss:.4f}" for loss in row.losses)
        lines.append(
            f"| width {row.width}, {row.weights:,} weights, {written(row.read)} bytes | {row.read / row.weights:.0f} "
            f"| {row.forecast.value:.4f} | {row.forecast.low:.4f} to {row.forecast.high:.4f} "
            f"| {row.measured:.4f} ({seeds}) | {row.error:+.2%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out") / "forecast")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at the same time; a run uses one thread")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the shortest runs")
    parser.add_argument("--write", action="store_true", help="put the table into docs/forecast.md")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        with progress() as show:
            lab = Lab(arguments.output, Settings(batch=8, evaluations=20, examined=96), arguments.workers, show)
            text = table(list(rows(lab, arguments.steps, arguments.output)))
    except KeyboardInterrupt:
        print("interrupted: run the same command to continue", file=sys.stderr)
        return 130
    print(text)
    if arguments.write:
        put("forecast.md", "forecast", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
