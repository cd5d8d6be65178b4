"""Patterns of file names that people give, such as ``onnx/*_q4.onnx``."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path


def is_excluded(inside: Path, patterns: Sequence[str]) -> bool:
    """Whether a file, by its path within its folder, matches one of some patterns."""
    return any(fnmatch.fnmatch(inside.as_posix(), pattern) for pattern in patterns)
