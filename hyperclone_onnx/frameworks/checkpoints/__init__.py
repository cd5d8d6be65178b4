"""Read the checkpoints that trainers save, without the trainer.

In: a file or a folder. Out: a `StoredArray` for each name. Names, shapes and types are read at once; the values of an
array are read only when they are needed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.frameworks.checkpoints import manifest
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import Array, StoredArray, guarded, read_safetensors
from hyperclone_onnx.frameworks.targets import PICKLES

INDEX = "model.safetensors.index.json"
"""The file that says, for each tensor, which of several safetensors files holds it."""

TO_SAFETENSORS = "safetensors.torch.save_file(model.state_dict(), 'trained.safetensors')"


def read_weights(path: Path) -> dict[str, StoredArray]:
    """Open a checkpoint and return its arrays, by their names in the checkpoint.

    Args:
        path: a safetensors file, the index of several safetensors files, or a folder with either; an .npz file; a
            folder of torch.distributed.checkpoint or of Orbax; or a folder that `handoff` wrote. Reading never runs
            code from the checkpoint. Pickles are refused. The metadata of torch.distributed.checkpoint is a pickle too:
            we let it create only the plain classes that such metadata consists of.

    Raises:
        BadModel: the checkpoint cannot be read, or is truncated.
        BadRequest: we do not read this format; the message says what to save instead.
        MissingExtra: reading it needs a framework that is not installed.
    """
    if not path.exists():
        raise BadModel(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLES:
        raise BadRequest(f"{path}: a pickle may run any code and is not read; save the weights with {TO_SAFETENSORS}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.name.endswith(".index.json"):
        return _read_index(path)
    return read_safetensors(path)


def _read_folder(path: Path) -> dict[str, StoredArray]:
    if (path / manifest.NAME).is_file():
        weights = path / manifest.Manifest.read(path).weights
        if weights.resolve().parent != path.resolve():
            raise BadModel(f"{path / manifest.NAME}: it names {weights}, which is outside its folder")
        return read_weights(weights)
    if (path / ".metadata").is_file():
        from hyperclone_onnx.frameworks.checkpoints.dcp import read_dcp

        return read_dcp(path)
    orbax = _orbax_items(path)
    if orbax:
        from hyperclone_onnx.frameworks.checkpoints.orbax import read_orbax

        return {
            f"{item}.{name}" if item else name: array
            for item, folder in orbax.items()
            for name, array in read_orbax(folder).items()
        }
    if (path / INDEX).is_file():
        return _read_index(path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors(files[0])
    if files:
        raise BadRequest(f"{path}: {len(files)} safetensors files and no {INDEX}: give the path of one file")
    pickled = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
    if pickled is not None:
        raise BadRequest(
            f"{pickled}: a pickle may run any code and is not read; save the weights with {TO_SAFETENSORS}"
        )
    raise BadRequest(
        f"{path}: no checkpoint: it has neither safetensors, nor the .metadata of torch.distributed.checkpoint, "
        "nor the _METADATA of Orbax"
    )


def _orbax_items(path: Path) -> dict[str, Path]:
    """Find the items of an Orbax checkpoint: the folder of each item, by the item's name.

    A single item gets the empty name. A folder of steps is accepted if it has one step. The result is {} if the folder
    is not an Orbax checkpoint.
    """
    if (path / "_METADATA").is_file():
        return {"": path}
    items = sorted(file.parent for file in path.glob("*/_METADATA"))
    if items:
        return {"": items[0]} if len(items) == 1 else {item.name: item for item in items}
    steps = sorted({file.parent.parent for file in path.glob("*/*/_METADATA")}, key=lambda step: step.name)
    if len(steps) > 1:
        listed = ", ".join(step.name for step in steps)
        raise BadRequest(f"{path}: it holds the steps {listed}: name one, such as {steps[-1]}")
    return _orbax_items(steps[0]) if steps else {}


def _read_index(path: Path) -> dict[str, StoredArray]:
    try:
        where: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = dict(where)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadModel(f"{path}: not a readable index of safetensors files") from problem
    arrays: dict[str, StoredArray] = {}
    for file in sorted(set(names.values())):
        part = path.parent / str(file)
        if part.resolve().parent != path.parent.resolve():
            raise BadModel(f"{path}: it names {file!r}, which is outside its folder")
        arrays |= read_safetensors(part)
    missing = sorted(names.keys() - arrays.keys())
    if missing:
        raise BadModel(f"{path}: {names[missing[0]]} does not hold {missing[0]!r}")
    return {name: arrays[name] for name in names}


def _read_npz(path: Path) -> dict[str, StoredArray]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                member.removesuffix(".npy"): _npz_entry(path, archive, member)
                for member in archive.namelist()
                if member.endswith(".npy")
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as problem:
        raise BadModel(f"{path}: not a readable .npz file, or truncated ({problem})") from problem


def _npz_entry(path: Path, archive: zipfile.ZipFile, member: str) -> StoredArray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
    if dtype.kind not in "fiub":
        raise BadRequest(
            f"{path}: {member.removesuffix('.npy')!r} has the type {dtype}: .npz cannot hold bfloat16 (save float32 "
            "or safetensors)"
        )
    return StoredArray(shape, dtype, guarded(path, member, partial(_from_npz, path, member)))


def _from_npz(path: Path, member: str) -> Array:
    with np.load(path, allow_pickle=False) as arrays:
        array: Array = arrays[member.removesuffix(".npy")]
        return array
