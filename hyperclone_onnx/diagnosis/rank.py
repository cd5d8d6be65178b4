"""The effective rank of a matrix: the number of directions that it uses.

For singular values s_k, with p_k = s_k / sum of s, the effective rank is exp(- sum of p_k log p_k) (Roy and Vetterli:
The effective rank, EUSIPCO 2007). It is 1 if only one singular value is not zero, and n if n singular values are equal
and the others are zero. The stable rank is the sum of s_k^2, divided by the largest s_k^2. Equal clones add nothing to
either rank: a matrix that is grown symmetrically has the ranks of its source.

If the smaller side of a matrix has at most `EXACT` entries, its singular values are the roots of the eigenvalues of the
Gram matrix, in float64. For a larger matrix the sums are estimated by stochastic Lanczos quadrature (Ubaru, Chen, Saad:
Fast estimation of tr(f(A)), SIAM J. Matrix Anal. Appl. 38, 2017), from `LEADING` + `PROBES` vectors and `STEPS` steps,
with an error of a few percent. For a matrix with more than `LARGEST` elements, they are estimated from a sample of its
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hyperclone_onnx.diagnosis.distance import Array
from hyperclone_onnx.diagnosis.weights import Layout

EXACT = 1280
"""The longest smaller side for which singular values are computed exactly."""
PROBES = 8
"""The number of random vectors of an estimate."""
LEADING = 24
"""The number of leading directions that an estimate treats exactly."""
STEPS = 40
"""The number of Lanczos steps of an estimate."""
FLOOR = 1e-12
"""Eigenvalues below this fraction of the largest one are rounding errors."""
LARGEST = 1 << 27
"""From matrices with more elements than this, a sample of the rows is taken."""
CHUNK = 1 << 22
"""The number of elements that are converted to float64 at a time."""


class Spectrum:
    """The ranks of a matrix, from sums over its singular values.

    Args:
        total: the sum of s.
        entropy: the sum of s log s.
        squares: the sum of s^2.
        largest: the largest s.
        by: how the sums were computed.
    """

    def __init__(self, total: float, entropy: float, squares: float, largest: float, by: str) -> None:
        self.effective = math.exp(math.log(total) - entropy / total) if total > 0.0 else 0.0
        self.stable = squares / largest**2 if largest > 0.0 else 0.0
        self.by = by


def as_matrix(array: Array, table: Layout) -> Array | None:
    """The matrix of a tensor whose rank is reported; None where a side has one entry only.

    The rows are the axes that a contraction sums over, and the columns are the other axes. If the plan marks no such
    axes, the rows are the first axis.

    Args:
        array: the tensor, in the shape `table.shape`.
        table: its layout.
    """
    places, rest = table.places(shared=True), table.places(shared=False)
    if not places and len(table.axes) > 1:
        matrix = array.reshape(table.axes[0], -1)
    else:
        rows = math.prod(array.shape[place] for place in places)
        matrix = array.transpose(*places, *rest).reshape(rows, -1)
    return matrix if min(matrix.shape) > 1 else None


def spectrum(matrix: Array, exact: int = EXACT) -> Spectrum:
    """The ranks of a matrix of any floating-point type. Elements that are not finite count as zero.

    Args:
        matrix: the matrix.
        exact: the longest smaller side for which the ranks are computed exactly.
    """
    by = ""
    if matrix.size > LARGEST:
        rows = max(1, LARGEST // matrix.shape[1])
        sample = np.sort(np.random.default_rng(0).choice(len(matrix), rows, replace=False))
        by = f", {rows} of {len(matrix)} rows"
        matrix = matrix[sample]
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
    """Estimate the sums by quadrature: tr f(G) = sum over q of q' f(G) q + mean over g of g' f(G) g.

    G is the Gram matrix. The q are an orthonormal basis near the leading directions, whose contribution therefore has
    no random error. The g are vectors of random signs, orthogonalised to the q (Meyer, Musco, Musco, Woodruff: Hutch++,
    SOSA 2021). Each term is a sum over the Ritz values of a Lanczos run that starts at q or g, weighted by the squared
    first components of the Ritz vectors.
    """
    chunks = list(_chunks(matrix))
    rng = np.random.default_rng(0)
    size = matrix.shape[1]
    leading = rng.standard_normal((size, LEADING))
    for _ in range(2):
        leading = np.linalg.qr(_gram_times(chunks, leading))[0]
    probes = rng.choice(np.array([-1.0, 1.0]), (size, PROBES))
    probes -= leading @ (leading.T @ probes)
    lengths = np.square(probes).sum(axis=0)
    starts = np.concatenate([leading, probes / np.sqrt(lengths)], axis=1)
    weights = np.concatenate([np.ones(LEADING), lengths / PROBES])
    diagonal, off_diagonal = _tridiagonal(chunks, starts)
    ritz, components = np.linalg.eigh(_matrices(diagonal, off_diagonal))
    ritz[ritz < FLOOR * ritz.max()] = 0.0
    singular = np.sqrt(ritz)
    quadrature = weights[:, None] * np.square(components[:, 0, :])
    squares = float(sum(np.square(chunk).sum() for chunk in chunks))
    total, entropy = float((quadrature * singular).sum()), float((quadrature * _entropy(singular)).sum())
    return Spectrum(total, entropy, squares, float(singular.max()), by)


def _gram_times(chunks: list[Array], vectors: Array) -> Array:
    """The Gram matrix, times vectors, from chunks of rows of the matrix."""
    total = np.zeros(vectors.shape)
    for chunk in chunks:
        total += chunk.T @ (chunk @ vectors)
    return total


def _tridiagonal(chunks: list[Array], starts: Array) -> tuple[Array, Array]:
    """A Lanczos run from each column of `starts`, all at once.

    Returns:
        The diagonals of the tridiagonal matrices, shape (runs, steps), and their off-diagonals, (runs, steps - 1).
    """
    basis = [starts]
    diagonal: list[Array] = []
    off_diagonal: list[Array] = []
    for _ in range(min(STEPS, len(starts))):
        following = _gram_times(chunks, basis[-1])
        diagonal.append((basis[-1] * following).sum(axis=0))
        for vectors in basis:  # rounding errors would let earlier directions return
            following -= vectors * (vectors * following).sum(axis=0)
        norm = np.sqrt(np.square(following).sum(axis=0))
        goes_on = norm > FLOOR * np.max(diagonal)  # a run is complete once it spans the eigenvectors of its start
        off_diagonal.append(np.where(goes_on, norm, 0.0))
        basis.append(np.where(goes_on, following / np.where(goes_on, norm, 1.0), 0.0))
    return np.stack(diagonal, axis=1), np.stack(off_diagonal, axis=1)[:, :-1]


def _matrices(diagonal: Array, off_diagonal: Array) -> Array:
    """Symmetric tridiagonal matrices, shape (runs, steps, steps)."""
    runs, steps = diagonal.shape
    matrices = np.zeros((runs, steps, steps))
    index = np.arange(steps)
    matrices[:, index, index] = diagonal
    matrices[:, index[1:], index[:-1]] = matrices[:, index[:-1], index[1:]] = off_diagonal
    return matrices


def _entropy(singular: Array) -> Array:
    """The product s log s for each singular value s; 0 for 0."""
    return singular * np.log(np.where(singular > 0.0, singular, 1.0))


def _chunks(matrix: Array) -> Iterator[Array]:
    step = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        chunk = matrix[start : start + step].astype(np.float64)
        yield chunk if np.isfinite(chunk).all() else np.nan_to_num(chunk, nan=0.0, posinf=0.0, neginf=0.0)
