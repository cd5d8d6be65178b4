"""The path of each stored tensor: the name of its initializer, in which dots separate levels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

MODULE_ATTRIBUTES = frozenset(
    """
    T add_module apply bfloat16 buffers call_super_init children code compile cpu cuda double dump_patches eval
    extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half initializers ipu
    load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters program
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory state_dict to to_empty
    train training type xpu zero_grad
    """.split()
)
"""Attributes of every torch.nn.Module, which a path must not replace."""


def paths(names: Iterable[str]) -> dict[str, str]:
    """A path for each initializer. Its parts are identifiers or numbers, and none is an attribute of torch.nn.Module.

    >>> paths(["model.layers.0.weight", "onnx::MatMul_12", "a", "a.b"])
    {'model.layers.0.weight': 'model.layers.0.weight', 'onnx::MatMul_12': 'onnx__MatMul_12', 'a': 'a_', 'a.b': 'a.b'}
    """
    cleaned = {name: ".".join(_part(part) for part in name.split(".") if part) or "tensor" for name in names}
    folders = {path.rsplit(".", depth)[0] for path in cleaned.values() for depth in range(1, path.count(".") + 1)}
    path_of: dict[str, str] = {}
    taken: set[str] = set()
    for name, path in cleaned.items():
        while path in taken or path in folders:
            path += "_"
        taken.add(path)
        path_of[name] = path
    return path_of


def _part(text: str) -> str:
    """One part of a path, made an identifier or a number."""
    part = re.sub(r"\W", "_", text, flags=re.ASCII)
    if part.isdigit():
        return part
    if part[0].isdigit() or part.startswith("_"):
        part = f"v{part}" if part.startswith("_") else f"v_{part}"
    return f"{part}_" if part in MODULE_ATTRIBUTES else part


def nested(flat: Mapping[str, T]) -> dict[str, Any]:
    """A nested dict from paths, with a level for each dot.

    >>> nested({"a.b": 1, "a.c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split(".")
        level = tree
        for name in folders:
            level = level.setdefault(name, {})
        level[leaf] = value
    return tree
