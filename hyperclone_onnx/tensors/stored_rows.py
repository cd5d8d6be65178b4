"""Stored tensors read a few rows at a time, into memory that is used again.

A tensor that lies in a file is read with `pread`, not mapped: mapped pages would count as this process's memory, and
a file that is cut short while it is read would be a signal instead of an error.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.system.page_cache import BATCH, Stretches, forget
from hyperclone_onnx.system.positioned import BINARY, read_at
from hyperclone_onnx.tensors.scratch import Scratch

Array = npt.NDArray[Any]


class StoredRows:
    """A stored tensor as rows of bytes.

    Args:
        tensor: the tensor; one in a file is read from there whenever rows are asked for.
        count: the number of rows.
        width: the bytes of a row.
        forget: let the page cache forget what was read: a large file that is read once would fill it.
    """

    def __init__(self, tensor: ir.TensorProtocol, count: int, width: int, *, forget: bool = False) -> None:
        self.count, self.width = count, width
        self._tensor = tensor
        self._external = tensor if isinstance(tensor, ir.ExternalTensor) else None
        self._file: int | None = None
        self._memory: Array | None = None
        self._lock = threading.Lock()
        self._read = Stretches() if forget and tensor.nbytes > BATCH else None

    def read(self, first: int, count: int, scratch: Scratch, name: str = "rows") -> Array:
        """Rows [first, first + count) as bytes, shape (count, width); not to be changed.

        Raises:
            BadModel: the file ends before them, or cannot be read any more.
        """
        if self._external is None:
            return self._in_memory()[first : first + count]
        into = scratch.array(name, (count, self.width), np.uint8)
        self._pread((self._external.offset or 0) + first * self.width, into)
        return into

    def read_part(self, first: int, count: int, start: int, length: int, scratch: Scratch, name: str = "rows") -> Array:
        """Bytes [start, start + length) of each of some rows, shape (count, length)."""
        if self._external is None:
            return self._in_memory()[first : first + count, start : start + length]
        if length == self.width or length * 4 > self.width * 3 or self.width < mmap.PAGESIZE:
            return self.read(first, count, scratch, name)[:, start : start + length]
        into = scratch.array(name, (count, length), np.uint8)
        base = (self._external.offset or 0) + start
        for row in range(count):
            self._pread(base + (first + row) * self.width, into[row])
        return into

    def read_bytes(self, start: int, count: int, scratch: Scratch, name: str = "rows") -> Array:
        """Some bytes, wherever rows begin, shape (count,)."""
        if self._external is None:
            return self._in_memory().reshape(-1)[start : start + count]
        into = scratch.array(name, (count,), np.uint8)
        self._pread((self._external.offset or 0) + start, into)
        return into

    def _pread(self, offset: int, into: Array) -> None:
        if not into.size:
            return
        path = self._external.path if self._external is not None else ""
        try:
            descriptor = self._descriptor()
            got = read_at(descriptor, memoryview(into.reshape(-1).data), offset)
        except OSError as problem:
            raise BadModel(f"{path}: cannot be read ({problem.strerror or problem})") from problem
        if got < into.size:
            raise BadModel(f"{path}: ends within tensor {self._tensor.name!r}: it was changed while being read")
        if self._read is not None:
            forget(self._read.add(descriptor, offset, got))

    def _descriptor(self) -> int:
        with self._lock:
            if self._file is None:
                assert self._external is not None
                self._file = os.open(self._external.path, os.O_RDONLY | BINARY)
            return self._file

    def _in_memory(self) -> Array:
        with self._lock:
            if self._memory is None:
                array = self._tensor.numpy()
                if array.nbytes != self.count * self.width:  # several numbers to a byte
                    array = np.frombuffer(self._tensor.tobytes(), dtype=np.uint8)
                self._memory = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(self.count, self.width)
            return self._memory

    def close(self) -> None:
        """Give back the file and the memory; reading opens them again."""
        with self._lock:
            file, self._file, self._memory = self._file, None, None
        if file is not None:
            with suppress(OSError):
                os.close(file)

    def __del__(self) -> None:
        self.close()
