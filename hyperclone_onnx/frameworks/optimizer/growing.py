"""Grow AdamW's state of a small model by the plan in the grown file, and write it for the trainer of that file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hyperclone_onnx.errors import BadRequest, CannotWrite
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.matching import match
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, read_safetensors
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.program import Weight
from hyperclone_onnx.frameworks.continuation import separated
from hyperclone_onnx.frameworks.depth import source_places
from hyperclone_onnx.frameworks.optimizer.moments import GrownMoments, Moments, forget, grow_moments
from hyperclone_onnx.frameworks.optimizer.saved_state import FIRST, SECOND, STEP, Group, State, read_state
from hyperclone_onnx.plan.maps import Kept, fills_of
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.experts import mixtures
from hyperclone_onnx.transforms.interface import Placed
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.writing.safetensors_files import Tensor, write_safetensors

Kind = Literal["safetensors", "pytorch", "jax"]
FILES: Mapping[Kind, str] = {
    "safetensors": "optimizer.safetensors",
    "pytorch": "optimizer.pt",
    "jax": "optimizer.safetensors",
}
"""The name of the file that `write_optimizer` writes, by the kind of trainer."""

Translate = Callable[[Mapping[str, StoredArray]], Mapping[str, StoredArray]]
"""Converts moments with other names and layouts (such as a Hugging Face checkpoint's) to moments by initializer."""


@dataclass(frozen=True)
class GrownState:
    """A report about the written state."""

    file: str
    """The path of the written file."""
    steps: float
    """The largest number of steps of any tensor."""
    tensors: int
    """The number of tensors with moments."""
    exact: bool
    """Whether all moments are exactly those of the grown model; if not, `mean` lists the other tensors."""
    mean: list[str]
    """Tensors whose moments are not exact. Either the repeats of an element have different gradients, and the moments
    are a mean over them. Or one tensor became several, and we assume that each has an equal part of its gradient. Or
    the tensor has channels that hold a mean, whose gradients the small model does not have. Or layers were copied so
    that the model computes something else; then all tensors are listed."""
    new: list[str] = field(default_factory=list)
    """Tensors of new layers that add nothing yet. Their moments are zero, and they have taken no step."""


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
    """Grow AdamW's state of the small model by the plan in the grown file, and write it into a folder.

    Args:
        big: the grown file, which contains its plan.
        state: the state of the small model; see `read_state`.
        folder: an existing folder. The file in it is named by `FILES`. For PyTorch it is a state_dict for
            ``AdamW(load(big).named_parameters())``; for others it is a safetensors file by the parameters' paths.
        kind: the trainer that will read the file.
        freeze: globs of initializer names; the matching tensors are not trained.
        train: globs of initializer names; the matching tensors are trained.
        source: the small model's file. Give it if `big` has more layers, or if the names in the state come from the
            small model's handoff and differ from those of `big`.
        translate: a function that converts names and layouts of the moments; None if they need no conversion.
        compiled: the result of `compile_model` for `big` with the same `freeze` and `train`, to save compiling again.

    Raises:
        BadModel: a file cannot be read.
        BadRequest: `big` contains no plan; or the state does not fit it, or lacks a tensor that is trained; or `big`
            has more layers and `source` is not given.
        CannotWrite, Refused, MissingExtra: see `errors`.
    """
    compiled = compiled or compile_model(big, freeze=freeze, train=train)
    plan = compiled.plan
    if plan is None:
        raise BadRequest(f"{big}: it carries no plan of its growth, which we need to grow an optimizer's state")
    if mixtures(plan.transforms):
        raise BadRequest(
            f"{big}: it has experts, and the small model's state has no moments of experts and routers: leave the "
            "state out, and train on with a new one"
        )
    places = source_places(big, plan, source)
    weights = [weight for weight in compiled.program.weights if weight.role in ("trainable", "frozen")]
    saved = read_state(state)
    known = _names(plan, weights, source, is_deeper=bool(places))
    moments, names = _moments(saved, known, str(state), translate)
    grown = grow_moments(plan, deepened_moments(moments, places, counts_each=kind != "jax"))
    _check_shapes(weights, grown)
    trained = [weight for weight in weights if weight.role == "trainable"]
    missing = [weight.initializer for weight in trained if weight.initializer not in grown]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadRequest(f"{state}: no moments of {missing[0]!r}{more}, which is trained: see --freeze")
    by_path = {weight.path: grown[weight.initializer] for weight in trained}
    out = Path(folder) / FILES[kind]
    try:
        if kind == "pytorch":
            _write_torch(out, compiled, by_path, _groups(saved, names, plan, weights, places))
        else:
            _write_safetensors(out, by_path, kind)
    finally:
        forget()
    mean = _means(plan, [weight.initializer for weight in trained])
    new = [weight.initializer for weight in trained if _begins_at_zero(_source(plan, weight), places)]
    steps = max(moment.step for moment in by_path.values())
    return GrownState(str(out), steps, len(by_path), not mean, mean, new)


def _source(plan: Plan, weight: Weight) -> str:
    """The tensor of the source that a weight grows from; the source has all layers of the grown model."""
    recipe = plan.tensors.get(weight.initializer)
    return weight.initializer if recipe is None else recipe.source


def _begins_at_zero(name: str, places: Mapping[str, Placed]) -> bool:
    return name in places and places[name].is_new and places[name].adds_nothing


def deepened_moments(
    moments: Mapping[str, Moments], places: Mapping[str, Placed], *, counts_each: bool
) -> Mapping[str, Moments]:
    """The moments of a model with more layers: of each layer its own, or those of the layer that it is a copy of.

    An identity block has moments of zero, as a parameter that joins an optimizer has. No gradient has passed through
    it: that of its inner tensors is zero for as long as its last factors are. An optimizer that counts the steps of
    each tensor has counted none for it, so the correction of the bias begins anew.

    Args:
        moments: the moments of the small model, by its initializers.
        places: the stored tensors of the deeper model's layers; empty if it is not deeper.
        counts_each: whether the optimizer counts the steps of each tensor.
    """
    if not places:
        return moments
    of_layers = {placed.source for placed in places.values() if not placed.is_new}
    deeper = {name: of_tensor for name, of_tensor in moments.items() if name not in of_layers}
    for name, placed in places.items():
        of_tensor = moments.get(placed.source)
        if of_tensor is None:
            continue
        if _begins_at_zero(name, places):
            step = 0.0 if counts_each else of_tensor.step
            of_tensor = Moments(_zeros(of_tensor.first), _zeros(of_tensor.second), step)
        deeper[name] = of_tensor
    return deeper


def _zeros(like: StoredArray) -> StoredArray:
    return StoredArray(like.shape, like.dtype, lambda: np.zeros(like.shape, like.dtype))


def _names(plan: Plan, weights: Sequence[Weight], source: PathLike | None, *, is_deeper: bool) -> dict[str, str]:
    """Return the small model's initializers, by every name that an initializer may have in a saved state.

    The names of a deeper model are not among them: its layers have other numbers.
    """
    known: dict[str, str] = {}
    if source is not None:
        known |= {weight.path: weight.initializer for weight in compile_model(source).program.weights}
        known |= {initializer: initializer for initializer in known.values()}
    for weight in () if is_deeper else weights:
        origin = _source(plan, weight)
        for name in (weight.path, weight.initializer, origin):
            known.setdefault(name, origin)
    return known


def _moments(
    saved: State, known: Mapping[str, str], where: str, translate: Translate | None
) -> tuple[dict[str, Moments], dict[str, str]]:
    """Return the moments by the small model's initializer, and that initializer by saved name."""
    first: Mapping[str, StoredArray] = saved.first
    second: Mapping[str, StoredArray] = saved.second
    if translate is not None:
        first, second = translate(first), translate(second)
        steps_taken = max(saved.steps.values(), default=0.0)
        return {name: Moments(first[name], second[name], steps_taken) for name in first}, {}
    names = match(saved.first, known, where)
    steps = saved.steps
    if not steps:
        raise BadRequest(f"{where}: it does not say how many steps were taken: add a tensor 'step'")
    common = steps.get("", max(steps.values()))
    return {
        initializer: Moments(first[name], second[name], steps.get(name, common)) for name, initializer in names.items()
    }, names


def _check_shapes(weights: Iterable[Weight], grown: Mapping[str, GrownMoments]) -> None:
    for weight in weights:
        moments = grown.get(weight.initializer)
        if moments is not None and moments.first.shape != tuple(weight.shape):
            raise BadRequest(
                f"the moments of {weight.initializer!r} have the shape {moments.first.shape}, "
                f"the grown model's tensor has {tuple(weight.shape)}"
            )


def _means(plan: Plan, names: Iterable[str]) -> list[str]:
    """List the tensors whose grown moments are not exact; see `GrownState.mean`."""
    if changing(plan.transforms):
        return list(names)
    several = separated(plan)
    inexact = []
    for name in names:
        recipe = plan.tensors.get(name)
        source = name if recipe is None else recipe.source
        copies = recipe is not None and any(
            (axis_number, factor_number) not in recipe.shared and not isinstance(factor, Kept)
            for axis_number, axis in enumerate(recipe.axes)
            for factor_number, factor in enumerate(axis)
        )
        filled = recipe is not None and any(fills_of(factor) for axis in recipe.axes for factor in axis)
        if source in several or filled or (copies and not plan.strategy_of(name).law.is_even):
            inexact.append(name)
    return inexact


# -- writing ----------------------------------------------------------------------------------------------------


def _write_safetensors(out: Path, grown: Mapping[str, GrownMoments], kind: Kind) -> None:
    first, second, step = (names[kind == "jax"] for names in (FIRST, SECOND, STEP))
    arrays: dict[str, Tensor] = {}
    for path, moments in grown.items():
        arrays[f"{first}.{path}"], arrays[f"{second}.{path}"] = moments.first, moments.second
    steps = {path: moments.step for path, moments in grown.items()}
    if len(set(steps.values())) == 1:
        arrays[step] = np.asarray(next(iter(steps.values())), np.int32 if kind == "jax" else np.float32)
    elif kind == "jax":
        least, most = min(steps.values()), max(steps.values())
        raise BadRequest(
            f"the tensors took different numbers of steps ({least:g} to {most:g}), but optax has one count for all"
        )
    else:
        arrays |= {f"{step}.{path}": np.asarray(count, np.float32) for path, count in steps.items()}
    write_safetensors(arrays, out.parent, name=out.name, metadata={"format": "pt"})


def _groups(
    saved: State,
    names: Mapping[str, str],
    plan: Plan,
    weights: Sequence[Weight],
    places: Mapping[str, Placed],
) -> list[Group]:
    """Return the saved groups with the grown model's parameters.

    A parameter of a new layer joins the group of what it is a copy of. One that was in no group joins the first.
    """
    if not saved.groups:
        return []
    number_of = {
        names[name]: number for number, group in enumerate(saved.groups) for name in group.names if name in names
    }
    members: list[set[str]] = [set() for _ in saved.groups]
    for weight in weights:
        origin = _source(plan, weight)
        origin = places[origin].source if origin in places else origin
        members[number_of.get(origin, 0)].add(weight.path)
    return [Group(group.settings, frozenset(paths)) for group, paths in zip(saved.groups, members, strict=True)]


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
        defaults = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).state_dict()["param_groups"][0]
        settings = {key: value for key, value in defaults.items() if key != "params"}
        groups = [Group(settings, frozenset(names))]
    scratch = out.with_name(f".{out.name}.partial")
    try:
        # No moment is ever whole in memory: we compute it block by block into a scratch file, and torch saves that.
        _write_safetensors(scratch, grown, "safetensors")
        tensors = {name: torch.from_numpy(array.read()) for name, array in read_safetensors(scratch).items()}
        state: dict[int, Any] = {}
        written: list[dict[str, Any]] = []
        for group in groups:
            members = [name for name in names if name in group.names]
            start = sum(len(earlier["params"]) for earlier in written)
            written.append({**group.settings, "params": [*range(start, start + len(members))], "param_names": members})
            for number, name in enumerate(members, start):
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
