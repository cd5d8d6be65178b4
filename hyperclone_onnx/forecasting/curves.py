"""Loss curves, and which of their points a scaling law is fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hyperclone_onnx.errors import BadRequest

DECAYED = 0.2
"""A run has decayed if its last learning rate is at most this part of its highest rate."""

CONSTANT = 0.01
"""A rate is constant if, after the warm-up, it stays within this part of its highest value."""

EARLIEST = 0.1
"""Of a run with a constant rate, this first part of its tokens is left out: the warm-up, and the first fast fall."""

MOST_POINTS = 40
"""If all points of a run are used, its points are averaged into so many groups, evenly spaced in log(tokens)."""

Kind = Literal["decayed", "constant", "between", "unknown"]
"""How a run's learning rate went: it fell at the end, was constant, fell only a part; or the file does not say it."""

Choice = Literal["auto", "last", "all"]
"""The points that are used: those that the learning rates allow, the last of each run, or all."""


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Args:
        tokens: the number of tokens that the run has read.
        loss: the loss there, in any unit that all curves share.
        rate: the learning rate there; None if the file does not say it.
    """

    tokens: float
    loss: float
    rate: float | None = None


@dataclass(frozen=True)
class Curve:
    """The loss curve of one training run from random weights.

    Args:
        name: the name of the run in messages.
        size: the number of weights of its model.
        points: the points, by rising tokens.
    """

    name: str
    size: float
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        """The end of the run: the mean of the last 2 % of its points, so that one noisy point does not decide."""
        count = max(1, len(self.points) // 50)
        mean = sum(point.loss for point in self.points[-count:]) / count
        return Point(self.points[-1].tokens, mean, self.points[-1].rate)

    @property
    def kind(self) -> Kind:
        """How the learning rate of the run went."""
        rates = [point.rate for point in self.points if point.rate is not None]
        if len(rates) < 2:
            return "unknown"
        highest = max(rates)
        if rates[-1] <= DECAYED * highest:
            return "decayed"
        lowest = (1.0 - CONSTANT) * highest
        warm = next(number for number, rate in enumerate(rates) if rate >= lowest)
        return "constant" if min(rates[warm:]) >= lowest else "between"

    def settled(self) -> tuple[Point, ...]:
        """All points but the first ones, averaged into at most `MOST_POINTS` groups."""
        start = EARLIEST * self.points[-1].tokens
        points = [point for point in self.points if point.tokens >= start]
        if len(points) <= MOST_POINTS:
            return tuple(points)
        tokens = np.array([point.tokens for point in points])
        losses = np.array([point.loss for point in points])
        edges = np.geomspace(tokens[0], tokens[-1], MOST_POINTS + 1)
        groups = np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, MOST_POINTS - 1)
        means = [(tokens[groups == group].mean(), losses[groups == group].mean()) for group in np.unique(groups)]
        return tuple(Point(float(at), float(loss)) for at, loss in means)


@dataclass(frozen=True)
class Observation:
    """A loss that a law is fitted to: of a model with `size` weights after `tokens` tokens, in the run number `run`."""

    size: float
    tokens: float
    loss: float
    run: int


@dataclass(frozen=True)
class Chosen:
    """The losses that a law is fitted to, and what is to be said about the choice."""

    observations: tuple[Observation, ...]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> tuple[float, ...]:
        """The sizes of the models, rising."""
        return tuple(sorted({observation.size for observation in self.observations}))

    def of_size(self, size: float) -> Chosen:
        """The losses of models of one size."""
        return Chosen(tuple(one for one in self.observations if one.size == size), self.notes)


def choose(curves: Sequence[Curve], choice: Choice = "auto") -> Chosen:
    """The losses of `curves` that belong to one law.

    While the learning rate is high, the loss is higher than at the end of a run that decayed. So the last points of
    decayed runs and the points of runs with a constant rate lie on two different laws, and are not mixed.

    Args:
        curves: the curves.
        choice: "auto" takes the last points of decayed runs (and of runs whose rate is unknown). If there are none, it
            takes all later points of the runs with a constant rate. "last" and "all" take these points of every run.

    Raises:
        BadRequest: no point remains.
    """
    if choice == "last":
        return Chosen(_last_points(curves, range(len(curves))), ())
    if choice == "all":
        return Chosen(_all_points(curves, range(len(curves))), ())
    by_kind: dict[Kind, list[int]] = {"decayed": [], "constant": [], "between": [], "unknown": []}
    for number, curve in enumerate(curves):
        by_kind[curve.kind].append(number)
    notes: list[str] = []
    if by_kind["unknown"]:
        names = _names(curves, by_kind["unknown"])
        notes.append(
            f"no learning rate is known of {names}: taken as decayed at its end, so only the last point counts"
        )
    ended = sorted(by_kind["decayed"] + by_kind["unknown"])
    left_out = list(by_kind["between"])
    if ended:
        left_out += by_kind["constant"]
        observations = _last_points(curves, ended)
    else:
        observations = _all_points(curves, by_kind["constant"])
    if left_out:
        names = _names(curves, sorted(left_out))
        notes.append(f"left out {names}: the learning rate had not decayed like that of the other runs")
    if not observations:
        raise BadRequest(
            f"{curves[0].name}: the learning rate has neither fallen to {DECAYED:g} of its peak nor stayed constant, "
            "so no point tells a final loss: give finished runs, or --points last"
        )
    return Chosen(observations, tuple(notes))


def _names(curves: Sequence[Curve], numbers: Sequence[int]) -> str:
    names = [curves[number].name for number in numbers]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _last_points(curves: Sequence[Curve], numbers: Iterable[int]) -> tuple[Observation, ...]:
    ends = [(number, curves[number], curves[number].last) for number in numbers]
    return tuple(Observation(curve.size, last.tokens, last.loss, number) for number, curve, last in ends)


def _all_points(curves: Sequence[Curve], numbers: Iterable[int]) -> tuple[Observation, ...]:
    return tuple(
        Observation(curves[number].size, point.tokens, point.loss, number)
        for number in numbers
        for point in curves[number].settled()
    )
