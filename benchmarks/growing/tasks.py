"""One training run, in all that decides its result, and the points of its curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, gradients clipped at a norm of 1, a linear warm-up and then a decay to nothing."""

    rate: float
    """At its peak."""
    warm_up: float = 0.05
    """The share of all steps in which the rate rises; 0 begins at the peak."""
    decay: str = "linear"
    """linear, cosine, late (constant until the last quarter), or none."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    dropout: float = 0.0
    """Behind each layer."""
    by_fan_in: bool = False
    """Whether a grown matrix gets the rate divided by the growth of its fan-in (muP, arXiv 2203.03466)."""

    def share(self, done: float) -> float:
        """The rate after a share of all steps, in parts of its peak."""
        if done < self.warm_up:
            return done / self.warm_up
        left = (1.0 - done) / (1.0 - self.warm_up)
        if self.decay == "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return {"none": 1.0, "late": min(1.0, 4.0 * left), "linear": left}[self.decay]


@dataclass(frozen=True)
class Task:
    """A run, in all that decides its result."""

    model: Path
    """What it starts from."""
    recipe: Recipe
    steps: int
    seed: int
    """Of the order of the data."""
    batch: int
    length: int
    evaluations: int
    examined: int
    """How many windows of what is held out."""
    optimizer: Path | None = None
    """The state to start from."""
    framework: str = "torch"
    device: str = "cpu"

    def times(self) -> set[int]:
        """The steps before which the model is examined; the last is the end."""
        return {round(self.steps * number / self.evaluations) for number in range(self.evaluations + 1)}


@dataclass(frozen=True)
class Point:
    """A place on a curve."""

    step: int
    loss: float
    """On what is held out, in nats per byte."""
