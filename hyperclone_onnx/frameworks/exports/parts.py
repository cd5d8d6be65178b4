"""The parts of a checkpoint: each is written by one process, and any number of processes makes the same parts.

A part has pieces of tensors: whole rows of the first axis. Its file is complete or it does not count, so a run that was
killed loses only the parts that it had begun.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.frameworks.slices import Windows, blocks, shape_of
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reading import loading

PIECE = 64 << 20
"""A piece has about this many bytes, or one row. A process holds one piece at a time."""

FEWEST = 64
"""A checkpoint has about this many parts or more, so that so many processes have work..."""

SMALLEST = 1 << 20
"""...but no part is smaller than this on purpose."""

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor."""

    path: str
    """The path of the parameter."""
    windows: Windows

    @property
    def offsets(self) -> tuple[int, ...]:
        """The indices of its first element."""
        return tuple(window.start for window in self.windows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(window.stop - window.start for window in self.windows)


Part = tuple[Piece, ...]


def parts_of(tensors: Mapping[str, ir.TensorProtocol], largest: int) -> list[Part]:
    """Divide tensors into parts of nearly equal size. It depends on shapes and types alone.

    Args:
        tensors: the tensors, by parameter path.
        largest: the most bytes of a part. A single row may be larger.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    wanted = min(largest, max(total // FEWEST, SMALLEST))
    parts: list[Part] = []
    pieces: list[Piece] = []
    filled = 0
    for piece, size in _pieces(tensors, min(PIECE, wanted)):
        if pieces and filled + size > wanted:
            parts.append(tuple(pieces))
            pieces, filled = [], 0
        pieces.append(piece)
        filled += size
    return [*parts, tuple(pieces)] if pieces else parts


def _pieces(tensors: Mapping[str, ir.TensorProtocol], size: int) -> Iterator[tuple[Piece, int]]:
    """All pieces of the tensors, with their bytes."""
    for path, tensor in tensors.items():
        shape, itemsize = shape_of(tensor), np.dtype(tensor.dtype.numpy()).itemsize
        for windows in list(blocks(shape, itemsize, size)) or [tuple(slice(0, length) for length in shape)]:
            piece = Piece(path, windows)
            yield piece, math.prod(piece.sizes) * itemsize


def identity(model: Path, plan: Plan, parts: Sequence[Part]) -> str:
    """A text that two runs share if the parts of one are right for the other: same model, plan and division."""
    files = sorted(loading.source_files(model, loading.load(model)))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    listed = [[(piece.path, piece.offsets, piece.sizes) for piece in part] for part in parts]
    data = json.dumps([plan.dumps(), stamps, listed]).encode()
    return hashlib.sha256(data).hexdigest()


def begin(folder: Path, wanted: str) -> str:
    """Prepare the folder of the parts. Parts of another run stay if they are right for this one.

    Args:
        folder: the folder of the parts.
        wanted: the identity of this run.

    Returns:
        A note for the user about the parts of an earlier run; empty if there are none.
    """
    known = folder / IDENTITY
    if folder.is_dir():
        if known.is_file() and known.read_text(encoding="utf-8") == wanted:
            return "parts of an earlier run that was not finished are used again"
        shutil.rmtree(folder)
        before = "an earlier run that was not finished had another model, plan or division: its parts were removed"
    else:
        before = ""
    folder.mkdir()
    known.write_text(wanted, encoding="utf-8")
    return before
