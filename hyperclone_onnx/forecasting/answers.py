"""What a law says about a target: from random weights, grown from a smaller model, and grown in several steps.

**How a grown model is forecast.** A grown model computes what its source computes, so it starts at the source's loss.
A model of the target's size from random weights reaches this loss after some number of tokens, the *head start*. From
there the grown model is taken to follow the target's own curve, but a part of all these tokens is lost:

    loss of the grown model after D tokens = L(N, KEPT * (head start + D)),   L(N, head start) = the source's loss

It is never taken as higher than the source's loss, nor as higher than that of random weights after D tokens. `KEPT` is
measured, not derived: docs/forecast.md has its evidence. FLOPs are 6 N D; the source's training is counted or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.forecasting.curves import Chosen, Curve
from hyperclone_onnx.forecasting.law import Fit, Law, fit_for, held_back

FLOPS = 6.0
"""The floating-point operations of training, for each weight and token."""

KEPT = 0.82
"""The part of the tokens (the head start, and its own) that count for a grown model."""

FACTORS = (2, 3, 4, 8)
"""The factors of the width that are tried for growth. The weights of a factor f are taken as f^2 times as many."""

MOST_STAGES = 3


@dataclass(frozen=True)
class Estimate:
    """An answer, and the range of the bootstrap's answers; see `law.Fit.range`."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The numbers; None for an infinite one."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Source:
    """The small model: its weights, the tokens of its training, and its final loss (None: the law says it)."""

    size: float
    tokens: float
    loss: float | None = None

    def loss_by(self, law: Law) -> float:
        """Its loss: measured, or by a law."""
        return law.loss(self.size, self.tokens) if self.loss is None else self.loss

    @property
    def flops(self) -> float:
        """The cost of its training."""
        return FLOPS * self.size * self.tokens


@dataclass(frozen=True)
class Stage:
    """One size of a training in stages, and the tokens that are read at this size."""

    size: float
    tokens: float


@dataclass(frozen=True)
class Route:
    """A way to the target's size and loss through smaller sizes, each trained for as long as is cheapest."""

    stages: tuple[Stage, ...]

    @property
    def flops(self) -> float:
        """The cost of all stages."""
        return sum(FLOPS * stage.size * stage.tokens for stage in self.stages)


@dataclass(frozen=True)
class Target:
    """The model that is asked about.

    Args:
        size: its weights.
        tokens: the tokens that it is trained on (from random weights, or after growth).
        goal: the loss that it is to reach; None for the loss that random weights reach after `tokens`.
    """

    size: float
    tokens: float
    goal: float | None = None


@dataclass(frozen=True)
class Grown:
    """The answers about growing from one source."""

    source: Source
    start: Estimate
    """The source's loss."""
    head_start: Estimate
    """The tokens that random weights need to reach it."""
    loss: Estimate
    """The loss after the target's tokens."""
    tokens: Estimate
    """The tokens to the goal, after growth."""
    flops: Estimate
    """The cost of these tokens."""
    total: Estimate
    """The same with the source's training."""
    saved: Estimate
    """The FLOPs that growth saves, the source's training counted. Negative: growing costs more."""
    longest_source: Estimate | None
    """The longest training of a source, in tokens, that is no dearer in all than random weights to the goal; 0 if any
    training is dearer."""


@dataclass(frozen=True)
class Forecast:
    """All answers about a target."""

    target: Target
    goal: float
    fit: Fit
    loss: Estimate
    """The loss from random weights after the target's tokens."""
    tokens: Estimate
    """The tokens from random weights to the goal."""
    flops: Estimate
    grown: Grown | None
    routes: tuple[tuple[Route, Estimate], ...]
    """Ways through smaller sizes, the cheapest first, each with random weights' FLOPs divided by its own."""
    held_back: tuple[float, float] | None
    """The largest measured size, and the relative error with which the other sizes forecast it; None if too few."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The forecast as plain data."""
        grown = None
        if self.grown is not None:
            answers = {name: value.to_json() for name, value in vars(self.grown).items() if isinstance(value, Estimate)}
            grown = {"source": asdict(self.grown.source), **answers}
        return {
            "target": asdict(self.target),
            "goal": self.goal,
            "law": {**asdict(self.fit.law), "of_size": self.fit.of_size, "error": self.fit.error},
            "random": {name: getattr(self, name).to_json() for name in ("loss", "tokens", "flops")},
            "grown": grown,
            "kept": KEPT,
            "held_back": None if self.held_back is None else dict(zip(("size", "error"), self.held_back, strict=True)),
            "routes": [
                {"stages": [asdict(stage) for stage in route.stages], "flops": route.flops, "gain": gain.to_json()}
                for route, gain in self.routes
            ],
            "losses": [asdict(one) for one in self.fit.observations],
            "notes": list(self.notes),
        }


def forecast(
    curves: Sequence[Curve], chosen: Chosen, target: Target, source: Source | None, samples: int, seed: int
) -> Forecast:
    """Answer for a target.

    Args:
        curves: the curves, to say how far the target is from them.
        chosen: the losses to fit, from `choose`.
        target: the model that is asked about.
        source: the model to grow from; None to leave these answers out.
        samples: the number of bootstrap samples.
        seed: the seed of the bootstrap.

    Raises:
        TooLittleData: the curves cannot support an answer.
        BadRequest: the source is not smaller than the target; or the law of one size is asked about another.
    """
    if source is not None and source.size >= target.size:
        raise BadRequest(f"the source has {source.size:g} weights, the target {target.size:g}: a source is smaller")
    fitted = fit_for(chosen, target.size, samples, seed)
    if fitted.of_size is not None and source is not None and source.loss is None:
        raise BadRequest("the curves have one size only, so they do not say the source's loss: give its curve too")
    law, size = fitted.law, target.size
    goal = law.loss(size, target.tokens) if target.goal is None else target.goal

    def estimate(answer: Callable[[Law], float]) -> Estimate:
        return Estimate(answer(law), *fitted.range(answer))

    notes = list(chosen.notes)
    largest = max(curve.size for curve in curves)
    longest = max(curve.points[-1].tokens for curve in curves)
    if size > 4.0 * largest or target.tokens > 4.0 * longest:
        notes.append(
            f"the target has {size / largest:.3g} times the weights and {target.tokens / longest:.3g} times the tokens "
            "of the largest and the longest run: so far from the data, the range is too narrow"
        )
    if goal <= law.floor(size):
        notes.append(f"by the law, a model of this size never reaches {goal:.4f}: its limit is {law.floor(size):.4f}")
    grown = None if source is None else _grown(estimate, target, goal, source, is_general=fitted.of_size is None)
    return Forecast(
        target,
        goal,
        fitted,
        estimate(lambda law: law.loss(size, target.tokens)),
        estimate(lambda law: law.tokens(size, goal)),
        estimate(lambda law: FLOPS * size * law.tokens(size, goal)),
        grown,
        _routes(estimate, law, size, goal, min(chosen.sizes)) if fitted.of_size is None else (),
        held_back(chosen) if fitted.of_size is None else None,
        tuple(notes),
    )


# -- grown from one source --------------------------------------------------------------------------------


def grown_loss(law: Law, size: float, start: float, tokens: float) -> float:
    """The loss of a model grown from a loss `start`, after `tokens` tokens."""
    head_start = law.tokens(size, start)
    if math.isinf(head_start):
        return start
    return min(start, law.loss(size, max(tokens, KEPT * (head_start + tokens))))


def grown_tokens(law: Law, size: float, start: float, goal: float) -> float:
    """The tokens after which a model grown from a loss `start` reaches the loss `goal`."""
    if goal >= start:
        return 0.0
    random = law.tokens(size, goal)
    if math.isinf(random):
        return random
    return max(0.0, min(random, random / KEPT - law.tokens(size, start)))


def _grown(
    estimate: Callable[[Callable[[Law], float]], Estimate],
    target: Target,
    goal: float,
    source: Source,
    *,
    is_general: bool,
) -> Grown:
    size = target.size

    def tokens(law: Law) -> float:
        return grown_tokens(law, size, source.loss_by(law), goal)

    return Grown(
        source,
        estimate(source.loss_by),
        estimate(lambda law: law.tokens(size, source.loss_by(law))),
        estimate(lambda law: grown_loss(law, size, source.loss_by(law), target.tokens)),
        estimate(tokens),
        estimate(lambda law: FLOPS * size * tokens(law)),
        estimate(lambda law: FLOPS * size * tokens(law) + source.flops),
        estimate(lambda law: FLOPS * size * (law.tokens(size, goal) - tokens(law)) - source.flops),
        estimate(lambda law: longest_source(law, source.size, size, goal)) if is_general else None,
    )


def longest_source(law: Law, small: float, size: float, goal: float) -> float:
    """The longest training of a source, in tokens, with which growing to a goal is no dearer than random weights.

    A longer training of the source gives less and less, because the source's loss has a limit. So from some length on
    it costs more than it gives. 0 if it always does.
    """
    random = law.tokens(size, goal)
    if math.isinf(random):
        return 0.0

    def gain(tokens: float) -> float:
        return size * (random - grown_tokens(law, size, law.loss(small, tokens), goal)) - small * tokens

    steps: list[float] = [10.0 ** (exponent / 8.0) for exponent in range(8, 8 * 16)]
    paying = [tokens for tokens in steps if gain(tokens) >= 0.0]
    if not paying:
        return 0.0
    low, high = paying[-1], paying[-1] * 10.0 ** (1.0 / 8.0)
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) >= 0.0 else (low, middle)
    return low


# -- grown in several steps -------------------------------------------------------------------------------


def route(law: Law, sizes: Sequence[float], goal: float) -> Route | None:
    """The cheapest training through these rising sizes; None if a size is of no use on the way.

    The model grows where the next size lowers the loss for fewer FLOPs. With c = the limit of a size's loss, a size N
    spends N dD/dL = const N (L - c)^(-p) FLOPs on a step of the loss, p = 1 + 1 / b. So the loss where the size goes
    from n to N solves n / k (L - c)^(-p) = N (L - C)^(-p). Here k is 1 in the first stage, whose weights are random,
    and KEPT in the others.
    """
    losses = [math.inf]
    power = 1.0 + 1.0 / law.token_exponent
    for number, (small, large) in enumerate(pairwise(sizes)):
        ratio = ((KEPT if number else 1.0) * large / small) ** (1.0 / power)
        if ratio <= 1.0:
            return None
        switch = (ratio * law.floor(small) - law.floor(large)) / (ratio - 1.0)
        if not goal < switch < losses[-1]:
            return None
        losses.append(switch)
    losses.append(goal)
    stages = []
    for size, start, end in zip(sizes, losses, losses[1:], strict=False):
        spent = law.tokens(size, end) if math.isinf(start) else grown_tokens(law, size, start, end)
        if not 0.0 < spent < math.inf:
            return None
        stages.append(Stage(size, spent))
    return Route(tuple(stages))


def _routes(
    estimate: Callable[[Callable[[Law], float]], Estimate], law: Law, size: float, goal: float, smallest: float
) -> tuple[tuple[Route, Estimate], ...]:
    """The routes through sizes that the data covers and that are cheaper than random weights, the cheapest first."""
    smaller = [size / factor**2 for factor in FACTORS if size / factor**2 >= 0.99 * smallest]
    routes: list[tuple[Route, Estimate]] = []
    for count in range(1, MOST_STAGES):
        for sizes in combinations(sorted(smaller), count):
            best = route(law, (*sizes, size), goal)
            if best is not None:

                def gain(law: Law, best: Route = best) -> float:
                    tokens = [stage.size for stage in best.stages]
                    own = route(law, tokens, goal)
                    spent = math.inf if own is None else own.flops
                    random = FLOPS * size * law.tokens(size, goal)
                    return random / spent if math.isfinite(random) else math.inf

                routes.append((best, estimate(gain)))
    routes = [pair for pair in routes if pair[1].value > 1.0]
    return tuple(sorted(routes, key=lambda pair: pair[0].flops)[:4])
