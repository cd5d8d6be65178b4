"""Writes tensors to given places in files, block by block, with several processes. All file formats use this module.

A tensor is computed in pieces (`tensors/table.py`). A piece is computed in working memory that is used again, and
written with `pwrite`. The files are the same for any number of processes, whichever process computes which piece.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.progress import Progress
from hyperclone_onnx.system.parallel import share_out, workers_for
from hyperclone_onnx.system.positioned import BINARY, write_at
from hyperclone_onnx.system.write_behind import WriteBehind, most_unwritten
from hyperclone_onnx.tensors.collapsed import LazyCollapsed
from hyperclone_onnx.tensors.grown_tensor import GrownTensor, LazyGrown
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows
from hyperclone_onnx.tensors.table import Piece

Array = npt.NDArray[Any]

CHUNK = 1 << 20
"""Tensors that do not grow are copied in blocks of this number of bytes."""

Streamed = Any
"""A tensor of a model, or an object with a shape, a numpy type, and rows that are arrays."""


@dataclass(frozen=True)
class Placed:
    """A tensor, and the file and the offset at which its bytes begin."""

    tensor: Streamed
    file: Path
    offset: int


@dataclass(frozen=True)
class Layout:
    """The content of all files to write."""

    sizes: dict[Path, int]
    """The number of bytes of each file."""
    fixed: Sequence[tuple[Path, int, bytes]]
    """(file, offset, bytes) of everything that is not a tensor."""
    tensors: Sequence[Placed]
    """The tensors and their places."""


Check = Callable[[], Callable[[Placed, Scratch], Any]]
"""Makes a function that is called with each tensor as soon as it is written, in the process that wrote it.

It is called once, when the files have their sizes and contain everything but the tensors. The function's answers are
pickled.
"""


def write(
    layout: Layout,
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    keep: bool = False,
    check: Check | None = None,
) -> list[Any]:
    """Write the files of a layout. Their space is reserved first, so that a full disk is reported at once.

    Args:
        layout: the content of the files.
        workers: the number of processes that compute and write (see `parallel.workers_for`).
        progress: called after each tensor, with the bytes of all written tensors and those of all tensors.
        keep: whether the files stay in the page cache, because they are read next.
        check: makes a function that looks at each written tensor.

    Returns:
        The answers of that function, in any order. Without it, nothing.

    Raises:
        CannotWrite: a file cannot be created, or the space is too small.
        BadModel: a source file cannot be read any more.
        Exception: whatever `check`, or the function that it makes, raises.
    """
    files: dict[Path, int] = {}
    try:
        for path, size in layout.sizes.items():
            files[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
            _reserve(files[path], size)
        for path, offset, data in layout.fixed:
            write_at(files[path], memoryview(data), offset)
        return _write_tensors(layout, files, workers, progress, keep, check)
    except OSError as problem:
        first = next(iter(layout.sizes), Path())
        raise CannotWrite(f"{first}: cannot be written ({problem.strerror or problem})") from problem
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _write_tensors(
    layout: Layout,
    files: dict[Path, int],
    workers: int | None,
    progress: Progress | None,
    keep: bool,
    check: Check | None,
) -> list[Any]:
    tensors, size = layout.tensors, sum(layout.sizes.values())
    sent = size if size > most_unwritten() else 0
    total, written = sum(_bytes(placed.tensor) for placed in tensors), 0
    checked = None if check is None else check()
    answers: list[Any] = []

    def tensor_written(done: tuple[int, Any]) -> None:
        nonlocal written
        count, answer = done
        written += count
        if checked is not None:
            answers.append(answer)
        if progress is not None:
            progress(written, total)

    with ExitStack() as stack:

        def writer() -> Callable[[int], tuple[int, Any]]:
            # In a worker process, `stack` is a copy: the worker's WriteBehind ends when the worker does.
            behind, scratch = stack.enter_context(WriteBehind(sent, keep=keep)), Scratch()

            def write_one(index: int) -> tuple[int, Any]:
                count = _write_tensor(tensors[index], files, behind, scratch)
                return count, None if checked is None else checked(tensors[index], scratch)

            return write_one

        largest_first = sorted(range(len(tensors)), key=lambda index: -_bytes(tensors[index].tensor))
        one_process = not all(_usable_after_fork(placed.tensor) for placed in tensors)
        share_out(writer, largest_first, 1 if one_process else workers_for(size, workers), tensor_written)
    return answers


def _usable_after_fork(tensor: Streamed) -> bool:
    """Whether a forked process can read the tensor. A tensor of another library may need threads of that library."""
    return isinstance(tensor, LazyGrown | LazyCollapsed | ir.ExternalTensor) or (
        isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray)
    )


def _bytes(tensor: Streamed) -> int:
    if isinstance(tensor, ir.TensorProtocol):
        return tensor.nbytes
    size: int = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    return size


def _write_tensor(placed: Placed, files: dict[Path, int], behind: WriteBehind, scratch: Scratch) -> int:
    """Write a tensor. Return the number of its bytes."""
    descriptor = files[placed.file]
    for piece in _pieces(placed.tensor):
        for array, offsets in piece(scratch):
            data = memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")
            for offset in offsets:
                write_at(descriptor, data, placed.offset + offset)
                behind.wrote(descriptor, placed.offset + offset, len(data))
    return _bytes(placed.tensor)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and reserve the space on the disk where the file system can do so."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as problem:
            if problem.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise
    os.ftruncate(descriptor, size)


def _pieces(tensor: Streamed) -> Iterator[Piece]:
    """The functions that compute or read the bytes of a tensor."""
    if isinstance(tensor, LazyGrown):
        grown: GrownTensor = tensor.grown.fresh()
        return grown.pieces()
    if isinstance(tensor, LazyCollapsed):
        return tensor.collapsed.pieces()
    if isinstance(tensor, ir.ExternalTensor):
        return _copied(tensor)
    if isinstance(tensor, ir.TensorProtocol):
        return iter((partial(_whole, tensor),))
    return _by_rows(tensor)


def _copied(tensor: ir.ExternalTensor) -> Iterator[Piece]:
    stored = StoredRows(tensor, 1, tensor.nbytes)

    def piece(start: int, scratch: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        yield stored.read_bytes(start, min(CHUNK, tensor.nbytes - start), scratch), [start]

    for start in range(0, tensor.nbytes, CHUNK):
        yield partial(piece, start)


def _whole(tensor: ir.TensorProtocol, _: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
    """The only piece of a tensor that is in memory, or that can only be computed as a whole."""
    yield np.frombuffer(tensor.tobytes(), dtype=np.uint8), [0]


def _by_rows(tensor: Any) -> Iterator[Piece]:
    shape = [int(size) for size in tensor.shape]
    size = np.dtype(tensor.dtype).itemsize

    def piece(start: int, end: int, _: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        rows = np.ascontiguousarray(tensor[start:end] if shape else np.asarray(tensor).reshape(1))
        yield rows, [start * math.prod(shape[1:]) * size]

    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, math.prod(shape[1:]) * size))
    for start in range(0, rows, step):
        yield partial(piece, start, min(start + step, rows))
    if hasattr(tensor, "release"):
        tensor.release()  # otherwise all tensors of a file would be in memory at its end
