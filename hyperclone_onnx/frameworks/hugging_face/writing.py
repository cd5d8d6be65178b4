"""Safetensors written as a stream: one tensor in memory at a time, in several files where one would be too large.

The format is safetensors' own (github.com/huggingface/safetensors: eight bytes of header length, a JSON header padded
with spaces, the tensors' bytes); the index is the one that transformers reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import CannotWrite, Refused
from hyperclone_onnx.frameworks.hugging_face.checkpoint import INDEX

Array = npt.NDArray[Any]

LARGEST_SHARD = 5_000_000_000
"""Bytes of one file, as transformers' own limit has long been."""

TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its shape, its type as numpy calls it, and how to get it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        size = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return int(np.prod(self.shape, dtype=np.int64)) * size


def write_weights(
    folder: Path,
    entries: Mapping[str, Entry],
    largest: int = LARGEST_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write `model.safetensors`, or its shards and their index; the names of the files.

    Raises:
        CannotWrite: the disk is full, or the folder cannot be written.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.nbytes > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.nbytes
    count = len(shards)
    files = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    done = 0
    try:
        for file, names in zip(files, shards, strict=True):
            for _ in _write_shard(folder / file, names, entries):
                done += 1
                if progress is not None:
                    progress(done, len(entries))
        if count > 1:
            index = {
                "metadata": {"total_size": sum(each.nbytes for each in entries.values())},
                "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            return [*files, INDEX]
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
    return files


def _write_shard(path: Path, names: Sequence[str], entries: Mapping[str, Entry]) -> Any:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entry = entries[name]
        if entry.dtype not in TYPES:
            raise Refused(f"{name}: safetensors has no type for {entry.dtype}")
        end = offset + entry.nbytes
        header[name] = {"dtype": TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            entry = entries[name]
            array = np.ascontiguousarray(entry.read())
            if array.shape != entry.shape or array.dtype.name != entry.dtype:
                raise AssertionError(f"{name}: {array.dtype} {array.shape} instead of {entry.dtype} {entry.shape}")
            file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
            yield name
