"""Writes safetensors files. Tensors of any size are streamed in bounded memory: stored, grown, or given by their rows.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of the header, the header as JSON,
and the bytes of the tensors without gaps. Several files have an index file beside them, like those of transformers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.progress import Progress
from hyperclone_onnx.tensors.grown_tensor import GrownTensor
from hyperclone_onnx.writing.onnx_files import shard_name
from hyperclone_onnx.writing.streaming import Layout, Placed, Streamed, write

NAME = "model.safetensors"
LARGEST_FILE = 5_000_000_000
"""The most bytes of weights in one file, where nobody asks for another number. transformers had it for a long time."""
HEADER = 4096
"""The header is padded with spaces to multiples of this number of bytes, so that tensors begin at a page."""

TYPES = {
    ir.DataType.DOUBLE: "F64",
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.INT16: "I16",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT64: "U64",
    ir.DataType.UINT32: "U32",
    ir.DataType.UINT16: "U16",
    ir.DataType.UINT8: "U8",
    ir.DataType.BOOL: "BOOL",
}


class Rows(Protocol):
    """An object whose rows can be read: a lazy tensor, a slice of a safetensors file, a memory map."""

    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def dtype(self) -> Any: ...  # noqa: D102

    def __getitem__(self, window: Any) -> Any: ...


Tensor = GrownTensor | ir.TensorProtocol | Rows
"""A grown tensor, a tensor of a model, or an object with a shape, a numpy (or onnx_ir) type and rows."""


def write_safetensors(
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    max_shard_size: int | None = None,
    *,
    name: str = NAME,
    metadata: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write tensors as ``model.safetensors``, or as several files with ``model.safetensors.index.json``.

    Args:
        tensors: the tensors by name, in the order in which they fill the files.
        folder: an existing folder. After an error it may contain incomplete files, which the caller removes.
        max_shard_size: the most bytes of tensors in a file. A larger tensor gets a file for itself.
        name: the name of the file. Several files get this name with numbers.
        metadata: texts for the header, such as ``{"format": "pt"}``.
        workers: the number of processes that compute and write (see `parallel.workers_for`). The files do not depend
            on it.
        progress: called after each tensor, with the bytes of all written tensors and those of all tensors.

    Returns:
        The written files, the index last.

    Raises:
        BadRequest: the format does not have the type of a tensor, or `max_shard_size` is below 1.
        CannotWrite, BadModel: see `streaming.write`.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise BadRequest(f"max_shard_size is {max_shard_size}: a file needs at least 1 byte")
    directory = Path(folder)
    sizes = {key: _bytes(key, tensor) for key, tensor in tensors.items()}
    shards = list(_shards(sizes, max_shard_size))
    layouts: dict[Path, int] = {}
    fixed: list[tuple[Path, int, bytes]] = []
    placed: list[Placed] = []
    for index, names in enumerate(shards):
        path = directory / shard_name(name, index, len(shards))
        # With the widest elements first, every tensor begins at a multiple of its element size.
        names.sort(key=lambda key: -_type(key, tensors[key]).bitwidth)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for key in names:
            shape = [int(size) for size in _shape(tensors[key])]
            kind = TYPES[_type(key, tensors[key])]
            header[key] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + sizes[key]]}
            end += sizes[key]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(len(text) + 8) % HEADER)
        fixed.append((path, 0, len(text).to_bytes(8, "little") + text))
        base = 8 + len(text)
        placed += [Placed(_streamed(tensors[key]), path, base + header[key]["data_offsets"][0]) for key in names]
        layouts[path] = base + end
    if len(shards) > 1:
        path = directory / f"{name}.index.json"
        file_of = {key: shard_name(name, index, len(shards)) for index, names in enumerate(shards) for key in names}
        index_of_files = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(file_of.items()))}
        text = (json.dumps(index_of_files, indent=2, ensure_ascii=False) + "\n").encode()
        layouts[path] = len(text)
        fixed.append((path, 0, text))
    write(Layout(layouts, fixed, placed), workers, progress)
    return list(layouts)


def _shards(sizes: Mapping[str, int], limit: int | None) -> Iterator[list[str]]:
    """The names of the tensors in each file."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and limit is not None and total + size > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _type(name: str, tensor: Tensor) -> ir.DataType:
    dtype = tensor.dtype
    kind = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))
    if kind not in TYPES:
        raise BadRequest(f"{name!r} is of the type {kind.name.lower()}, which safetensors files do not hold")
    return kind


def _shape(tensor: Tensor) -> Sequence[int]:
    if isinstance(tensor, GrownTensor):
        return tensor.stored_shape
    shape: Any = tensor.shape
    return tuple(shape.numpy() if isinstance(shape, ir.Shape) else shape)


def _bytes(name: str, tensor: Tensor) -> int:
    return math.prod(_shape(tensor)) * _type(name, tensor).bitwidth // 8


def _streamed(tensor: Tensor) -> Streamed:
    if isinstance(tensor, GrownTensor):
        return tensor.as_lazy("")
    return tensor
