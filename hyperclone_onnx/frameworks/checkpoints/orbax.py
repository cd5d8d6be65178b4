"""Read a folder of Orbax array by array into NumPy arrays. The devices that it was saved from are not needed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hyperclone_onnx.errors import BadModel, first_line
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, guarded

try:
    import jax
    import orbax.checkpoint as ocp
except ImportError as problem:
    raise MissingExtra("jax", problem) from problem


def read_orbax(path: Path) -> dict[str, StoredArray]:
    """Open a checkpoint of PyTreeCheckpointer or StandardCheckpointer and return its arrays by name.

    Dots join the levels of a name.

    Raises:
        BadModel: the checkpoint's metadata cannot be read.
    """
    path = path.resolve()
    handler = ocp.PyTreeCheckpointHandler()
    try:
        described = handler.metadata(path)
        tree = getattr(described, "tree", described)
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    except Exception as problem:  # a broken folder raises nearly anything
        raise BadModel(f"{path}: not a readable Orbax checkpoint ({first_line(problem, 160)})") from problem
    arrays: dict[str, StoredArray] = {}
    for keys, leaf in leaves:
        if _is_leaf(leaf):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            read = guarded(path, name, partial(_read, handler, path, tree, keys))
            arrays[name] = StoredArray(tuple(leaf.shape or ()), np.dtype(leaf.dtype), read)
    return arrays


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _read(handler: Any, path: Path, tree: Any, keys: Any) -> Any:
    """Read one array. All others become placeholders, which Orbax does not restore."""

    def choose(at: Any, leaf: Any) -> Any:
        return leaf if at == keys else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(choose, tree, is_leaf=_is_leaf)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item, is_leaf=_is_leaf)
    restored = handler.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
    for leaf_keys, leaf in jax.tree_util.tree_leaves_with_path(restored):
        if leaf_keys == keys:
            return leaf
    raise KeyError(jax.tree_util.keystr(keys))
