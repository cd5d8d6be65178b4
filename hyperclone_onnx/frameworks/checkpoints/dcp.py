"""Read a folder of torch.distributed.checkpoint tensor by tensor, without a process group.

The folder's metadata is a pickle, and a pickle can call any function. This metadata contains only names, sizes, types
and positions in files. So we allow only the classes that describe these, and refuse everything else. The tensors are
read by torch itself, with ``weights_only=True``.
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
    """Open a checkpoint and return its tensors by full name, in which dots join the levels.

    Values that are not tensors are left out.

    Raises:
        BadModel: the metadata cannot be read, or contains something that no checkpoint contains.
    """
    reader = _Reader(path)
    tensors: dict[str, StoredArray] = {}
    for name, entry in reader.described.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            kind = entry.properties.dtype
            read = partial(_read, reader, name, tuple(entry.size), kind)
            tensors[name] = StoredArray(tuple(entry.size), torch_dtype(kind), guarded(path, name, read))
    return tensors


def read_description(path: Path) -> Any:
    """Read the metadata of a checkpoint's folder: which tensors it has, and where in its files they are.

    Raises:
        BadModel: the metadata cannot be read, or contains something that no checkpoint contains.
    """
    return _Reader(path).described


def _read(reader: _Reader, name: str, shape: tuple[int, ...], kind: Any) -> Any:
    tensor = torch.empty(shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group: we need none
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as problem:  # it wraps the errors of the ranks
            raise next(failure for failure, _ in problem.failures.values()) from None
    return torch_array(tensor, torch_dtype(kind))


class _Reader(filesystem.FileSystemReader):
    """A torch reader of a folder whose metadata we read ourselves, so that it can run no code."""

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
            raise BadModel(f"{path}: its .metadata does not describe a checkpoint")

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        """Return the metadata that the constructor read."""
        described = dataclasses.replace(self.described)
        described.storage_meta = metadata.StorageMeta()
        return described


class _Unpickler(pickle.Unpickler):
    """An unpickler that creates only sizes, types, paths and descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of that name, if a checkpoint's metadata can contain it.

        Raises:
            BadModel: no checkpoint's metadata contains it.
        """
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name.endswith(("PosixPath", "WindowsPath")):
            return str if name.startswith("Windows") else super().find_class(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        if module in (metadata.__name__, filesystem.__name__):
            member = getattr({metadata.__name__: metadata, filesystem.__name__: filesystem}[module], name, None)
            plain = isinstance(member, type) and (dataclasses.is_dataclass(member) or issubclass(member, enum.Enum))
            if plain and "." not in name:
                return member
        raise BadModel(f"the checkpoint's .metadata would call {module}.{name}, which no checkpoint needs: not read")
