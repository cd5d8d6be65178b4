"""The effective rank of a matrix: how many directions it really uses.

Of singular values s_k, with p_k = s_k / sum of s, it is exp(- sum of p_k log p_k) (Roy and Vetterli: The effective
rank, EUSIPCO 2007): 1 where one direction does all, n where n directions do alike. The stable rank is the sum of
s_k^2 over the largest s_k^2. Clones that are alike add nothing to either: a symmetric clone has its source's.

Where the smaller side has at most `EXACT` entries, singular values are the roots of the eigenvalues of the Gram matrix,
in float64. For larger ones the sums are estimated by stochastic Lanczos quadrature (Ubaru, Chen, Saad: Fast estimation
of tr(f(A)), SIAM J. Matrix Anal. Appl. 38, 2017) from `LEADING` + `PROBES` vectors and `STEPS` steps, to a few
percent; of matrices with more than `LARGEST` elements from a sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hyperclone_onnx.diagnosis.distance import Array
from hyperclone_onnx.diagnosis.weights import Layout

EXACT = 1280
PROBES = 8
LEADING = 24
STEPS = 40
FLOOR = 1e-12
"""Eigenvalues below this part of the largest are rounding."""
LARGEST = 1 << 27
CHUNK = 1 << 22
"""Elements that are converted at a time."""


class Spectrum:
    """The sums over singular values that the ranks are made of."""

    def __init__(self, total: float, entropy: float, squares: float, largest: float, by: str) -> None:
        self.effective = math.exp(math.log(total) - entropy / total) if total > 0.0 else 0.0
        self.stable = squares / largest**2 if largest > 0.0 else 0.0
        self.by = by


def as_matrix(array: Array, table: Layout) -> Array | None:
    """A tensor in its factored shape as the matrix whose rank counts; None where it is none.

    What a contraction sums over against the rest; where the plan marks nothing so, the first axis against the others.
    """
    places, rest = table.places(shared=True), table.places(shared=False)
    if not places and len(table.axes) > 1:
        matrix = array.reshape(table.axes[0], -1)
    else:
        rows = math.prod(array.shape[place] for place in places)
        matrix = array.transpose(*places, *rest).reshape(rows, -1)
    return matrix if min(matrix.shape) > 1 else None


def spectrum(matrix: Array, exact: int = EXACT) -> Spectrum:
    """The ranks of a matrix of any floating-point type; what is not finite counts as zero."""
    by = ""
    if matrix.size > LARGEST:
        rows = max(1, LARGEST // matrix.shape[1])
        chosen = np.sort(np.random.default_rng(0).choice(len(matrix), rows, replace=False))
        by = f", {rows} of {len(matrix)} rows"
        matrix = matrix[chosen]
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[1] <= exact:
        gram = sum(chunk.T @ chunk for chunk in _chunks(matrix))
        values = np.linalg.eigvalsh(gram)
        values[values < len(values) * np.finfo(np.float64).eps * values.max(initial=0.0)] = 0.0
        singular = np.sqrt(values)
        return Spectrum(
            float(singular.sum()), float(_entropy(singular).sum()), float(values.sum()), singular.max(), f"exact{by}"
        )
    return _lanczos(matrix, f"lanczos{by}")


def _lanczos(matrix: Array, by: str) -> Spectrum:
    """The sums by quadrature, tr f(G) = sum over q of q' f(G) q + mean over g of g' f(G) g for the Gram matrix G.

    The q are an orthonormal basis near the leading directions, whose part is thereby free of chance; the g are random
    signs with that part taken out (Meyer, Musco, Musco, Woodruff: Hutch++, SOSA 2021). Each term is a sum over the Ritz
    values of a Lanczos run that starts there, weighted by the first components of their vectors, squared.
    """
    held = list(_chunks(matrix))
    rng = np.random.default_rng(0)
    size = matrix.shape[1]
    leading = rng.standard_normal((size, LEADING))
    for _ in range(2):
        leading = np.linalg.qr(_gram_times(held, leading))[0]
    probes = rng.choice(np.array([-1.0, 1.0]), (size, PROBES))
    probes -= leading @ (leading.T @ probes)
    lengths = np.square(probes).sum(axis=0)
    starts = np.concatenate([leading, probes / np.sqrt(lengths)], axis=1)
    weights = np.concatenate([np.ones(LEADING), lengths / PROBES])
    diagonal, beside = _tridiagonal(held, starts)
    ritz, components = np.linalg.eigh(_matrices(diagonal, beside))
    ritz[ritz < FLOOR * ritz.max()] = 0.0
    singular = np.sqrt(ritz)
    quadrature = weights[:, None] * np.square(components[:, 0, :])
    squares = float(sum(np.square(chunk).sum() for chunk in held))
    total, entropy = float((quadrature * singular).sum()), float((quadrature * _entropy(singular)).sum())
    return Spectrum(total, entropy, squares, float(singular.max()), by)


def _gram_times(held: list[Array], vectors: Array) -> Array:
    total = np.zeros(vectors.shape)
    for chunk in held:
        total += chunk.T @ (chunk @ vectors)
    return total


def _tridiagonal(held: list[Array], starts: Array) -> tuple[Array, Array]:
    """A Lanczos run from each column, all at once: diagonals, shape (runs, steps), and what stands beside them."""
    basis = [starts]
    diagonal: list[Array] = []
    beside: list[Array] = []
    for _ in range(min(STEPS, len(starts))):
        following = _gram_times(held, basis[-1])
        diagonal.append((basis[-1] * following).sum(axis=0))
        for each in basis:  # rounding would let found directions come back
            following -= each * (each * following).sum(axis=0)
        norm = np.sqrt(np.square(following).sum(axis=0))
        goes_on = norm > FLOOR * np.max(diagonal)  # else its start lies in the span of few eigenvectors: all is found
        beside.append(np.where(goes_on, norm, 0.0))
        basis.append(np.where(goes_on, following / np.where(goes_on, norm, 1.0), 0.0))
    return np.stack(diagonal, axis=1), np.stack(beside, axis=1)[:, :-1]


def _matrices(diagonal: Array, beside: Array) -> Array:
    runs, steps = diagonal.shape
    made = np.zeros((runs, steps, steps))
    at = np.arange(steps)
    made[:, at, at] = diagonal
    made[:, at[1:], at[:-1]] = made[:, at[:-1], at[1:]] = beside
    return made


def _entropy(singular: Array) -> Array:
    """Each s log s, 0 for 0."""
    return singular * np.log(np.where(singular > 0.0, singular, 1.0))


def _chunks(matrix: Array) -> Iterator[Array]:
    step = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        chunk = matrix[start : start + step].astype(np.float64)
        yield chunk if np.isfinite(chunk).all() else np.nan_to_num(chunk, nan=0.0, posinf=0.0, neginf=0.0)
