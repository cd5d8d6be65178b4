"""The request of a growth: what a user asks for, and the plan that it means for a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.analysis.trainable import merged
from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.plan.plans import Plan, TransformStep
from hyperclone_onnx.plan.strategies import Strategy, StrategyRule
from hyperclone_onnx.planning.asked import rules_of, strategy_of, whole_numbers
from hyperclone_onnx.planning.drawing import with_drawn_tensors
from hyperclone_onnx.planning.experts import Experts, more_experts_step
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.next_layers import with_next_layers
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.planning.request import Growth, size, whole_or_fraction
from hyperclone_onnx.planning.strategy_rules import with_rules
from hyperclone_onnx.planning.target import Likeness, layers_like, layers_of, read_target
from hyperclone_onnx.planning.target import like as like_target
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.transforms.layers import Depth, LayersAt, LayersRequest, step_for
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.transforms.source import source_of

_CHANGES = {
    "layers": "copies of layers that are not identity blocks change",
    "experts": "experts that part from the beginning (--expert-noise, --drop-upcycle) change",
}
"""The beginning of a message about a transform that changes what a model computes."""


class GrowthOptions(TypedDict, total=False):
    """The arguments of `expand` that say what the grown model is, without the factors."""

    sizes: Mapping[str, float] | None
    like: str | os.PathLike[str] | None
    maps: Mapping[str, SourceMap] | None
    strategy: Strategy | str | None
    strategies: Sequence[StrategyRule]
    untie: bool
    separate: bool
    keep_interface: bool
    transforms: Sequence[TransformStep]
    layers: LayersRequest | None
    depth: Depth
    layers_at: LayersAt
    experts: Experts | None
    more_experts: int | None
    allow_change: bool
    recipe: Mapping[str, Any] | None


@dataclass(frozen=True)
class GrowthRequest:
    """The request of a growth. Its fields are arguments of `expand`."""

    factor: float
    requests: Mapping[str, int]
    maps: Mapping[str, SourceMap] | None = None
    strategy: Strategy | None = None
    untie: bool = False
    keep_interface: bool = False
    transforms: Sequence[TransformStep] = ()
    allow_change: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    like: str | os.PathLike[str] | None = None
    strategies: Sequence[StrategyRule] = ()
    recipe: Mapping[str, Any] | None = None
    """The recipe file of the request, to be recorded in the plan."""
    layers: LayersRequest | None = None
    depth: Depth = "identity"
    layers_at: LayersAt = "even"
    experts: Experts | None = None
    more_experts: int | None = None
    separate: bool = False

    @staticmethod
    def of(
        factor: float | None, requests: Mapping[str, float] | None, **options: Unpack[GrowthOptions]
    ) -> GrowthRequest:
        """The request that is meant by arguments as people write them.

        Raises:
            BadRequest: an argument is wrong, or all are missing that say how much to grow.
        """
        parts = (requests, *map(options.get, ("maps", "sizes", "like", "layers", "experts", "more_experts")))
        if factor is None and not any(part is not None for part in parts) and not options.get("transforms"):
            raise BadRequest(
                'say how much to grow: factor=2, requests={"ffn": 2}, sizes={"hidden": 960}, like=TARGET, layers=32 or '
                "experts=Experts(8, 2)"
            )
        fields: dict[str, Any] = {
            **options,
            "requests": whole_numbers(requests, "requests", "factor"),
            "sizes": whole_numbers(options.get("sizes"), "sizes", "size"),
            "strategy": strategy_of(options.get("strategy")),
            "strategies": rules_of(options.get("strategies", ())),
        }
        return GrowthRequest(1 if factor is None else factor, **fields)

    def __post_init__(self) -> None:
        default = self.strategy or Strategy()
        try:
            laws = [strategy.law for strategy in (default, *(rule.strategy(default) for rule in self.strategies))]
        except ValueError as problem:
            raise BadRequest(str(problem)) from problem
        for law in laws:
            if not law.preserves and not self.allow_change:
                raise BadRequest(
                    f"the strategy {law.name!r} changes what the model computes: --allow-change, or allow_change=True "
                    "in Python, says that you want that"
                )
        changed = changing(self.transforms)
        if changed and not self.allow_change:
            what = _CHANGES.get(changed[0], f"the transform {changed[0]!r} changes")
            raise BadRequest(
                f"{what} what the model computes: --allow-change, or allow_change=True in Python, says that you want "
                "that"
            )

    def to_json(self) -> dict[str, Any]:
        """The request as plain data, without the strategy, which the plan has."""
        factor = whole_or_fraction(self.factor)
        data: dict[str, Any] = {
            "factor": factor if isinstance(factor, int) else float(factor),
            "requests": dict(self.requests),
            "maps": {
                name: {"size": source_map.size, **source_map.to_json()}
                for name, source_map in (self.maps or {}).items()
            },
            "untie": self.untie,
            "keep_interface": self.keep_interface,
        }
        if self.sizes:  # the digest of a request without sizes is what it was before there were sizes
            data["sizes"] = dict(self.sizes)
        if self.strategies:
            data["strategies"] = [rule.to_json() for rule in self.strategies]
        return data


def with_target(analysis: Analysis, request: GrowthRequest) -> tuple[GrowthRequest, Likeness | None]:
    """The request with the sizes of the model that it names, if it names one. Its own sizes replace these."""
    if request.like is None:
        return request, None
    if whole_or_fraction(request.factor) != 1:
        raise BadRequest("a factor and a target contradict each other: leave one of the two out")
    target = read_target(request.like)
    likeness = like_target(analysis, target)
    return replace(request, sizes={**likeness.sizes, **request.sizes}), likeness


def growth_and_plan(analysis: Analysis, request: GrowthRequest) -> tuple[Growth, Plan]:
    """What grows, and the plan of it, which records the request and the digests of the source."""
    growth = size(analysis.dimensions, request.factor, request.requests, request.maps, request.sizes)
    plan = make_plan(growth, request.strategy, untie=request.untie, keep_interface=request.keep_interface)
    plan = with_drawn_tensors(analysis.model, plan, request.strategies)
    plan = with_next_layers(analysis.model, with_rules(growth, plan, request.strategies))
    plan = replace(plan, recipe=dict(request.recipe or {}))
    options = {**request.to_json(), "strategy": plan.strategy.to_json()}
    return growth, replace(plan, source=provenance(analysis.model, options), transforms=analysis.transforms)


def with_transforms(model: GivenModel, request: GrowthRequest) -> tuple[GrowthRequest, int | None]:
    """The request with its transforms made, and the layers of the source if the request has a target."""
    if request.separate:
        request = replace(request, transforms=_with_separate(model, request), separate=False)
    layers_before: int | None = None
    if request.like is not None:
        source = source_of(model, request.transforms).model
        layers_before = layers_of(source)
        if request.layers is None:
            request = replace(request, layers=layers_like(source, read_target(request.like)))
    if request.layers is not None:
        request = replace(request, transforms=_with_layers(model, request), layers=None)
    if request.experts is not None:
        request = replace(request, transforms=_with_experts(model, request), experts=None)
    if request.more_experts is not None:
        request = replace(request, transforms=_with_more_experts(model, request), more_experts=None)
    return request, layers_before


def _with_layers(model: GivenModel, request: GrowthRequest) -> tuple[TransformStep, ...]:
    """The transforms, and the one that makes the layers that were asked for."""
    assert request.layers is not None
    source = source_of(model, request.transforms)
    try:
        step = step_for(source.model, request.layers, request.depth, request.layers_at)
    except BadRequest as problem:
        raise BadRequest(f"{source.path}: {problem}") from problem
    return (*request.transforms, *([] if step is None else [step]))


def _with_experts(model: GivenModel, request: GrowthRequest) -> tuple[TransformStep, ...]:
    """The transforms, and the one that makes the experts that were asked for."""
    assert request.experts is not None
    analysis = analyse(model, request.transforms)
    try:
        return (*request.transforms, request.experts.step(analysis))
    except (BadRequest, Refused) as problem:
        raise type(problem)(f"{analysis.path}: {problem}") from problem


def _with_more_experts(model: GivenModel, request: GrowthRequest) -> tuple[TransformStep, ...]:
    """The transforms, and the one that multiplies the experts of mixtures."""
    assert request.more_experts is not None
    analysis = analyse(model, request.transforms)
    try:
        step = more_experts_step(analysis, request.more_experts)
    except (BadRequest, Refused) as problem:
        raise type(problem)(f"{analysis.path}: {problem}") from problem
    return (*request.transforms, *([] if step is None else [step]))


def _with_separate(model: GivenModel, request: GrowthRequest) -> tuple[TransformStep, ...]:
    """The transforms, and the one that gives each use of a merged tensor its own."""
    names = merged(source_of(model, request.transforms).model)
    return (*request.transforms, *([TransformStep("separate", {"tensors": names})] if names else []))
