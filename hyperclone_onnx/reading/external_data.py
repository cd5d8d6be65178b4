"""Checks the data files of a model: they are regular files in the model's own folder, and hold all of its tensors.

Several tensors may share the same bytes: they are only read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel


def place(file: Path, tensor: ir.ExternalTensor) -> None:
    """Set the folder of a tensor's data file, and check that the tensor's bytes are in this file.

    Raises:
        BadModel: the data file is missing, is too short, or is not in the model's tree.
    """
    folder = _folder_of_data(file, tensor)
    _check_range(file, tensor, (folder / str(tensor.location)).stat().st_size)
    tensor.base_dir = folder


def _folder_of_data(file: Path, tensor: ir.ExternalTensor) -> Path:
    """The folder in which the data file of a tensor is looked for: the model's folder, or that of the link to it."""
    location = str(tensor.location)
    parts = PurePosixPath(location).parts
    outside = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or ".." in parts
    if os.name == "nt":
        outside = outside or ".." in PureWindowsPath(location).parts or PureWindowsPath(location).is_absolute()
    if outside:
        raise BadModel(f"{file}: tensor {tensor.name!r} lies outside the model's folder ({location})")
    own = file.resolve().parent
    beside_link = file.absolute().parent
    if file.is_symlink() and _exists(beside_link / location):
        _check_target(file, location, (beside_link / location).resolve(), [own, beside_link.resolve()])
        folder = beside_link
    else:
        _check_no_links(file, location, own)
        folder = own
    try:
        status = (folder / location).stat()
    except (OSError, ValueError) as problem:
        raise BadModel(f"{file}: its data file {location} is missing (looked in {own})") from problem
    if not stat.S_ISREG(status.st_mode):
        raise BadModel(f"{file}: its data file {location} is no regular file")
    return folder


def _exists(path: Path) -> bool:
    """Whether a file, a folder or a link has this path, even a broken link."""
    try:
        path.lstat()
    except (OSError, ValueError):  # ValueError: no file can have this name
        return False
    return True


def _check_target(file: Path, location: str, target: Path, allowed: list[Path]) -> None:
    """Refuse a data file if links lead out of the model's folder.

    In the cache of a model hub, the model and its data are links into one folder of blobs. This is allowed.
    """
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise BadModel(
            f"{file}: its data file {location} is a link to {target}, which is outside the folder of the model "
            f"({allowed[0]}); put the file itself beside the model"
        )


def _check_no_links(file: Path, location: str, folder: Path) -> None:
    """Refuse a data file that is a link, or lies in a folder that is a link."""
    path = folder
    for part in PurePosixPath(location).parts:
        path = path / part
        try:
            is_link = path.is_symlink()
        except (OSError, ValueError):  # a name that no file can have
            is_link = False
        if is_link:
            raise BadModel(f"{file}: its data file {location} is a link; put the file itself beside the model")


def _check_range(file: Path, tensor: ir.ExternalTensor, size: int) -> None:
    """Refuse a tensor whose bytes are not all in its data file, or are not as many as its shape needs."""
    if tensor.dtype == ir.DataType.STRING:
        raise BadModel(f"{file}: tensor {tensor.name!r} holds strings, which no data file can")
    start = tensor.offset or 0
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if start < 0 or length < 0:
        raise BadModel(f"{file}: tensor {tensor.name!r} begins or ends before its data file {tensor.location}")
    end = start + max(length, tensor.nbytes)
    if end > size:
        raise BadModel(
            f"{file}: its data file {tensor.location} is too short: tensor {tensor.name!r} needs {end} bytes, the file "
            f"has {size}"
        )
    if length != tensor.nbytes:
        raise BadModel(
            f"{file}: tensor {tensor.name!r} has {length} bytes in {tensor.location}, its shape needs {tensor.nbytes}"
        )
