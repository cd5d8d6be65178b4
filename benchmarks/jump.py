"""Measures what makes the loss of a grown model jump, and what that costs at the end of a short training.

    python benchmarks/jump.py [--steps 100] [--output out/jump] [--rate 1e-3]

It trains the committed GPT for 100 steps at a constant rate, grows it by 2 in memory (`frameworks.stages`), and trains
each variant with a rate that falls to 0. All variants read the same bytes. It prints a table of losses on files that no
variant reads. After an interruption the same command continues with the next variant. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from growing.corpus import corpus  # noqa: E402
from torch.nn import functional  # noqa: E402

from hyperclone_onnx import Strategy  # noqa: E402
from hyperclone_onnx.frameworks.stages import Training  # noqa: E402

MODEL = ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx"
BEFORE = 100
BATCH, LENGTH, EXAMINED = 8, 64, 32


@dataclass(frozen=True)
class Variant:
    """How a grown model is trained on.

    Args:
        strategy: the strategy of the growth; None: the source goes on.
        snr_db: the level of its noise.
        settings: each tensor its own settings (exact), its own but eps unchanged (eps), or one rate for all (one).
        moments: those of the source, grown, or new ones.
        part: the peak rate, divided by the source's.
        warm_up: the part of the steps in which the rate rises.
    """

    name: str
    strategy: str | None = "noisy-diagonal"
    snr_db: float = 10.0
    settings: Literal["exact", "eps", "one"] = "exact"
    moments: Literal["grown", "new"] = "grown"
    part: float = 1.0
    warm_up: float = 0.0


VARIANTS = (
    Variant("the source goes on", None),
    Variant("symmetric: each tensor's settings, grown moments", "symmetric"),
    Variant("each tensor's settings, grown moments"),
    Variant("half of the rate", part=0.5),
    Variant("a fifth of the rate", part=0.2),
    Variant("warm-up in 10 % of the steps", warm_up=0.1),
    Variant("eps of the source", settings="eps"),
    Variant("new moments", moments="new"),
    Variant("new moments, warm-up in 10 % of the steps", moments="new", warm_up=0.1),
    Variant("noise at 0 dB", snr_db=0.0),
    Variant("noise at 20 dB", snr_db=20.0),
    Variant("one rate for all, grown moments", settings="one"),
    Variant("one rate for all, new moments", settings="one", moments="new"),
    Variant("one rate for all, half of it, grown moments", settings="one", part=0.5),
    Variant("one rate for all, half of it, new moments", settings="one", moments="new", part=0.5),
    Variant("one rate for all, a fifth of it, grown moments", settings="one", part=0.2),
    Variant("one rate for all, a fifth of it, new moments", settings="one", moments="new", part=0.2),
)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate of the source")
    parser.add_argument("--output", type=Path, default=Path("out/jump"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"results-{arguments.steps}-{arguments.rate:g}.json"
    results: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [variant for variant in VARIANTS if variant.name not in results]
    if missing:
        source = trained_source(arguments.rate)
        for variant in missing:
            start = trained_source(arguments.rate) if variant.strategy is None else grown(source, variant)
            results[variant.name] = trained(start, variant, arguments.steps, arguments.rate)
            path.write_text(json.dumps(results, indent=1) + "\n")
    columns = list(next(iter(results.values())))
    print(f"| variant | {' | '.join(f'after {column}' for column in columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for variant in VARIANTS:
        losses = results[variant.name].values()
        print(f"| {variant.name} | {' | '.join(f'{loss:.4f}' for loss in losses)} |")
    return 0


def trained_source(rate: float) -> Training:
    """The source after its own training."""
    source = Training.begin(MODEL, lr=rate, weight_decay=0.1)
    for step in range(BEFORE):
        advance(source, step, rate)
    return source


def grown(source: Training, variant: Variant) -> Training:
    """The start of a variant. The source stays as it is."""
    training = source.grow(2, strategy=Strategy(variant.strategy, variant.snr_db))  # type: ignore[arg-type]
    for group in training.optimizer.param_groups:
        if variant.settings == "one":
            group.update(rate_factor=1.0, eps=1e-8, weight_decay=0.1)
        elif variant.settings == "eps":
            group.update(eps=1e-8)
    if variant.moments == "new":
        training.optimizer.state.clear()
    return training


def trained(training: Training, variant: Variant, steps: int, rate: float) -> dict[str, float]:
    """Train a variant, and return its losses on files that are not read, by the number of steps."""
    times = sorted({0, 5, 10, 20, steps // 2, steps})
    losses = {}
    for step in range(steps + 1):
        if step in times:
            losses[str(step)] = examined(training)
        if step < steps:
            done = (step + 1) / steps
            share = done / variant.warm_up if done < variant.warm_up else (1 - done) / (1 - variant.warm_up)
            advance(training, BEFORE + step, rate * variant.part * share, own_norm=variant.settings == "one")
    return losses


def advance(training: Training, step: int, rate: float, *, own_norm: bool = False) -> None:
    """One step. `own_norm` clips by the norm of the model's own gradient, as torch does."""
    window = torch.from_numpy(corpus().batch(0, step, BATCH, LENGTH))
    training.set_rate(rate)
    loss_of(training, window).backward()
    if own_norm:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    else:
        training.clip(1.0)
    training.optimizer.step()
    training.optimizer.zero_grad()


def loss_of(training: Training, window: Any) -> Any:
    return functional.cross_entropy(logits_of(training, window).flatten(0, 1), window[:, 1:].flatten())


def logits_of(training: Training, window: Any) -> Any:
    """The logits for all bytes of a window but the first, shape (windows, length, 256)."""
    ids = window[:, :-1]
    return training.model(input_ids=ids, attention_mask=torch.ones_like(ids))


def examined(training: Training) -> float:
    with torch.inference_mode():
        return float(loss_of(training, torch.from_numpy(corpus().examination(EXAMINED, LENGTH))))


if __name__ == "__main__":
    sys.exit(main())
