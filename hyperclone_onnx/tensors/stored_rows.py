"""Reads stored tensors a few rows at a time, into memory that is used again.

A tensor in a file is read with `pread` and not mapped into memory, for two reasons. Mapped pages count as memory of
this process. And if somebody shortens the file while it is read, a mapping ends the process with a signal, whereas
`pread` reads fewer bytes, which we report.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.system.page_cache import BATCH, Stretches, forget
from hyperclone_onnx.system.positioned import BINARY, read_at
from hyperclone_onnx.tensors.assembled import DrawnTensor, JoinedTensor
from hyperclone_onnx.tensors.expert_parts import PartTensor, scaled
from hyperclone_onnx.tensors.parted import PartedTensor
from hyperclone_onnx.tensors.scratch import Scratch

Array = npt.NDArray[Any]


class ByteSource(Protocol):
    """Reads or computes any bytes of a tensor."""

    def fill(self, start: int, into: Array) -> None:
        """Fill `into` with the bytes of the tensor from `start` on."""

    def close(self) -> None:
        """Release files and memory. The next read opens them again."""


class StoredRows:
    """A stored tensor as rows of bytes.

    Args:
        tensor: the tensor. A tensor in a file is read from there, again for each request.
        count: the number of rows.
        width: the number of bytes in a row.
        forget: remove the bytes from the page cache after reading. A large file that is read once would fill it.
    """

    def __init__(self, tensor: ir.TensorProtocol, count: int, width: int, *, forget: bool = False) -> None:
        self.count, self.width = count, width
        self._tensor = tensor
        self._source = _byte_source(tensor, forget)
        self._memory: Array | None = None
        self._lock = threading.Lock()

    def read(self, first: int, count: int, scratch: Scratch, name: str = "rows") -> Array:
        """Rows [first, first + count) as bytes, shape (count, width). The caller must not change them.

        Args:
            first: the first row.
            count: the number of rows.
            scratch: holds the working arrays.
            name: the name of the working array that receives the rows.

        Raises:
            BadModel: the file cannot be read any more, or it ends before these rows.
        """
        if self._source is None:
            return self._in_memory()[first : first + count]
        into = scratch.array(name, (count, self.width), np.uint8)
        self._source.fill(first * self.width, into)
        return into

    def read_part(self, first: int, count: int, start: int, length: int, scratch: Scratch, name: str = "rows") -> Array:
        """Bytes [start, start + length) of each row in [first, first + count), shape (count, length).

        Raises:
            BadModel: see `read`.
        """
        if self._source is None:
            return self._in_memory()[first : first + count, start : start + length]
        # One large read is faster than many small ones that skip little.
        if length == self.width or length * 4 > self.width * 3 or self.width < mmap.PAGESIZE:
            return self.read(first, count, scratch, name)[:, start : start + length]
        into = scratch.array(name, (count, length), np.uint8)
        for row in range(count):
            self._source.fill((first + row) * self.width + start, into[row])
        return into

    def read_bytes(self, start: int, count: int, scratch: Scratch, name: str = "rows") -> Array:
        """Bytes [start, start + count) of the whole tensor, shape (count,).

        Raises:
            BadModel: see `read`.
        """
        if self._source is None:
            return self._in_memory().reshape(-1)[start : start + count]
        into = scratch.array(name, (count,), np.uint8)
        self._source.fill(start, into)
        return into

    def _in_memory(self) -> Array:
        with self._lock:
            if self._memory is None:
                array = self._tensor.numpy()
                if array.nbytes != self.count * self.width:  # several numbers to a byte
                    array = np.frombuffer(self._tensor.tobytes(), dtype=np.uint8)
                self._memory = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(self.count, self.width)
            return self._memory

    def close(self) -> None:
        """Release files and memory. The next read opens them again."""
        with self._lock:
            self._memory = None
        if self._source is not None:
            self._source.close()

    def __del__(self) -> None:
        self.close()


def _byte_source(tensor: ir.TensorProtocol, forget: bool) -> ByteSource | None:
    """The source of a tensor's bytes; None for a tensor in memory, and for one that is only available as a whole."""
    if isinstance(tensor, ir.ExternalTensor):
        return _FileBytes(tensor, forget)
    if isinstance(tensor, JoinedTensor) and tensor.has_whole_runs:
        return _JoinedBytes(tensor, forget)
    if isinstance(tensor, DrawnTensor):
        return _DrawnBytes(tensor)
    if isinstance(tensor, PartTensor) and tensor.dtype.bitwidth >= 8:
        return _PartBytes(tensor, forget)
    if isinstance(tensor, PartedTensor) and tensor.dtype.bitwidth >= 8:
        return _PartedBytes(tensor, forget)
    collapsed = getattr(tensor, "collapsed", None)  # its module imports this one
    return collapsed if collapsed is not None and collapsed.averages else None


class _FileBytes:
    """The bytes of a tensor in a file."""

    def __init__(self, tensor: ir.ExternalTensor, forget: bool) -> None:
        self._tensor = tensor
        self._file: int | None = None
        self._lock = threading.Lock()
        self._read = Stretches() if forget and tensor.nbytes > BATCH else None

    def fill(self, start: int, into: Array) -> None:
        if not into.size:
            return
        offset = (self._tensor.offset or 0) + start
        try:
            descriptor = self._descriptor()
            size = read_at(descriptor, memoryview(into.reshape(-1).data), offset)
        except OSError as problem:
            raise BadModel(f"{self._tensor.path}: cannot be read ({problem.strerror or problem})") from problem
        if size < into.size:
            raise BadModel(
                f"{self._tensor.path}: ends within tensor {self._tensor.name!r}: it was changed while being read"
            )
        if self._read is not None:
            forget(self._read.add(descriptor, offset, size))

    def _descriptor(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = os.open(self._tensor.path, os.O_RDONLY | BINARY)
            return self._file

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                os.close(file)


class _JoinedBytes:
    """The bytes of several tensors that are joined into one."""

    def __init__(self, tensor: JoinedTensor, forget: bool) -> None:
        self._tensor = tensor
        self._parts = [StoredRows(part, 1, part.nbytes, forget=forget) for part in tensor.parts]
        self._scratch = threading.local()

    def fill(self, start: int, into: Array) -> None:
        if not hasattr(self._scratch, "arrays"):
            self._scratch.arrays = Scratch()
        flat, filled = into.reshape(-1), 0
        for part, offset, size in self._tensor.places(start, into.size):
            flat[filled : filled + size] = self._parts[part].read_bytes(offset, size, self._scratch.arrays)
            filled += size

    def close(self) -> None:
        for part in self._parts:
            part.close()


class _DrawnBytes:
    """The bytes of numbers drawn by a law."""

    def __init__(self, tensor: DrawnTensor) -> None:
        self._tensor = tensor

    def fill(self, start: int, into: Array) -> None:
        item = self._tensor.kind.itemsize
        first, last = start // item, -(-(start + into.size) // item)
        content = np.ascontiguousarray(self._tensor.elements(first, last - first, Scratch())).view(np.uint8)
        into.reshape(-1)[...] = content[start - first * item :][: into.size]

    def close(self) -> None:
        pass


class _PartBytes:
    """The bytes of a part of another tensor."""

    def __init__(self, tensor: PartTensor, forget: bool) -> None:
        part = tensor.part
        self._item = tensor.dtype.bitwidth // 8
        self._width = part.run * self._item
        """The bytes of the part in a row."""
        self._first, self._scale = part.number * self._width, part.scale
        self._kind = np.dtype(tensor.dtype.numpy())
        self._rows = StoredRows(tensor.source, tensor.rows, part.of * self._width, forget=forget)
        self._scratch = threading.local()

    def fill(self, start: int, into: Array) -> None:
        if not into.size:
            return
        if not hasattr(self._scratch, "arrays"):
            self._scratch.arrays = Scratch()
        begin = start - start % self._item
        end = start + into.size + -(start + into.size) % self._item
        row, last = begin // self._width, -(-end // self._width)
        if last - row == 1:
            offset = begin - row * self._width
            content = self._rows.read_part(row, 1, self._first + offset, end - begin, self._scratch.arrays)
        else:
            content = self._rows.read_part(row, last - row, self._first, self._width, self._scratch.arrays)
        flat = np.ascontiguousarray(content).reshape(-1)
        if last - row > 1:
            flat = flat[begin - row * self._width :][: end - begin]
        numbers = scaled(flat.view(self._kind), self._scale)
        into.reshape(-1)[...] = numbers.view(np.uint8)[start - begin :][: into.size]

    def close(self) -> None:
        self._rows.close()


class _PartedBytes:
    """The bytes of a part of a tensor whose numbers are changed."""

    def __init__(self, tensor: PartedTensor, forget: bool) -> None:
        self._tensor, self._item = tensor, tensor.kind.itemsize
        self._part = _PartBytes(tensor.part, forget)

    def fill(self, start: int, into: Array) -> None:
        begin = start - start % self._item
        end = start + into.size + -(start + into.size) % self._item
        content = np.empty(end - begin, dtype=np.uint8)
        self._part.fill(begin, content)
        numbers = self._tensor.changed(begin // self._item, content.view(self._tensor.kind), Scratch())
        into.reshape(-1)[...] = np.ascontiguousarray(numbers).view(np.uint8)[start - begin :][: into.size]

    def close(self) -> None:
        self._part.close()
