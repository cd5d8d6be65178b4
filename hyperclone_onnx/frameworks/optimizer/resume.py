"""Load a grown optimizer state into a trainer's optimizer, by the names of the parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import Array, StoredArray
from hyperclone_onnx.frameworks.optimizer.saved_state import State, read_state


def resume_torch(optimizer: Any, state: str | os.PathLike[str]) -> None:
    """Load the moments and step counts of a file into a torch AdamW, by parameter name.

    The optimizer keeps its learning rates and its parameter groups.

    Args:
        optimizer: an AdamW made from named parameters: ``AdamW(model.named_parameters())``. It may have several groups,
            and the parameters may be sharded.
        state: path of `optimizer.pt` or `optimizer.safetensors`, as `write_optimizer` writes them.

    Raises:
        BadModel: the file cannot be read.
        BadRequest: the optimizer has no parameter names, or the file lacks a trained parameter or has it with another
            shape.
    """
    import torch

    saved = read_state(state)
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise BadRequest("the optimizer has no parameter names: make it from model.named_parameters()")
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if not parameter.requires_grad:
                continue
            first, second, step = _of(saved, name, tuple(parameter.shape), str(state))
            optimizer.state[parameter] = {
                "step": torch.tensor(step),
                "exp_avg": _beside(parameter, first),
                "exp_avg_sq": _beside(parameter, second),
            }


def _beside(parameter: Any, array: Array) -> Any:
    """Return an array as a tensor with a parameter's device and sharding. If sharded, read only this rank's part."""
    import torch

    target = torch.zeros_like(parameter, requires_grad=False)
    local, window = target, tuple(slice(None) for _ in target.shape)
    if hasattr(target, "__create_chunk_list__"):  # only a DTensor has it: it lists the local shards
        (chunk,) = target.__create_chunk_list__()
        window = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        local = target.to_local()
    local.copy_(torch.from_numpy(np.array(array[window])))
    return target


def resume_optax(optimizer_state: Any, params: Mapping[str, Any], state: str | os.PathLike[str]) -> Any:
    """Return a copy of an optax state in which every `ScaleByAdamState` has the moments of a file.

    Args:
        optimizer_state: ``optax.adamw(...).init(params)``, or the state of any chain that contains Adam. Its other
            parts, such as the count of a schedule, are kept.
        params: the nested dict of parameters that `frameworks.jax.load` returns.
        state: path of `optimizer.safetensors`.

    Raises:
        BadModel: the file cannot be read.
        BadRequest: the file lacks a parameter or has it with another shape, or the optax state contains no Adam.
        MissingExtra: JAX or optax is not installed.
    """
    try:
        import jax
        import optax
    except ImportError as problem:
        raise MissingExtra("jax", problem) from problem
    saved = read_state(state)
    paths = {
        path: jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(params)
    }
    loaded = {path: _of(saved, name, _leaf_shape(params, name), str(state)) for path, name in paths.items()}
    steps = {moments_and_step[2] for moments_and_step in loaded.values()}
    replaced = 0

    def moments(which: int, like: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.numpy.asarray(loaded[path][which], dtype=leaf.dtype), like
        )

    def put(node: Any) -> Any:
        nonlocal replaced
        if not isinstance(node, optax.ScaleByAdamState):
            return node
        replaced += 1
        count = jax.numpy.asarray(int(max(steps)), dtype=jax.numpy.int32)
        return optax.ScaleByAdamState(count=count, mu=moments(0, node.mu), nu=moments(1, node.nu))

    result = jax.tree.map(put, optimizer_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
    if not replaced:
        raise BadRequest("the optimizer's state holds no optax.ScaleByAdamState to put the moments into")
    return result


def _leaf_shape(params: Mapping[str, Any], name: str) -> tuple[int, ...]:
    level: Any = params
    for part in name.split("."):
        level = level[part]
    return tuple(level.shape)


def _of(saved: State, name: str, shape: tuple[int, ...], where: str) -> tuple[Any, Any, float]:
    """Return a parameter's first moment, second moment and number of steps. Messages name the file `where`."""
    moments: list[StoredArray | None] = [saved.first.get(name), saved.second.get(name)]
    arrays = []
    for moment in moments:
        if moment is None:
            raise BadRequest(f"{where}: it has no moments of the parameter {name!r}")
        if moment.shape != shape:
            raise BadRequest(
                f"{where}: the moments of {name!r} have the shape {moment.shape}, the parameter has {shape}"
            )
        arrays.append(np.asarray(moment.read()))
    step = saved.steps.get(name, saved.steps.get("", 0.0))
    return arrays[0], arrays[1], step
