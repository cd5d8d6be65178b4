"""Read AdamW's state as trainers save it, by the names in the saved file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hyperclone_onnx.errors import BadModel, BadRequest, first_line
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints import read_weights
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, from_torch
from hyperclone_onnx.frameworks.compiled_model import PathLike

FIRST, SECOND, STEP = ("exp_avg", "mu"), ("exp_avg_sq", "nu"), ("step", "count")
"""The names of the two moments and of the number of steps: PyTorch's, then optax's."""

SAVE_NAMED = (
    "make the optimizer from model.named_parameters() (PyTorch 2.6 and later keep the names), or save "
    "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)"
)


@dataclass(frozen=True)
class Group:
    """A parameter group of a torch optimizer: its settings, and the names of its parameters."""

    settings: dict[str, Any]
    names: frozenset[str]


@dataclass
class State:
    """The state of an optimizer, by the names in the saved file."""

    first: dict[str, StoredArray] = field(default_factory=dict)
    second: dict[str, StoredArray] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    """The number of steps, by name. The entry of the empty name holds for all tensors that have no entry."""
    groups: list[Group] = field(default_factory=list)


def read_state(path: PathLike) -> State:
    """Read AdamW's state from a file or a folder.

    Args:
        path: a torch file whose parameters have names (see `SAVE_NAMED`); it is read with ``weights_only=True``. Or
            anything that `checkpoints.read_weights` reads, with tensors ``exp_avg.NAME`` or ``NAME.exp_avg``,
            ``exp_avg_sq``, ``step`` (or optax's ``mu``, ``nu``, ``count``).

    Raises:
        BadModel: the file cannot be read.
        BadRequest: the parameters have no names, or the state is that of another optimizer.
        MissingExtra: reading the file needs a framework that is not installed.
    """
    file = Path(path)
    if file.is_dir() or file.suffix in (".safetensors", ".json", ".npz"):
        return _from_flat(read_weights(file), str(file))
    return _from_torch(load_torch_file(file), str(file))


def _from_flat(arrays: Mapping[str, StoredArray], where: str) -> State:
    state = State()
    for key, array in arrays.items():
        kind, name = _split(key)
        if kind in FIRST:
            state.first[name] = array
        elif kind in SECOND:
            state.second[name] = array
        elif kind in STEP and array.shape in ((), (1,)):
            state.steps[name] = float(np.asarray(array.read()).reshape(-1)[0])
    return _checked(state, where, list(arrays))


def _split(key: str) -> tuple[str, str]:
    """Split a key into the kind of value and the name of its tensor.

    A key that is no part of AdamW's state gives ("", key).

    >>> _split("optimizer.state.norm.weight.exp_avg"), _split("0.mu.norm.weight"), _split("0.count")
    (('exp_avg', 'optimizer.state.norm.weight'), ('mu', 'norm.weight'), ('count', ''))
    """
    parts = key.split(".")
    if parts[-1] in ("exp_avg", "exp_avg_sq"):
        return parts[-1], ".".join(parts[:-1])
    for level, part in enumerate(parts[:-1]):
        if part in (*FIRST, *SECOND) or (part in STEP and level == 0):
            return part, ".".join(parts[level + 1 :])
    if parts[-1] in STEP:
        return parts[-1], ".".join(parts[:-1]) if parts[-1] == "step" else ""
    return (parts[-1], ".".join(parts[:-1])) if parts[-1] in (*FIRST, *SECOND) and len(parts) > 1 else ("", key)


def load_torch_file(file: Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values alone. Tensors are mapped, not copied.

    Raises:
        BadModel: there is no such file, or it is none of torch, holds other objects, or is truncated.
        MissingExtra: torch is not installed.
    """
    try:
        import torch
    except ImportError as problem:
        raise MissingExtra("torch", problem) from problem
    if not file.is_file():
        raise BadModel(f"{file}: no such file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as problem:  # a broken file makes torch.load raise nearly anything
        raise BadModel(
            f"{file}: not a torch file of tensors alone, or truncated ({first_line(problem, 160)})"
        ) from problem


def _from_torch(data: Any, where: str) -> State:
    optimizer = _optimizer_in(data)
    if optimizer is None:
        flat = dict(_flat(data)) if isinstance(data, Mapping) else {}
        return _from_flat({name: from_torch(value) for name, value in flat.items()}, where)
    state = State()
    names: dict[Any, str] = {}
    for group in optimizer["param_groups"]:
        ids = group["params"]
        members = group.get("param_names", [key if isinstance(key, str) else None for key in ids])
        if None in members or len(members) != len(ids):
            raise BadRequest(f"{where}: its tensors are numbered, not named: {SAVE_NAMED}")
        names |= dict(zip(ids, members, strict=True))
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if settings.get("amsgrad"):
            raise BadRequest(
                f"{where}: AdamW with amsgrad keeps a maximum, which we cannot grow: train without amsgrad"
            )
        state.groups.append(Group(settings, frozenset(members)))
    for key, entry in optimizer["state"].items():
        name = names.get(key, str(key))
        if "exp_avg" not in entry or "exp_avg_sq" not in entry:
            held = ", ".join(map(str, entry)) or "nothing"
            raise BadRequest(f"{where}: not the state of AdamW: of {name!r} it holds {held}")
        state.first[name], state.second[name] = from_torch(entry["exp_avg"]), from_torch(entry["exp_avg_sq"])
        state.steps[name] = float(entry.get("step", 0))
    return _checked(state, where, list(names.values()))


def _optimizer_in(data: Any) -> Mapping[str, Any] | None:
    """Find the state_dict of an optimizer in a saved object: the object itself, or the only state_dict inside it."""
    if not isinstance(data, Mapping):
        return None
    if isinstance(data.get("state"), Mapping) and isinstance(data.get("param_groups"), Sequence):
        return data
    inner = [optimizer for optimizer in map(_optimizer_in, data.values()) if optimizer is not None]
    return inner[0] if len(inner) == 1 else None


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif hasattr(value, "detach"):
            yield f"{prefix}{name}", value


def _checked(state: State, where: str, held: Sequence[str]) -> State:
    if not state.first and not state.second:
        examples = ", ".join(map(repr, held[:3])) or "nothing"
        raise BadRequest(
            f"{where}: no state of AdamW (exp_avg and exp_avg_sq, or mu and nu, of each tensor): it holds {examples}"
        )
    incomplete = sorted(state.first.keys() ^ state.second.keys())
    if incomplete:
        raise BadRequest(f"{where}: {incomplete[0]!r} has only one of AdamW's two moments")
    return state
