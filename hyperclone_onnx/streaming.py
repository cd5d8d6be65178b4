"""Tensors into files at given places, block by block, by a few threads: the engine behind every format.

A tensor is made of pieces (`grown_table.py`); a thread makes a piece in working memory of its own and writes it with
`pwrite`. Nothing depends on which thread makes what, or when: the files are the same for any number of them. numpy and
the system calls let other threads run, so that two cores are used by two threads.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.grown_table import Piece
from hyperclone_onnx.grown_tensor import GrownTensor, LazyGrown
from hyperclone_onnx.positioned import BINARY, write_at
from hyperclone_onnx.scratch import Scratch
from hyperclone_onnx.stored_rows import StoredRows

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""

CHUNK = 1 << 20
"""What is merely copied is copied in blocks of this many bytes."""

Job = Callable[[Scratch], None]


Streamed = Any
"""A tensor of a model, or anything that has a shape, a numpy type and gives its rows as arrays."""


@dataclass(frozen=True)
class Placed:
    """A tensor and where its bytes belong."""

    tensor: Streamed
    file: Path
    offset: int


@dataclass(frozen=True)
class Layout:
    """The files to write: how long each is, what is in it besides tensors, and the tensors."""

    sizes: dict[Path, int]
    fixed: Sequence[tuple[Path, int, bytes]]
    """(file, offset, bytes)"""
    tensors: Sequence[Placed]


def workers_for(wanted: int | None = None) -> int:
    """How many threads write."""
    return max(1, wanted if wanted is not None else min(4, _cores()))


def _cores() -> int:
    with suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write(layout: Layout, workers: int | None = None, progress: Progress | None = None) -> None:
    """Write the files of a layout; all their space is taken first, so that a full disk is told at once.

    Raises:
        CannotWrite: a file cannot be made, or there is too little space.
        BadModel: a source cannot be read any more.
    """
    files: dict[Path, int] = {}
    try:
        for path, size in layout.sizes.items():
            files[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
            _reserve(files[path], size)
        for path, offset, data in layout.fixed:
            write_at(files[path], memoryview(data), offset)
        run(_jobs(layout.tensors, files, progress), workers)
    except OSError as problem:
        first = next(iter(layout.sizes), Path())
        raise CannotWrite(f"{first}: cannot be written ({problem.strerror or problem})") from problem
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as problem:
            if problem.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise
    os.ftruncate(descriptor, size)


# -- jobs -------------------------------------------------------------------------------------------------


def run(jobs: Iterator[Job], workers: int | None = None) -> None:
    """Do all jobs, each with working memory of its thread; the first error ends all, and is raised.

    Jobs are taken in order, one by one, when a thread is free; the calling thread is one of them.
    """
    lock = threading.Lock()
    failed: list[BaseException] = []

    def work() -> None:
        scratch = Scratch()
        while True:
            try:
                with lock:
                    job = None if failed else next(jobs, None)
                if job is None:
                    return
                job(scratch)
            except BaseException as problem:
                failed.append(problem)
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers_for(workers) - 1)]
    try:
        for thread in threads:
            thread.start()
        work()
    except BaseException as problem:  # a signal between two jobs
        failed.append(problem)
    for thread in threads:  # none is left behind: it would write into files that are closed
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as problem:
                failed.append(problem)
    if failed:
        raise failed[0]


def _jobs(tensors: Sequence[Placed], files: dict[Path, int], progress: Progress | None) -> Iterator[Job]:
    """What to do, in order: before the pieces of a tensor what the next one needs done before its own."""
    lock = threading.Lock()
    done = 0

    def one_more() -> None:
        nonlocal done
        with lock:
            done += 1
            if progress is not None:
                progress(done, len(tensors))

    def begun(index: int) -> tuple[Iterator[Job], Iterator[Piece]]:
        return prepared(tensors[index].tensor) if index < len(tensors) else (iter(()), iter(()))

    preparations, pieces = begun(0)
    yield from preparations
    for index, placed in enumerate(tensors):
        preparations, following = begun(index + 1)
        yield from preparations
        remaining = _Countdown(one_more)
        for piece in pieces:
            remaining.more()
            yield partial(_write_piece, files[placed.file], placed.offset, piece, remaining)
        remaining.end()
        pieces = following


class _Countdown:
    """Calls back once when as many parts have ended as were begun, and no more will begin."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._lock, self._left, self._ended = threading.Lock(), 1, ended

    def more(self) -> None:
        with self._lock:
            self._left += 1

    def end(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._ended()


def _write_piece(descriptor: int, base: int, piece: Piece, remaining: _Countdown, scratch: Scratch) -> None:
    for array, offsets in piece(scratch):
        data = memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")
        for offset in offsets:
            write_at(descriptor, data, base + offset)
    remaining.end()


def prepared(tensor: Streamed) -> tuple[Iterator[Job], Iterator[Piece]]:
    """What is worth doing before a tensor's pieces, and the pieces that make its bytes."""
    if isinstance(tensor, LazyGrown):
        grown: GrownTensor = tensor.grown.fresh()
        return grown.preparations(), grown.pieces()
    if isinstance(tensor, ir.ExternalTensor):
        return iter(()), _copied(tensor)
    if isinstance(tensor, ir.TensorProtocol):
        return iter(()), iter((partial(_whole, tensor),))
    return iter(()), _by_rows(tensor)


def _copied(tensor: ir.ExternalTensor) -> Iterator[Piece]:
    stored = StoredRows(tensor, 1, tensor.nbytes)

    def piece(start: int, scratch: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        yield stored.read_bytes(start, min(CHUNK, tensor.nbytes - start), scratch), [start]

    for start in range(0, tensor.nbytes, CHUNK):
        yield partial(piece, start)


def _whole(tensor: ir.TensorProtocol, _: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
    """A tensor that lies in memory, or that can only be computed whole."""
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
