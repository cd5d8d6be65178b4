"""Write nested parameters as an Orbax checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiling.naming import nested
from hyperclone_onnx.frameworks.slices import read_whole


def write_checkpoint(tensors: Mapping[str, ir.TensorProtocol], folder: Path) -> None:
    """Write a checkpoint that ``orbax.checkpoint.StandardCheckpointer().restore(folder, like)`` reads.

    Orbax can restore it with any sharding.

    Args:
        tensors: the tensors, by parameter path.
        folder: the folder to create; it must not exist.

    Raises:
        MissingExtra: Orbax is not installed.
        CannotWrite: the folder cannot be written.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as problem:
        raise MissingExtra("jax", problem) from problem

    params: dict[str, Any] = nested({path: read_whole(tensor) for path, tensor in tensors.items()})
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), params)
            checkpointer.wait_until_finished()
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
