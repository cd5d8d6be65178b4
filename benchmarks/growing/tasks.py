"""The description of one training run, and the points of its curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, gradients clipped at a norm of 1, a linear warm-up, and then a decay to 0."""

    rate: float
    """The learning rate at its peak."""
    warm_up: float = 0.05
    """The share of the steps in which the rate rises. 0 means that it begins at the peak."""
    decay: str = "linear"
    """linear, cosine, late (constant until the last quarter), or none."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    dropout: float = 0.0
    """The share of elements that are dropped behind each layer."""
    by_fan_in: bool = False
    """Whether the rate of a grown matrix is divided by the growth of its fan-in (muP, arXiv 2203.03466)."""
    exact: bool = False
    """Whether each tensor has the settings with which it goes on as its source would (`adamw_groups`), and gradients
    are clipped by the norm of the source's gradient."""

    def share(self, done: float) -> float:
        """The rate after a share `done` of the steps, divided by its peak."""
        if done < self.warm_up:
            return done / self.warm_up
        left = (1.0 - done) / (1.0 - self.warm_up)
        if self.decay == "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return {"none": 1.0, "late": min(1.0, 4.0 * left), "linear": left}[self.decay]


@dataclass(frozen=True)
class Task:
    """All that decides the result of a run."""

    model: Path
    """The initial model."""
    recipe: Recipe
    steps: int
    seed: int
    """The seed for the order of the data."""
    batch: int
    length: int
    evaluations: int
    examined: int
    """The number of windows for evaluation."""
    optimizer: Path | None = None
    """The initial state of the optimizer."""
    framework: str = "torch"
    device: str = "cpu"
    tokens: Path | None = None
    """The file with the tokens of the corpus; None for bytes."""

    def times(self) -> set[int]:
        """The steps before which the model is evaluated, and the end."""
        return {round(self.steps * number / self.evaluations) for number in range(self.evaluations + 1)}


@dataclass(frozen=True)
class Point:
    """A point of a curve."""

    step: int
    loss: float
    """The loss on the evaluation windows, in nats per byte."""
