"""Write nested parameters as an Orbax checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiling.naming import nested
from hyperclone_onnx.frameworks.slices import read_slice, read_whole, shape_of


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
    _save(nested({path: read_whole(tensor) for path, tensor in tensors.items()}), folder)


def over_all_devices() -> Any:
    """A mesh with one axis over the devices of all processes."""
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(jax.devices()), ("all",))


def _shardings(tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, Any]:
    """For each tensor its sharding over all devices."""
    from hyperclone_onnx.frameworks.jax import over

    place = over(over_all_devices())
    return {path: place(path, shape_of(tensor)) for path, tensor in tensors.items()}


def abstract_arrays(tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, Any]:
    """For each tensor its shape, type and sharding over all devices, with which Orbax restores it."""
    import jax

    return {
        path: jax.ShapeDtypeStruct(shape_of(tensors[path]), tensors[path].dtype.numpy(), sharding=sharding)
        for path, sharding in _shardings(tensors).items()
    }


def write_sharded(tensors: Mapping[str, ir.TensorProtocol], folder: Path) -> None:
    """Write the same checkpoint by all processes of JAX: each computes and writes the shards of its own devices.

    Args:
        tensors: the tensors, by parameter path.
        folder: the folder to create, by a path that all processes see.

    Raises:
        MissingExtra: Orbax is not installed.
        CannotWrite: the folder cannot be written.
    """
    try:
        import jax
    except ImportError as problem:
        raise MissingExtra("jax", problem) from problem

    def array(tensor: ir.TensorProtocol, sharding: Any) -> Any:
        shape = shape_of(tensor)

        def part(index: tuple[slice, ...]) -> Any:
            windows = (slice(*window.indices(size)[:2]) for window, size in zip(index, shape, strict=True))
            return read_slice(tensor, tuple(windows))

        return jax.make_array_from_callback(shape, sharding, part)

    _save(nested({path: array(tensors[path], sharding) for path, sharding in _shardings(tensors).items()}), folder)


def _save(params: dict[str, Any], folder: Path) -> None:
    """Let Orbax write nested arrays, of which each process has its shards.

    Raises:
        MissingExtra: Orbax is not installed.
        CannotWrite: the folder cannot be written.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as problem:
        raise MissingExtra("jax", problem) from problem
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), params)
            checkpointer.wait_until_finished()
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
