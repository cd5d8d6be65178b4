"""AdamW's state as trainers leave it, read under the names that it was saved under."""

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
"""What PyTorch and optax call the two moments and the number of steps."""

SAVE_NAMED = (
    "make the optimizer of model.named_parameters() (PyTorch 2.6 and later keep the names), or save "
    "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)"
)


@dataclass(frozen=True)
class Group:
    """One of a torch optimizer's parameter groups: its settings, and whose they are."""

    settings: dict[str, Any]
    names: frozenset[str]


@dataclass
class State:
    """An optimizer's state as it was saved, by the names it was saved under."""

    first: dict[str, StoredArray] = field(default_factory=dict)
    second: dict[str, StoredArray] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    """By name; that of the empty name counts for all."""
    groups: list[Group] = field(default_factory=list)


def read_state(path: PathLike) -> State:
    """AdamW's state from a file or a folder.

    Args:
        path: a torch file with names (see `SAVE_NAMED`), which is read with ``weights_only=True``; or anything that
            `checkpoints.read_weights` reads, with tensors ``exp_avg.NAME`` or ``NAME.exp_avg``, ``exp_avg_sq``,
            ``step`` (or optax's ``mu``, ``nu``, ``count``).

    Raises:
        BadModel: it cannot be read.
        BadRequest: it has no names, or is the state of another optimizer.
    """
    file = Path(path)
    if file.is_dir() or file.suffix in (".safetensors", ".json", ".npz"):
        return _from_flat(read_weights(file), str(file))
    return _from_torch(_load_torch(file), str(file))


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
    """A key as what it holds and of which tensor; ("", key) for what is no part of AdamW's state.

    >>> _split("optimizer.state.norm.weight.exp_avg"), _split("0.mu.norm.weight"), _split("0.count")
    (('exp_avg', 'optimizer.state.norm.weight'), ('mu', 'norm.weight'), ('count', ''))
    """
    parts = key.split(".")
    if parts[-1] in ("exp_avg", "exp_avg_sq"):
        return parts[-1], ".".join(parts[:-1])
    for at, part in enumerate(parts[:-1]):
        if part in (*FIRST, *SECOND) or (part in STEP and at == 0):
            return part, ".".join(parts[at + 1 :])
    if parts[-1] in STEP:
        return parts[-1], ".".join(parts[:-1]) if parts[-1] == "step" else ""
    return (parts[-1], ".".join(parts[:-1])) if parts[-1] in (*FIRST, *SECOND) and len(parts) > 1 else ("", key)


def _load_torch(file: Path) -> Any:
    try:
        import torch
    except ImportError as problem:
        raise MissingExtra("torch", problem) from problem
    if not file.is_file():
        raise BadModel(f"{file}: no such file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as problem:  # whatever a file that is none makes of the reader
        raise BadModel(
            f"{file}: not a torch file of tensors alone, or truncated ({first_line(problem, 160)})"
        ) from problem


def _from_torch(data: Any, where: str) -> State:
    found = _optimizer_in(data)
    if found is None:
        flat = dict(_flat(data)) if isinstance(data, Mapping) else {}
        return _from_flat({name: from_torch(value) for name, value in flat.items()}, where)
    state = State()
    names: dict[Any, str] = {}
    for group in found["param_groups"]:
        ids = group["params"]
        own = group.get("param_names", [each if isinstance(each, str) else None for each in ids])
        if None in own or len(own) != len(ids):
            raise BadRequest(f"{where}: its tensors are numbered, not named: {SAVE_NAMED}")
        names |= dict(zip(ids, own, strict=True))
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if settings.get("amsgrad"):
            raise BadRequest(f"{where}: AdamW with amsgrad keeps a maximum, for which there is no growth here")
        state.groups.append(Group(settings, frozenset(own)))
    for key, entry in found["state"].items():
        name = names.get(key, str(key))
        if "exp_avg" not in entry or "exp_avg_sq" not in entry:
            held = ", ".join(map(str, entry)) or "nothing"
            raise BadRequest(f"{where}: not the state of AdamW: of {name!r} it holds {held}")
        state.first[name], state.second[name] = from_torch(entry["exp_avg"]), from_torch(entry["exp_avg_sq"])
        state.steps[name] = float(entry.get("step", 0))
    return _checked(state, where, list(names.values()))


def _optimizer_in(data: Any) -> Mapping[str, Any] | None:
    """The state_dict of an optimizer in what a trainer saved: itself, or the one part of it that is one."""
    if not isinstance(data, Mapping):
        return None
    if isinstance(data.get("state"), Mapping) and isinstance(data.get("param_groups"), Sequence):
        return data
    found = [each for each in map(_optimizer_in, data.values()) if each is not None]
    return found[0] if len(found) == 1 else None


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif hasattr(value, "detach"):
            yield f"{prefix}{name}", value


def _checked(state: State, where: str, held: Sequence[str]) -> State:
    if not state.first and not state.second:
        some = ", ".join(map(repr, held[:3])) or "nothing"
        raise BadRequest(
            f"{where}: no state of AdamW (exp_avg and exp_avg_sq, or mu and nu, of each tensor): it holds {some}"
        )
    alone = sorted(state.first.keys() ^ state.second.keys())
    if alone:
        raise BadRequest(f"{where}: {alone[0]!r} has one of AdamW's two moments only")
    return state
