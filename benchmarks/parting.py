"""Measures how fast a grown model parts from its source when both are trained on with the exact settings.

    python benchmarks/parting.py [--steps 100] [--rate 1e-3] [--plot docs/parting.png]

It trains the committed GPT for 100 steps, grows it by 2 in memory with several strategies, and trains the source and
each grown model on, on the same bytes, with the settings of each tensor and the grown moments. After each step it
compares their logits on text that no model reads. Prints a Markdown table. Needs torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from growing.corpus import corpus
from jump import BEFORE, LENGTH, Variant, advance, grown, logits_of, trained_source

VARIANTS = (
    Variant("symmetric", "symmetric"),
    Variant("diagonal", "diagonal"),
    Variant("noisy-symmetric, 40 dB", "noisy-symmetric", 40.0),
    Variant("noisy-symmetric, 20 dB", "noisy-symmetric", 20.0),
    Variant("noisy-symmetric, 10 dB", "noisy-symmetric", 10.0),
    Variant("noisy-diagonal, 10 dB (the default)", "noisy-diagonal", 10.0),
)
PROBES = 8
SHOWN = (1, 2, 5, 10, 20, 50, 100)
"""The steps whose values are in the table."""


def differences(steps: int, rate: float) -> Iterator[dict[str, float]]:
    """At growth and after each step, how far the logits of each variant are from the source's.

    This is the root mean square of the differences, divided by the root mean square of the source's logits. The text is
    one that no model reads.
    """
    window = torch.from_numpy(corpus().examination(PROBES, LENGTH))
    source = trained_source(rate)
    variants = {variant.name: grown(source, variant) for variant in VARIANTS}
    for step in range(steps + 1):
        if step:
            for training in (source, *variants.values()):
                advance(training, BEFORE + step, rate)
        with torch.inference_mode():
            wanted = logits_of(source, window)
            apart = {name: logits_of(training, window) - wanted for name, training in variants.items()}
        scale = root_mean_square(wanted)
        yield {name: root_mean_square(difference) / scale for name, difference in apart.items()}


def root_mean_square(values: Any) -> float:
    return float(values.square().mean().sqrt())


def draw(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """The differences by steps, on a logarithmic scale, each curve named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    last = max(len(curve) for curve in curves.values()) - 1
    height = float("inf")
    for number, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1])):
        colour = pyplot.get_cmap("tab10")(number)
        axes.plot(range(len(curve)), curve, color=colour, linewidth=1.6)
        height = min(height / 1.9, curve[-1])
        axes.annotate(name, (last, curve[-1]), xytext=(last * 1.02, height), color=colour, fontsize=9, va="center")
    axes.set(
        yscale="log",
        xlim=(0, last * 1.5),
        xticks=range(0, last + 1, max(1, last // 5)),
        xlabel="steps of AdamW after growth",
        ylabel="difference of the logits, divided by the logits",
    )
    axes.set_title(
        f"Without noise the grown model follows its source ({curves['symmetric'][-1]:.0e} apart after {last} steps).\n"
        "Noise parts them, and how far depends on its level.",
        fontsize=10,
        loc="left",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate of the source")
    parser.add_argument("--plot", type=Path, help="write a picture")
    arguments = parser.parse_args()
    curves: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    for row in differences(arguments.steps, arguments.rate):
        for name, value in row.items():
            curves[name].append(value)
    shown = [step for step in SHOWN if step <= arguments.steps]
    print(f"| strategy | at growth | {' | '.join(f'{step} steps' for step in shown)} |")
    print(f"|---|{'---:|' * (len(shown) + 1)}")
    for name, curve in curves.items():
        print(f"| {name} | {' | '.join(f'{curve[step]:.1e}' for step in (0, *shown))} |")
    if arguments.plot is not None:
        draw(curves, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
