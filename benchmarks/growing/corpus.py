"""The text that the models read, and the windows of each step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
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


@lru_cache(maxsize=2)
def corpus(tokens: Path | None = None) -> Corpus:
    """The corpus: the source files of the running Python, as bytes or as the tokens in a file of `write_tokens`."""
    if tokens is not None:
        with np.load(tokens) as stored:
            return Corpus(stored["training"], stored["held_out"])
    text = read_corpus()
    return Corpus(*(np.frombuffer(part, dtype=np.uint8) for part in (text.train, text.validation)))


def write_tokens(vocabulary: int, folder: Path) -> Path:
    """Train a byte-level BPE on the training files, and write both parts of the corpus as its tokens.

    Needs the package tokenizers. If the file is there already, it is not written again.
    """
    path = folder / f"tokens-{vocabulary}.npz"
    if path.exists():
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = read_corpus()
    parts = [part.decode("utf-8", errors="replace") for part in (text.train, text.validation)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(parts[0].splitlines(keepends=True), trainer)
    tokens = [
        np.array([token for one in bpe.encode_batch(part.splitlines(keepends=True)) for token in one.ids], np.uint16)
        for part in parts
    ]
    partial = path.with_name(f"{path.stem}.partial.npz")
    np.savez(partial, training=tokens[0], held_out=tokens[1])
    os.replace(partial, path)
    return path
