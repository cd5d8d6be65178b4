"""The text that the models read, and the windows of each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from models.corpus import read_corpus

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Corpus:
    """The bytes for training, and the bytes of other files for evaluation."""

    training: Array
    held_out: Array

    def batch(self, seed: int, step: int, windows: int, length: int) -> Array:
        """The windows of one step, shape (windows, length + 1): they depend on the seed and the step only."""
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(self.training) - length - 1, (windows, 1))
        return self.training[starts + np.arange(length + 1)].astype(np.int64)

    def examination(self, windows: int, length: int) -> Array:
        """The windows for evaluation, shape (windows, length + 1): always the same, evenly spread."""
        starts = np.linspace(0, len(self.held_out) - length - 1, windows).astype(np.int64)[:, None]
        return self.held_out[starts + np.arange(length + 1)].astype(np.int64)


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    """The corpus: the source files of the running Python."""
    text = read_corpus()
    return Corpus(*(np.frombuffer(part, dtype=np.uint8) for part in (text.train, text.validation)))
