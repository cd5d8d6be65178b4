"""Write a checkpoint of torch.distributed.checkpoint in parts, each by one process.

Every part is a checkpoint of its own with some rows of some tensors, which torch writes. In the end the files move into
one folder, and the descriptions of all parts are joined.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, CannotWrite
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.dcp import read_description
from hyperclone_onnx.frameworks.exports.parts import Part, Piece
from hyperclone_onnx.frameworks.exports.pytorch import KEY
from hyperclone_onnx.frameworks.slices import read_slice, shape_of

try:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import default_planner, metadata, planner

    from hyperclone_onnx.frameworks.compiling.namespaces.torch import dtype_of
    from hyperclone_onnx.frameworks.torch import as_torch
except ImportError as problem:
    raise MissingExtra("torch", problem) from problem

DATA = "__0_0.distcp"
"""The file with the tensors in the folder of a part."""

DESCRIPTION = ".metadata"
"""The file that describes a checkpoint. torch writes it last, so a part that has it is complete."""

Tensors = Mapping[str, ir.TensorProtocol]


class _Planner(default_planner.DefaultSavePlanner):  # type: ignore[misc]
    """Plans the pieces of one part, and computes the numbers of a piece when it is written."""

    def __init__(self, tensors: Tensors, part: Part) -> None:
        super().__init__()
        self.tensors = tensors
        self.pieces = {(_name(piece), piece.offsets): piece for piece in part}

    def create_local_plan(self) -> Any:
        self.plan = planner.SavePlan([self._item(piece) for piece in self.pieces.values()])
        return self.plan

    def create_global_plan(self, all_plans: list[Any]) -> Any:
        # The default would refuse a checkpoint that has a tensor in part.
        self.global_plan, self.metadata = default_planner.create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: Any) -> Any:
        index = write_item.index
        piece = self.pieces[index.fqn, tuple(index.offset)]
        return as_torch(read_slice(self.tensors[piece.path], piece.windows))

    def _item(self, piece: Piece) -> Any:
        tensor = self.tensors[piece.path]
        chunk = metadata.ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        properties = metadata.TensorProperties(dtype=dtype_of(int(tensor.dtype)))
        data = planner.TensorWriteData(chunk, properties, torch.Size(shape_of(tensor)))
        index = metadata.MetadataIndex(_name(piece), piece.offsets)
        return planner.WriteItem(index=index, type=planner.WriteItemType.SHARD, tensor_data=data)


def _name(piece: Piece) -> str:
    return f"{KEY}.{piece.path}"


def is_complete(folder: Path) -> bool:
    """Whether a part was written to its end."""
    try:
        described = read_description(folder)
        size = (folder / DATA).stat().st_size
    except (BadModel, OSError):
        return False
    return all(info.offset + info.length <= size for info in described.storage_data.values())


def write_part(tensors: Tensors, part: Part, folder: Path) -> None:
    """Write one part into a folder of its own. One piece at a time is in memory.

    Raises:
        CannotWrite: the folder cannot be written.
    """
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is no process group: a part needs none
            dcp.save({}, storage_writer=writer, planner=_Planner(tensors, part), no_dist=True)
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem


def join_parts(tensors: Tensors, parts: Sequence[Part], written: Sequence[Path], folder: Path) -> None:
    """Move the files of all parts into a folder, and describe them as one checkpoint.

    Args:
        tensors: the tensors.
        parts: the parts.
        written: for each part its folder.
        folder: the folder to make. ``dcp.load({"model": model.state_dict()}, checkpoint_id=folder)`` reads it.

    Raises:
        CannotWrite: a part is not what it should be, or a file cannot be moved.
    """
    entries: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    folder.mkdir()
    for number, (part, place) in enumerate(zip(parts, written, strict=True)):
        described = read_description(place)
        wanted = {(_name(piece), piece.offsets, piece.sizes) for piece in part}
        pieces = {
            (name, tuple(chunk.offsets), tuple(chunk.sizes))
            for name, entry in described.state_dict_metadata.items()
            for chunk in entry.chunks
        }
        if wanted != pieces:
            raise CannotWrite(f"{place}: does not have the tensors of part {number}: remove {place.parent} and repeat")
        name = f"__{number}_0.distcp"
        for key, entry in described.state_dict_metadata.items():
            entries.setdefault(key, dataclasses.replace(entry, chunks=[])).chunks.extend(entry.chunks)
        for index, info in described.storage_data.items():
            hint = next(i for i, chunk in enumerate(entries[index.fqn].chunks) if chunk.offsets == index.offset)
            key = metadata.MetadataIndex(index.fqn, index.offset, hint)
            stored[key] = dataclasses.replace(info, relative_path=name)
        (place / DATA).rename(folder / name)
    for path, tensor in tensors.items():
        volume = sum(math.prod(chunk.sizes) for chunk in entries[f"{KEY}.{path}"].chunks)
        if volume != math.prod(shape_of(tensor)):
            raise CannotWrite(f"{folder}: the parts have {volume} numbers of {path}, of {math.prod(shape_of(tensor))}")
    paths = {f"{KEY}.{path}": (KEY, path) for path in tensors}
    joined = metadata.Metadata(entries, paths, stored, metadata.StorageMeta(), "1.0.0")
    (folder / DESCRIPTION).write_bytes(pickle.dumps(joined))
