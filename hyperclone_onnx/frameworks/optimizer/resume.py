"""A grown optimizer state put into a trainer's optimizer, by the names of its parameters."""

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
    """Give a torch AdamW the moments of a file, by name; its rates and groups stay its own.

    Args:
        optimizer: made of named parameters, in whatever groups: ``AdamW(model.named_parameters())``. The parameters may
            be sharded.
        state: `optimizer.pt` or `optimizer.safetensors`, as `write_optimizer` writes them.

    Raises:
        BadModel: the file cannot be read.
        BadRequest: the optimizer has no names, a name is missing in the file, or a shape is another.
    """
    import torch

    saved = read_state(state)
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise BadRequest("the optimizer has no names: make it of model.named_parameters()")
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
    """A tensor placed as a parameter is, of an array's elements; of a sharded one this rank's are read alone."""
    import torch

    target = torch.zeros_like(parameter, requires_grad=False)
    local, window = target, tuple(slice(None) for _ in target.shape)
    if hasattr(target, "__create_chunk_list__"):  # what torch.distributed.checkpoint asks of a DTensor
        (chunk,) = target.__create_chunk_list__()
        window = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        local = target.to_local()
    local.copy_(torch.from_numpy(np.array(array[window])))
    return target


def resume_optax(optimizer_state: Any, params: Mapping[str, Any], state: str | os.PathLike[str]) -> Any:
    """An optax state with the moments of a file in the place of its own: those of every `ScaleByAdamState` in it.

    Args:
        optimizer_state: ``optax.adamw(...).init(params)``, or any chain with Adam in it; what else it holds (the
            count of a schedule) stays.
        params: the nested dict that `frameworks.jax.load` gives.
        state: `optimizer.safetensors`.

    Raises:
        BadModel: the file cannot be read.
        BadRequest: a name is missing in the file, a shape is another, or the state holds no Adam.
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
    found = {path: _of(saved, name, _leaf_shape(params, name), str(state)) for path, name in paths.items()}
    steps = {each[2] for each in found.values()}
    replaced = 0

    def moments(which: int) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.numpy.asarray(found[path][which], dtype=leaf.dtype), params
        )

    def put(node: Any) -> Any:
        nonlocal replaced
        if not isinstance(node, optax.ScaleByAdamState):
            return node
        replaced += 1
        count = jax.numpy.asarray(int(max(steps)), dtype=jax.numpy.int32)
        return optax.ScaleByAdamState(count=count, mu=moments(0), nu=moments(1))

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
    """A parameter's two moments and its steps."""
    found: list[StoredArray | None] = [saved.first.get(name), saved.second.get(name)]
    arrays = []
    for each in found:
        if each is None:
            raise BadRequest(f"{where}: no moments of {name!r}")
        if each.shape != shape:
            raise BadRequest(f"{where}: the moments of {name!r} have the shape {each.shape}, the parameter {shape}")
        arrays.append(np.asarray(each.read()))
    step = saved.steps.get(name, saved.steps.get("", 0.0))
    return arrays[0], arrays[1], step
