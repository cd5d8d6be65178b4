"""Noise is normal and independent, and the same in whatever window it is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from hyperclone_onnx.tensors.noise import draw, key_of, quantiles
from hyperclone_onnx.tensors.scratch import Scratch


def table(rows: int, columns: int, seed: int = 0, repeat: int = 0, name: str = "w") -> np.ndarray:
    return draw(key_of(name, seed, repeat), columns, (0, rows), (0, columns), Scratch()).copy()


@pytest.mark.parametrize("columns", [1, 3, 4, 37, 128])
def test_any_window_is_that_part_of_the_whole(columns: int) -> None:
    whole, scratch = table(23, columns), Scratch()
    for top, height in ((0, 23), (5, 1), (7, 16)):
        for left in range(0, columns, 5):
            for breadth in (1, 2, columns - left):
                breadth = min(breadth, columns - left)
                window = draw(key_of("w", 0, 0), columns, (top, height), (left, breadth), scratch)
                np.testing.assert_array_equal(window, whole[top : top + height, left : left + breadth])


def test_noise_is_normal() -> None:
    """The moments and the shares of the tails of four million draws are right, within five standard errors."""
    drawn = table(2048, 2048).astype(np.float64).reshape(-1)
    error = 1 / np.sqrt(drawn.size)
    assert abs(drawn.mean()) < 5 * error
    assert abs((drawn**2).mean() - 1) < 5 * np.sqrt(2) * error
    assert abs((drawn**3).mean()) < 5 * np.sqrt(15) * error
    assert abs((drawn**4).mean() - 3) < 5 * np.sqrt(96) * error + 2e-3  # the table ends at 4.3
    for edge, share in ((1.0, 0.317311), (2.0, 0.0455003), (3.0, 0.0026998)):
        assert abs((np.abs(drawn) > edge).mean() - share) < 5 * np.sqrt(share) * error + 2e-5
    assert float(np.mean(quantiles().astype(np.float64) ** 2)) == pytest.approx(1.0, abs=1e-7)


def test_neighbours_rows_repeats_seeds_and_tensors_are_independent() -> None:
    first = table(512, 512)
    others = {
        "the next column": np.roll(first, 1, axis=1),
        "the next row": np.roll(first, 1, axis=0),
        "another lane": np.roll(first, 4, axis=1),
        "another repeat": table(512, 512, repeat=1),
        "another seed": table(512, 512, seed=1),
        "another tensor": table(512, 512, name="v"),
    }
    for name, other in others.items():
        correlation = float(np.mean(first * other))
        assert abs(correlation) < 5 / 512, name
