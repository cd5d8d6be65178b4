"""Safetensors files, written block by block, with an index where they are several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.frameworks.checkpoints import INDEX
from hyperclone_onnx.frameworks.slices import Array, read_slice, shape_of
from hyperclone_onnx.frameworks.stored_arrays import write_safetensors

Tensors = Mapping[str, ir.TensorProtocol]


class _Slices:
    """A stored tensor as `write_safetensors` takes it."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.tensor = tensor
        self.shape = shape_of(tensor)
        self.dtype: np.dtype[Any] = np.dtype(tensor.dtype.numpy())

    def __getitem__(self, windows: tuple[slice, ...]) -> Array:
        rest = [slice(0, size) for size in self.shape[len(windows) :]]
        return read_slice(self.tensor, (*windows, *rest))


def write_files(tensors: Tensors, folder: Path, largest_file: int) -> str:
    """Write ``model.safetensors``, or several files and their index as Hugging Face's libraries know them.

    Args:
        tensors: by name.
        folder: an existing folder.
        largest_file: bytes of weights in one file; a tensor that is larger has a file of its own.

    Returns:
        The name of the file, or of the index.

    Raises:
        CannotWrite: the folder cannot be written.
    """
    parts = split(tensors, largest_file)
    if len(parts) == 1:
        write_safetensors(folder / "model.safetensors", {name: _Slices(each) for name, each in tensors.items()})
        return "model.safetensors"
    placed: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, {name: _Slices(tensors[name]) for name in part})
        placed |= dict.fromkeys(part, file)
    total = sum(each.nbytes for each in tensors.values())
    try:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=1))
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
    return INDEX


def split(tensors: Tensors, largest_file: int) -> list[list[str]]:
    """The names of the tensors of each file, in their order."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        size = math.prod(shape_of(tensor)) * np.dtype(tensor.dtype.numpy()).itemsize
        if parts[-1] and held + size > largest_file:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts
