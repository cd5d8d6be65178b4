"""What the models read: the source text of Python's own standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Tests, other people's packages, and tables that are generated rather than written.
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"}
HELD_OUT = 0.05


@dataclass(frozen=True)
class Corpus:
    """The bytes of all files, each after a zero byte; whole files are held out, chosen by a hash of their names."""

    training: Array
    held_out: Array

    def batch(self, seed: int, step: int, windows: int, length: int) -> Array:
        """The windows of one step, shape (windows, length + 1): a function of the seed and the step alone."""
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(self.training) - length - 1, (windows, 1))
        return self.training[starts + np.arange(length + 1)].astype(np.int64)

    def examination(self, windows: int, length: int) -> Array:
        """Windows spread evenly over what is held out, shape (windows, length + 1): always the same."""
        starts = np.linspace(0, len(self.held_out) - length - 1, windows).astype(np.int64)[:, None]
        return self.held_out[starts + np.arange(length + 1)].astype(np.int64)


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    """That of the Python which runs this."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        # _sysconfigdata is written when Python is built and tells of the builder.
        if EXCLUDED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        parts[int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32].append(b"\0" + file.read_bytes())
    training, held_out = (np.frombuffer(b"".join(parts[each]), dtype=np.uint8) for each in (False, True))
    return Corpus(training, held_out)
