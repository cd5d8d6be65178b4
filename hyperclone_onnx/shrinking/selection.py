"""Makes a model smaller by keeping some of its rows, columns and layers (weight selection, arXiv 2311.18823)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.expansion.making import Clock, Planned, Run
from hyperclone_onnx.expansion.report import report_of
from hyperclone_onnx.layers.stacks import Stack
from hyperclone_onnx.plan.plans import METADATA_KEY, Plan, TransformStep
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.picking import Select, pick
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.target import like as like_target
from hyperclone_onnx.planning.target import read_target
from hyperclone_onnx.publishing.publication import check_output
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.rewriting.source_record import METADATA_KEY as SOURCE_KEY
from hyperclone_onnx.shrinking.gains import gain_scales, norms_of, with_scales
from hyperclone_onnx.shrinking.importance import Scores, best, dimension_scores, layer_scores, with_best
from hyperclone_onnx.transforms.layers import LayersRequest, stacks_of, step_without
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.inputs.search import Wishes

SELECTED_KEY = "hyperclone_onnx.selected"
"""The entry of a small model's metadata that says which indices it has kept."""


@dataclass(frozen=True)
class Wish:
    """What is to become smaller, and which parts are kept."""

    factor: Fraction = Fraction(1)
    sizes: Mapping[str, int] = field(default_factory=dict)
    layers: LayersRequest | None = None
    select: Select = "even"
    chosen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The indices that single dimensions keep, and under ``layers`` the layers that stay."""
    like: Path | None = None
    by_importance: bool = False
    """Whether the parts with the highest scores are kept, in the place of those that `select` gives."""
    data: Inputs | None = None
    """The inputs on which parts are scored and norms are measured; random ones by default."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self.factor == 1 and not self.sizes and self.layers is None and not self.chosen and self.like is None

    def to_json(self) -> dict[str, Any]:
        """The wish as plain data."""
        return {
            "factor": float(self.factor),
            "sizes": dict(self.sizes),
            "layers": self.layers if isinstance(self.layers, int) else dict(self.layers or {}),
            "select": self.select,
            "chosen": {name: list(indices) for name, indices in self.chosen.items()},
            "by_importance": self.by_importance,
        }


def read_chosen(path: Path) -> dict[str, list[int]]:
    """The lists of indices in a file: JSON, a list by the name of a dimension or a role, or by ``layers``.

    Raises:
        BadRequest: the file cannot be read, or has another form.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BadRequest(f"--select {path}: neither even nor first, and no readable JSON file ({problem})") from problem
    if not isinstance(data, dict) or not all(
        isinstance(indices, list) and all(type(index) is int for index in indices) for indices in data.values()
    ):
        raise BadRequest(f'--select {path}: give lists of indices by dimension or role, such as {{"ffn.0": [0, 3, 5]}}')
    return data


def plan_selection(model: Path, out: Path, wish: Wish, run: Run, clock: Clock) -> tuple[Planned, Scores]:
    """Read a model and plan which of its parts are kept.

    Returns:
        The planned model, and the scores of its parts if they were asked for.

    Raises:
        BadRequest: the wish does not fit the model.
        Refused: a dimension must keep its size.
    """
    run.say("reading")
    wish = _like(model, wish)
    steps, scores = _layer_steps(model, wish, run)
    analysis = analyse(model, steps)
    check_output(out, set(analysis.files))
    run.say("planning")
    chosen = {name: indices for name, indices in wish.chosen.items() if name != "layers"}
    growth = pick(analysis.dimensions, wish.factor, wish.sizes, wish.select, chosen)
    if not growth.maps and not steps:
        raise BadRequest(f"{model}: nothing would become smaller: every size stays as it is")
    notes: list[str] = []
    if growth.maps and wish.by_importance:
        run.say("scoring dimensions")
        wishes = _wishes(analysis, wish, run)
        scores = replace(scores, dims=dimension_scores(analysis, growth, wishes, run.device))
        without = with_best(growth, scores.dims)
        if without:
            notes.append(
                f"no weight reads {', '.join(without)} in a place that can be measured: evenly spaced indices stay"
            )
    plan = make_plan(growth, Strategy("selection"))
    if growth.maps:
        plan, more = _with_gains(analysis, growth, plan, wish, run)
        notes += more
    plan = replace(plan, source=provenance(analysis.model, wish.to_json()), transforms=steps)
    small = rewrite(analysis.model, plan)
    small.metadata_props[SELECTED_KEY] = small.metadata_props.pop(METADATA_KEY)
    small.metadata_props.pop(SOURCE_KEY, None)
    result = report_of(analysis, out, growth, plan, small)
    clock.lap("plan")
    result = replace(result, notes=(*result.notes, *notes), seconds=clock.seconds)
    return Planned(analysis, plan, small, result), scores


def _with_gains(analysis: Analysis, growth: Growth, plan: Plan, wish: Wish, run: Run) -> tuple[Plan, list[str]]:
    """The plan with the gains of norms scaled by what the norms lose, and notes where that is not possible."""
    norms, without = norms_of(growth)
    notes = (
        [f"{without} norms over a smaller axis have no stored gain: their scale was left as it is"] if without else []
    )
    if not norms:
        return plan, notes
    run.say("measuring norms")
    wishes = _wishes(analysis, wish, run)
    try:
        scales = gain_scales(analysis, growth, norms, wishes, run.device)
    except (Refused, RuntimeError) as problem:
        if wishes.given:
            raise
        return plan, [*notes, f"the gains of norms were not scaled, because the model did not run: {problem}"]
    return with_scales(plan, scales), notes


def _wishes(analysis: Analysis, wish: Wish, run: Run) -> Wishes:
    """What the user says of the inputs on which activations are measured."""
    if wish.data is None:
        return wishes_of(analysis.model, run.inputs, run.dims)
    try:
        return wishes_of(analysis.model, wish.data, run.dims)
    except BadRequest as problem:  # it speaks of the inputs on which models are compared
        raise BadRequest(str(problem).replace("--inputs", "--data", 1)) from problem


def _like(model: Path, wish: Wish) -> Wish:
    """The wish with the sizes of the model that it names. Its own sizes replace these."""
    if wish.like is None:
        return wish
    if wish.factor != 1:
        raise BadRequest("a factor and a target contradict each other: leave one of the two out")
    target = read_target(wish.like)
    likeness = like_target(analyse(model), target)
    layers = wish.layers if wish.layers is not None else target.sizes.get("layers")
    return replace(wish, sizes={**likeness.sizes, **wish.sizes}, layers=layers, like=None)


# -- layers -----------------------------------------------------------------------------------------------


def _layer_steps(model: Path, wish: Wish, run: Run) -> tuple[tuple[TransformStep, ...], Scores]:
    """The step that leaves layers out, if any, and the scores of the layers if they were asked for.

    Raises:
        BadRequest: the graph has no such stack, or not more layers than are asked for.
    """
    listed = wish.chosen.get("layers")
    if wish.layers is None and listed is None:
        return (), Scores()
    source = source_of(model).model
    stacks = {stack.name: stack for stack in stacks_of(source.clone())}
    if not stacks:
        raise BadRequest(f"{model}: layers were asked for, but no layers were found in this graph: leave out --layers")
    wanted = wish.layers
    if listed is not None or isinstance(wanted, int):
        if len(stacks) > 1:
            names = ", ".join(stacks)
            raise BadRequest(f"{model}: the graph has several stacks ({names}): say how many layers each has")
        (name,) = stacks
        wanted = {name: wanted if isinstance(wanted, int) else len(listed or ())}
    kept: dict[str, list[int]] = {}
    scored: dict[str, tuple[float, ...]] = {}
    for name, number in (wanted or {}).items():
        if name not in stacks:
            raise BadRequest(f"{model}: the graph has no stack of layers {name!r}. It has {', '.join(stacks)}")
        units = _units(model, stacks[name], number, listed)
        if len(units) == len(stacks[name].units):
            continue
        if wish.by_importance and listed is None:
            run.say("scoring layers")
            analysis = analyse(model)
            wishes = _wishes(analysis, wish, run)
            scored[name] = layer_scores(model, analysis, stacks[name], wishes, run.device)
            units = best(scored[name], len(units))
        kept[name] = units
    return (step_without(source, kept),) if kept else (), Scores(layers=scored)


def _units(model: Path, stack: Stack, wanted: int, listed: Sequence[int] | None) -> list[int]:
    """The units of a stack that stay: the first ones, or those of a list."""
    if wanted > stack.layers:
        raise BadRequest(
            f"{model}: layers={wanted} is above the source's {stack.layers}: shrink takes layers away, use expand to "
            "add some"
        )
    if wanted < 1 or wanted % stack.period:
        raise BadRequest(
            f"{model}: the layers of {stack.name!r} repeat in groups of {stack.period}: ask for a multiple of "
            f"{stack.period}, not for {wanted}"
        )
    if listed is None:
        return list(range(wanted // stack.period))
    if len(listed) != wanted:
        raise BadRequest(f"{model}: a list of {len(listed)} layers, and --layers {wanted}")
    units = sorted({layer // stack.period for layer in listed})
    whole = [layer for unit in units for layer in range(unit * stack.period, (unit + 1) * stack.period)]
    if sorted(listed) != whole or whole[-1] >= stack.layers:
        raise BadRequest(
            f"{model}: the layers {list(listed)} are not whole groups of {stack.period} of the layers 0 to "
            f"{stack.layers - 1}, each once"
        )
    return units


def lost_inputs(analysis: Analysis, source: ir.Model) -> list[str]:
    """The inputs of the source that the small model does not have: those of layers that are left out."""
    from hyperclone_onnx.transforms.interface import original_names

    kept = set(original_names(analysis.model.graph.inputs).values())
    return [value.name or "" for value in source.graph.inputs if value.name not in kept]
