"""Write a checkpoint of torch.distributed.checkpoint, tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.slices import read_whole, shape_of

KEY = "model"
"""The first part of each name in the checkpoint, as ``dcp.save({"model": model.state_dict()})`` writes it."""


def write_checkpoint(tensors: Mapping[str, ir.TensorProtocol], folder: Path) -> None:
    """Write a checkpoint that ``dcp.load({"model": model.state_dict()}, checkpoint_id=folder)`` reads.

    Any number of ranks can load it.

    Args:
        tensors: the tensors, by parameter path. Only one at a time is in memory.
        folder: the empty folder to write into.

    Raises:
        MissingExtra: PyTorch is not installed.
        CannotWrite: the folder cannot be written.
    """
    try:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        from hyperclone_onnx.frameworks.compiling.namespaces.torch import dtype_of
        from hyperclone_onnx.frameworks.torch import as_torch
    except ImportError as problem:
        raise MissingExtra("torch", problem) from problem

    class Planner(DefaultSavePlanner):
        """Plan the file with tensors on the meta device, and read a tensor's values only when it is written."""

        def lookup_object(self, index: Any) -> Any:
            return as_torch(read_whole(tensors[index.fqn.removeprefix(f"{KEY}.")]))

    state = {
        KEY: {
            path: torch.empty(shape_of(tensor), dtype=dtype_of(int(tensor.dtype)), device="meta")
            for path, tensor in tensors.items()
        }
    }
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is no process group: we need none
            dcp.save(state, storage_writer=writer, planner=Planner(), no_dist=True)
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
