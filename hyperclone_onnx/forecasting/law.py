"""The scaling law L(N, D) = E + A / N^a + B / D^b of a model's loss, and its fit to measured losses.

N is the number of weights, D the number of tokens (Hoffmann et al., arXiv 2203.15556, "approach 3"). As there, the fit
minimises the Huber loss between the logarithms of the law and of the measured losses. There are few losses here, so
errors up to 1 % count as squares (in the paper: 0.1 %). For given exponents a and b the law is linear in E, A and B. So
a grid of exponents with a linear fit in each gives the starting points, and `scipy.optimize.least_squares` improves the
best of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.forecasting.curves import Chosen, Observation

Array = np.ndarray[Any, Any]

DELTA = 1e-2
"""Where the Huber loss goes over from squares to absolute values."""

EXPONENTS = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6])
"""The exponents that are tried first."""

LARGEST_EXPONENT = 3.0
STARTS = 3

FEWEST_SIZES, FEWEST_TOKENS, FEWEST_LOSSES = 3, 3, 6
"""A law of five numbers needs three sizes (for E, A, a), three numbers of tokens (for E, B, b), and one loss more."""

FEWEST_OF_ONE_SIZE = 4


def require_scipy() -> None:
    """Check that scipy is installed, before files are read.

    Raises:
        BadRequest: it is not.
    """
    if importlib.util.find_spec("scipy") is None:
        raise BadRequest("a forecast needs scipy: pip install 'hyperclone-onnx[forecast]'")


class TooLittleData(BadRequest):
    """The curves cannot support the answer. The text says which curves are missing."""


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b.

    A law of one size has A = 0, and holds for this size alone.
    """

    limit: float
    """E, the loss that no size and no number of tokens goes below."""
    size_factor: float
    """A"""
    size_exponent: float
    """a"""
    token_factor: float
    """B"""
    token_exponent: float
    """b"""

    def floor(self, size: float) -> float:
        """The loss of a model of this size after endless training: E + A / N^a."""
        return self.limit + self.size_factor * float(size**-self.size_exponent)

    def loss(self, size: float, tokens: float) -> float:
        """The loss of a model from random weights, of `size` weights, after `tokens` tokens."""
        return self.floor(size) + self.token_factor * float(tokens**-self.token_exponent)

    def tokens(self, size: float, loss: float) -> float:
        """The tokens after which a model from random weights reaches a loss; infinite if it never does."""
        above = loss - self.floor(size)
        if above <= 0.0:
            return float("inf")
        return float((self.token_factor / above) ** (1.0 / self.token_exponent))


@dataclass(frozen=True)
class Fit:
    """A fitted law with the laws of the bootstrap.

    Args:
        law: the law that fits best.
        samples: the laws that fit the resampled losses.
        observations: the losses that it was fitted to.
        of_size: the only size for which the law holds; None if it holds for all.
    """

    law: Law
    samples: tuple[Law, ...]
    observations: tuple[Observation, ...]
    of_size: float | None = None

    def range(self, answer: Callable[[Law], float]) -> tuple[float, float]:
        """The 2.5th and the 97.5th percentile of an answer over the samples."""
        values = np.sort([answer(law) for law in self.samples])
        low, high = (values[round(part * (len(values) - 1))] for part in (0.025, 0.975))
        return float(low), float(high)

    @property
    def error(self) -> float:
        """The mean relative distance of the law from the losses."""
        errors = [abs(self.law.loss(one.size, one.tokens) / one.loss - 1.0) for one in self.observations]
        return float(np.mean(errors))


def fit_for(chosen: Chosen, size: float, samples: int, seed: int) -> Fit:
    """Fit the law that can answer for a target: of all sizes, or of the target's own size.

    Args:
        chosen: the losses.
        size: the number of weights of the target.
        samples: the number of bootstrap samples.
        seed: the seed of their random numbers.

    Raises:
        TooLittleData: neither can be fitted.
    """
    losses = chosen.observations
    lengths = {one.tokens for one in losses}
    enough = len(losses) >= FEWEST_LOSSES and len(lengths) >= FEWEST_TOKENS
    if len(chosen.sizes) >= FEWEST_SIZES and enough:
        return fit(losses, samples, seed)
    own = chosen.of_size(size).observations
    if len(own) >= FEWEST_OF_ONE_SIZE and len({one.tokens for one in own}) >= FEWEST_TOKENS:
        return fit(own, samples, seed, of_size=size)
    have = f"{len(chosen.sizes)} size{'s' * (len(chosen.sizes) != 1)}, {len(lengths)} numbers of tokens"
    raise TooLittleData(
        f"the curves cannot say how the loss depends on the size: they have {have} and {len(losses)} usable losses, "
        f"and a forecast for another size needs {FEWEST_SIZES} sizes, {FEWEST_TOKENS} numbers of tokens and "
        f"{FEWEST_LOSSES} losses: add finished runs of other sizes and lengths"
    )


def held_back(chosen: Chosen) -> tuple[float, float] | None:
    """The largest size, and the mean relative error of a law that is fitted without it.

    Returns:
        None if the other sizes are too few to fit a law.
    """
    largest = chosen.sizes[-1]
    rest = [one for one in chosen.observations if one.size != largest]
    if (
        len(chosen.sizes) <= FEWEST_SIZES
        or len(rest) < FEWEST_LOSSES
        or len({one.tokens for one in rest}) < FEWEST_TOKENS
    ):
        return None
    law = fit(rest).law
    errors = [law.loss(one.size, one.tokens) / one.loss - 1.0 for one in chosen.of_size(largest).observations]
    return largest, float(np.mean(errors))


def fit(observations: Sequence[Observation], samples: int = 0, seed: int = 0, *, of_size: float | None = None) -> Fit:
    """Fit a law to losses.

    The uncertainty is a bootstrap: each sample has the losses of the law with new random errors, as large as the
    distances of the measured losses from the law, and the law is fitted again. All losses of one run get the same error
    if there are six runs or more, because they are not independent. (New errors rather than a choice among the runs: a
    sample that lacks the only runs of a size could not be fitted.) The errors are enlarged for few losses, as
    Student's t asks. For 40 sets of 16 losses from a known law, a forecast for four times the largest size lay in the
    range of `Fit.range` in 34.

    Args:
        observations: the losses.
        samples: the number of bootstrap samples.
        seed: the seed of their random numbers.
        of_size: fit the law of this size alone; all losses are of this size.
    """
    from scipy.stats import norm
    from scipy.stats import t as student_t

    sizes, tokens, losses = (
        np.array([getattr(one, name) for one in observations]) for name in ("size", "tokens", "loss")
    )
    data = _Data(sizes, tokens, of_size is not None)
    best = data.search(np.log(losses))
    law = data.law(best)
    numbers = 3 if of_size is not None else 5
    distances = np.log(losses) - data.log_losses(best)
    free = max(1, len(losses) - numbers)
    spread = np.sqrt(np.sum(distances**2) / free) * student_t.ppf(0.95, free) / norm.ppf(0.95)
    runs = np.unique([one.run for one in observations], return_inverse=True)[1]
    groups = runs if runs.max() >= 5 else np.arange(len(losses))
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(samples):
        errors = spread * rng.standard_normal(groups.max() + 1)[groups]
        resampled.append(data.law(data.improve(best, data.log_losses(best) + errors)))
    return Fit(law, tuple(resampled) or (law,), tuple(observations), of_size)


class _Data:
    """The sizes and tokens of the losses, scaled to be near 1. Its parameters are log E, log A, a, log B, b."""

    def __init__(self, sizes: Array, tokens: Array, is_one_size: bool) -> None:
        self.size_unit, self.token_unit = (float(np.exp(np.log(values).mean())) for values in (sizes, tokens))
        self.log_sizes, self.log_tokens = np.log(sizes / self.size_unit), np.log(tokens / self.token_unit)
        self.is_one_size = is_one_size

    def _terms(self, parameters: Array) -> list[Array]:
        e, *rest = parameters
        terms = [np.full_like(self.log_sizes, np.exp(e))]
        if not self.is_one_size:
            terms.append(np.exp(rest[0] - rest[1] * self.log_sizes))
        terms.append(np.exp(rest[-2] - rest[-1] * self.log_tokens))
        return terms

    def log_losses(self, parameters: Array) -> Array:
        return np.asarray(np.log(sum(self._terms(parameters))))

    def _slopes(self, parameters: Array) -> Array:
        terms = self._terms(parameters)
        total = sum(terms)
        columns = [terms[0]]
        if not self.is_one_size:
            columns += [terms[1], -terms[1] * self.log_sizes]
        columns += [terms[-1], -terms[-1] * self.log_tokens]
        return np.asarray(np.stack(columns, axis=1) / np.reshape(total, (-1, 1)))

    def improve(self, start: Array, log_losses: Array) -> Array:
        """The parameters with the least Huber loss, from a start."""
        return self._improve(start, log_losses)[0]

    def _improve(self, start: Array, log_losses: Array) -> tuple[Array, float]:
        from scipy.optimize import least_squares

        lower, upper = np.full(len(start), -40.0), np.full(len(start), 40.0)
        exponents = [len(start) - 1] if self.is_one_size else [2, 4]
        lower[exponents], upper[exponents] = 1e-3, LARGEST_EXPONENT
        result = least_squares(
            lambda parameters: self.log_losses(parameters) - log_losses,
            np.clip(start, lower + 1e-6, upper - 1e-6),
            self._slopes,
            bounds=(lower, upper),
            loss="huber",
            f_scale=DELTA,
            x_scale="jac",
            max_nfev=200,
        )
        return np.asarray(result.x), float(result.cost)

    def search(self, log_losses: Array) -> Array:
        """The best parameters of all starts."""
        from scipy.optimize import nnls

        losses = np.exp(log_losses)
        starts: list[tuple[float, int, Array]] = []
        for size_exponent in EXPONENTS if not self.is_one_size else EXPONENTS[:1]:
            for token_exponent in EXPONENTS:
                columns = [np.ones_like(losses)]
                if not self.is_one_size:
                    columns.append(np.exp(-size_exponent * self.log_sizes))
                columns.append(np.exp(-token_exponent * self.log_tokens))
                factors, distance = nnls(np.stack(columns, axis=1) / losses[:, None], np.ones_like(losses))
                logs = np.log(np.maximum(factors, 1e-6))
                middle = [] if self.is_one_size else [logs[1], size_exponent]
                starts.append((distance, len(starts), np.array([logs[0], *middle, logs[-1], token_exponent])))
        starts.sort(key=lambda start: start[:2])
        return min((self._improve(start[2], log_losses) for start in starts[:STARTS]), key=lambda pair: pair[1])[0]

    def law(self, parameters: Array) -> Law:
        """The law in the units of the caller."""
        e, *rest = (float(number) for number in parameters)
        size_log, size_exponent = (-np.inf, 0.0) if self.is_one_size else (rest[0], rest[1])
        return Law(
            float(np.exp(e)),
            float(np.exp(size_log) * self.size_unit**size_exponent),
            size_exponent,
            float(np.exp(rest[-2]) * self.token_unit ** rest[-1]),
            rest[-1],
        )
