"""A folder of torch.distributed.checkpoint, read tensor by tensor and without a process group.

Its metadata is a pickle. Only names, sizes, types and places in files are in it, so of all that a pickle can call only
the classes that say these are let through; torch itself reads the tensors with ``weights_only=True``.
"""

from __future__ import annotations

import dataclasses
import enum
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadModel, first_line
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import (
    StoredArray,
    guarded,
    torch_array,
    torch_dtype,
)

try:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import filesystem, metadata
except ImportError as problem:
    raise MissingExtra("torch", problem) from problem


def read_dcp(path: Path) -> dict[str, StoredArray]:
    """The tensors of a checkpoint by their whole names, the levels joined by dots; what is no tensor is left out.

    Raises:
        BadModel: the metadata cannot be read, or holds what no checkpoint holds.
    """
    reader = _Reader(path)
    found: dict[str, StoredArray] = {}
    for name, entry in reader.described.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            kind = entry.properties.dtype
            read = partial(_read, reader, name, tuple(entry.size), kind)
            found[name] = StoredArray(tuple(entry.size), torch_dtype(kind), guarded(path, name, read))
    return found


def _read(reader: _Reader, name: str, shape: tuple[int, ...], kind: Any) -> Any:
    tensor = torch.empty(shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as problem:  # no Exception, but what wraps those of the ranks
            raise next(failure for failure, _ in problem.failures.values()) from None
    return torch_array(tensor, torch_dtype(kind))


class _Reader(filesystem.FileSystemReader):
    """The reader of a folder whose metadata was read with care."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with (path / ".metadata").open("rb") as file:
                self.described = _Unpickler(file).load()
            entries = self.described.state_dict_metadata
        except BadModel:
            raise
        except Exception as problem:  # a broken pickle raises nearly anything
            raise BadModel(f"{path}: its .metadata cannot be read ({first_line(problem, 160)})") from problem
        if not isinstance(entries, dict):
            raise BadModel(f"{path}: its .metadata is that of no checkpoint")

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        """What the constructor read."""
        described = dataclasses.replace(self.described)
        described.storage_meta = metadata.StorageMeta()
        return described


class _Unpickler(pickle.Unpickler):
    """Builds sizes, types, paths and the descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is one that a checkpoint's metadata has."""
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name.endswith(("PosixPath", "WindowsPath")):
            return str if name.startswith("Windows") else super().find_class(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        if module in (metadata.__name__, filesystem.__name__):
            found = getattr({metadata.__name__: metadata, filesystem.__name__: filesystem}[module], name, None)
            plain = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
            if plain and "." not in name:
                return found
        raise BadModel(f"the checkpoint's .metadata would call {module}.{name}, which no checkpoint needs: not read")
