"""AdamW's state of a small model, grown by a grown file's plan and written for the next trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hyperclone_onnx.errors import BadRequest, CannotWrite
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.matching import match
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, read_safetensors
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.program import Weight
from hyperclone_onnx.frameworks.optimizer.moments import GrownMoments, Moments, forget, grow_moments, separated
from hyperclone_onnx.frameworks.optimizer.saved_state import FIRST, SECOND, STEP, Group, State, read_state
from hyperclone_onnx.plan.maps import Kept
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.writing.safetensors_files import Tensor, write_safetensors

Kind = Literal["safetensors", "pytorch", "jax"]
FILES: Mapping[Kind, str] = {
    "safetensors": "optimizer.safetensors",
    "pytorch": "optimizer.pt",
    "jax": "optimizer.safetensors",
}
"""What `write_optimizer` writes into its folder."""

Translate = Callable[[Mapping[str, StoredArray]], Mapping[str, StoredArray]]
"""From moments by other names and in other layouts (those of a Hugging Face checkpoint) to moments by initializer."""


@dataclass(frozen=True)
class GrownState:
    """What was written."""

    file: str
    steps: float
    """The most that any tensor was stepped."""
    tensors: int
    exact: bool
    """Whether the moments are those that the grown model would have; else, in `mean`, means over repeats."""
    mean: list[str]
    """Tensors whose moments are a mean over repeats that differ, or a part of what one tensor had before it became
    several."""


# -- growing ----------------------------------------------------------------------------------------------------


def write_optimizer(
    big: PathLike,
    state: PathLike,
    folder: PathLike,
    kind: Kind,
    *,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    source: PathLike | None = None,
    translate: Translate | None = None,
    compiled: CompiledModel | None = None,
) -> GrownState:
    """Grow the source's AdamW state by a grown file's plan, and write it where its trainer looks for it.

    Args:
        big: the grown file; its plan is in it.
        state: the source's state; see `read_state`.
        folder: an existing folder. `FILES` says what is written into it: for PyTorch a state_dict for
            ``AdamW(load(big).named_parameters())``; else a safetensors file by the parameters' names.
        kind: for whom.
        freeze: as for `load`.
        train: as for `load`.
        source: the source's file, if the state's names are those of its handoff and not those of `big`.
        translate: from other names and layouts.
        compiled: what `compile_model` makes of `big` with the same `freeze` and `train`, where that was done already.

    Raises:
        BadModel: a file cannot be read.
        BadRequest: `big` was not grown; the state does not fit it, or lacks a tensor that is trained.
        CannotWrite, Refused, MissingExtra: see `errors`.
    """
    compiled = compiled or compile_model(big, freeze=freeze, train=train)
    plan = compiled.plan
    if plan is None:
        raise BadRequest(f"{big}: it carries no plan of its growth, by which an optimizer's state would grow")
    weights = [each for each in compiled.program.weights if each.role in ("trainable", "frozen")]
    saved = read_state(state)
    known = _names(plan, weights, source)
    moments, names = _moments(saved, known, str(state), translate)
    grown = grow_moments(plan, moments)
    _check_shapes(weights, grown)
    trained = [each for each in weights if each.role == "trainable"]
    missing = [each.initializer for each in trained if each.initializer not in grown]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadRequest(f"{state}: no moments of {missing[0]!r}{more}, which is trained: see --freeze")
    by_path = {each.path: grown[each.initializer] for each in trained}
    out = Path(folder) / FILES[kind]
    try:
        if kind == "pytorch":
            _write_torch(out, compiled, by_path, _groups(saved, names, plan, weights))
        else:
            _write_safetensors(out, by_path, kind)
    finally:
        forget()
    mean = _means(plan, [each.initializer for each in trained])
    return GrownState(str(out), max(each.step for each in by_path.values()), len(by_path), not mean, mean)


def _names(plan: Plan, weights: Sequence[Weight], source: PathLike | None) -> dict[str, str]:
    """The source's initializer, by each name that it may have in a state."""
    known: dict[str, str] = {}
    if source is not None:
        known |= {each.path: each.initializer for each in compile_model(source).program.weights}
        known |= {each: each for each in known.values()}
    for each in weights:
        recipe = plan.tensors.get(each.initializer)
        origin = each.initializer if recipe is None else recipe.source
        for name in (each.path, each.initializer, origin):
            known.setdefault(name, origin)
    return known


def _moments(
    saved: State, known: Mapping[str, str], where: str, translate: Translate | None
) -> tuple[dict[str, Moments], dict[str, str]]:
    """The moments by source initializer, and the source initializer by saved name."""
    first: Mapping[str, StoredArray] = saved.first
    second: Mapping[str, StoredArray] = saved.second
    if translate is not None:
        first, second = translate(first), translate(second)
        most = max(saved.steps.values(), default=0.0)
        return {name: Moments(first[name], second[name], most) for name in first}, {}
    names = match(saved.first, known, where)
    steps = saved.steps
    if not steps:
        raise BadRequest(f"{where}: it does not say how many steps were taken: add a tensor 'step'")
    common = steps.get("", max(steps.values()))
    return {
        initializer: Moments(first[name], second[name], steps.get(name, common)) for name, initializer in names.items()
    }, names


def _check_shapes(weights: Iterable[Weight], grown: Mapping[str, GrownMoments]) -> None:
    for each in weights:
        moments = grown.get(each.initializer)
        if moments is not None and moments.first.shape != tuple(each.shape):
            raise BadRequest(
                f"the moments of {each.initializer!r} have the shape {moments.first.shape}, "
                f"the grown model's tensor has {tuple(each.shape)}"
            )


def _means(plan: Plan, names: Iterable[str]) -> list[str]:
    """The tensors whose repeats have moments of their own, of which the grown ones are the mean."""
    several = separated(plan)
    found = []
    for name in names:
        recipe = plan.tensors.get(name)
        source = name if recipe is None else recipe.source
        copies = recipe is not None and any(
            (a, f) not in recipe.shared and not isinstance(factor, Kept)
            for a, axis in enumerate(recipe.axes)
            for f, factor in enumerate(axis)
        )
        if source in several or (copies and not plan.strategy.law.is_even):
            found.append(name)
    return found


# -- writing ----------------------------------------------------------------------------------------------------


def _write_safetensors(out: Path, grown: Mapping[str, GrownMoments], kind: Kind) -> None:
    first, second, step = (names[kind == "jax"] for names in (FIRST, SECOND, STEP))
    arrays: dict[str, Tensor] = {}
    for path, each in grown.items():
        arrays[f"{first}.{path}"], arrays[f"{second}.{path}"] = each.first, each.second
    steps = {path: each.step for path, each in grown.items()}
    if len(set(steps.values())) == 1:
        arrays[step] = np.asarray(next(iter(steps.values())), np.int32 if kind == "jax" else np.float32)
    elif kind == "jax":
        least, most = min(steps.values()), max(steps.values())
        raise BadRequest(f"its tensors were stepped {least:g} to {most:g} times; optax has one count for all")
    else:
        arrays |= {f"{step}.{path}": np.asarray(each, np.float32) for path, each in steps.items()}
    write_safetensors(arrays, out.parent, name=out.name, metadata={"format": "pt"})


def _groups(saved: State, names: Mapping[str, str], plan: Plan, weights: Sequence[Weight]) -> list[Group]:
    """The saved groups by the grown model's parameters; what was in none is in the first."""
    if not saved.groups:
        return []
    number = {names[name]: i for i, group in enumerate(saved.groups) for name in group.names if name in names}
    members: list[set[str]] = [set() for _ in saved.groups]
    for each in weights:
        recipe = plan.tensors.get(each.initializer)
        members[number.get(each.initializer if recipe is None else recipe.source, 0)].add(each.path)
    return [Group(group.settings, frozenset(own)) for group, own in zip(saved.groups, members, strict=True)]


def _write_torch(
    out: Path, compiled: CompiledModel, grown: Mapping[str, GrownMoments], groups: Sequence[Group]
) -> None:
    try:
        import torch
    except ImportError as problem:
        raise MissingExtra("torch", problem) from problem
    from hyperclone_onnx.frameworks.torch import OnnxModule

    names = [name for name, _ in OnnxModule(compiled).named_parameters()]
    if not groups:
        nothing = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).state_dict()["param_groups"][0]
        settings = {key: value for key, value in nothing.items() if key != "params"}
        groups = [Group(settings, frozenset(names))]
    scratch = out.with_name(f".{out.name}.partial")
    try:
        # The moments are computed block by block into a file, and torch saves them from there: none is held whole.
        _write_safetensors(scratch, grown, "safetensors")
        tensors = {name: torch.from_numpy(array.read()) for name, array in read_safetensors(scratch).items()}
        state: dict[int, Any] = {}
        written: list[dict[str, Any]] = []
        for group in groups:
            own = [name for name in names if name in group.names]
            start = sum(len(each["params"]) for each in written)
            written.append({**group.settings, "params": [*range(start, start + len(own))], "param_names": own})
            for number, name in enumerate(own, start):
                if name in grown:
                    state[number] = {
                        "step": torch.tensor(float(grown[name].step)),
                        "exp_avg": tensors[f"exp_avg.{name}"],
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                    }
        torch.save({"state": state, "param_groups": written}, out)
    except (OSError, RuntimeError) as problem:
        raise CannotWrite(f"{out}: cannot be written ({problem})") from problem
    finally:
        scratch.unlink(missing_ok=True)
