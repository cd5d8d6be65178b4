"""The transform that puts more layers into a graph, and what a request of layers means for a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.layers.stacks import Stack, find_stacks
from hyperclone_onnx.layers.unfusing import unfuse
from hyperclone_onnx.plan.plans import TransformStep
from hyperclone_onnx.transforms.deepening import Place, deepen
from hyperclone_onnx.transforms.identity_blocks import identity_block
from hyperclone_onnx.transforms.interface import note
from hyperclone_onnx.transforms.registry import transform

Depth = Literal["identity", "stack", "interpose"]
DEPTHS: tuple[Depth, ...] = ("identity", "stack", "interpose")
LayersRequest = int | Mapping[str, int]
"""The number of layers wanted, or one for each stack by name."""
LayersAt = Literal["even", "end"] | Sequence[int]
"""Where new layers stand: evenly spread, behind the last layer, or behind each of the layers in a list."""


def _preserves(options: Mapping[str, Any]) -> bool:
    """Whether every copy adds nothing, and no layer is left out."""
    return all(
        len(stack["sources"]) == stack["units"] + len(stack["identity"])
        and len(set(stack["sources"])) == stack["units"]
        for stack in options["stacks"]
    )


@transform("layers", preserves=_preserves)
def layers(model: ir.Model, *, stacks: Sequence[Mapping[str, Any]]) -> ir.Model:
    """Put copies of layers into stacks of a graph.

    Args:
        model: the normalised graph, which is changed.
        stacks: for each stack that becomes deeper its name; the number of its `units` in the source; the number of
            layers in a unit, its `period`; `sources`, the unit
            in the source of each unit in the deeper model; and `identity`, the positions of the copies that add
            nothing. A unit is one layer, or one period of layers that are not all alike. Units that `sources` does not
            name are left out.

    Raises:
        BadModel: the graph does not have these stacks.
        Refused: a copy cannot be made to add nothing.
    """
    for options in stacks:
        named = {stack.name: stack for stack in stacks_of(model)}
        stack = named.get(options["name"])
        if stack is None or len(stack.units) != options["units"]:
            raise BadModel(f"the plan makes {options['units']} layers {options['name']!r} more; this graph has no such")
        places = []
        for position, source in enumerate(options["sources"]):
            is_identity = position in options["identity"]
            places.append(Place(source, identity_block(stack, source) if is_identity else None))
        _note_epsilon(model.graph, stack, places)
        deepen(model.graph, stack, places)
    return model


def _note_epsilon(graph: ir.Graph, stack: Stack, places: Sequence[Place]) -> None:
    """Note by how much the norms of a post-norm model let a new layer change what it should not change."""
    epsilon = max((place.identity.epsilon for place in places if place.identity is not None), default=0.0)
    if epsilon:
        note(
            graph,
            f"new layers of {stack.name!r} stand between norms: each normalises once more, which changes the stream by "
            f"about half of the norms' epsilon of {epsilon:g}, relatively",
        )


def stacks_of(model: ir.Model) -> list[Stack]:
    """The stacks of layers of a normalised graph. Fused norms in it are taken apart."""
    unfuse(model.graph)
    return find_stacks(model.graph)


def step_for(
    model: ir.Model, wanted: LayersRequest, depth: Depth = "identity", at: LayersAt = "even"
) -> TransformStep | None:
    """The step that gives a graph as many layers as asked for; None if it has them already.

    Args:
        model: the normalised graph. Its fused norms are taken apart.
        wanted: the number of layers, or one for each stack by name.
        depth: how layers are made: copies that add nothing, or copies that change what the model computes.
        at: where new layers stand.

    Raises:
        BadRequest: the request does not fit the graph.
    """
    stacks = {stack.name: stack for stack in stacks_of(model)}
    if not stacks:
        raise BadRequest(
            "layers were asked for, but no layers were found in this graph: no part of it is repeated node by node. "
            "Leave out --layers, and grow the width alone"
        )
    listed = ", ".join(f"{stack.name} ({stack.layers} layers)" for stack in stacks.values())
    if isinstance(wanted, int):
        if len(stacks) > 1:
            example = ",".join(f"{name}={wanted}" for name in stacks)
            raise BadRequest(
                f"the graph has several stacks: {listed}. Say how many layers each has: --layers {example}"
            )
        wanted = dict.fromkeys(stacks, wanted)
    unknown = [name for name in wanted if name not in stacks]
    if unknown:
        raise BadRequest(f"the graph has no stack of layers {unknown[0]!r}. It has {listed}")
    entries = [_entry(stacks[name], number, depth, at) for name, number in wanted.items()]
    changed = [entry for entry in entries if len(entry["sources"]) > entry["units"]]
    return TransformStep("layers", {"stacks": changed}) if changed else None


def step_without(model: ir.Model, kept: Mapping[str, Sequence[int]]) -> TransformStep:
    """The step that leaves layers out.

    Args:
        model: the normalised graph. Its fused norms are taken apart.
        kept: the units that stay, in order, for each stack that becomes less deep.
    """
    stacks = {stack.name: stack for stack in stacks_of(model)}
    entries = [
        {
            "name": name,
            "units": len(stacks[name].units),
            "period": stacks[name].period,
            "sources": list(units),
            "identity": [],
        }
        for name, units in kept.items()
    ]
    return TransformStep("layers", {"stacks": entries})


def _entry(stack: Stack, wanted: int, depth: Depth, at: LayersAt) -> dict[str, Any]:
    units = len(stack.units)
    if wanted < stack.layers:
        raise BadRequest(
            f"{wanted} layers were asked for, and the stack {stack.name!r} has {stack.layers}. "
            f"A model cannot become less deep: ask for at least {stack.layers}"
        )
    if wanted % stack.period:
        raise BadRequest(
            f"{wanted} layers were asked for, but the layers of {stack.name!r} repeat in groups of {stack.period}: "
            f"ask for a multiple of {stack.period}"
        )
    more = wanted // stack.period - units
    if depth == "identity":
        sources = _with_copies(units, _behind(stack, more, at))
        copies = [place for place, source in enumerate(sources) if place and sources[place - 1] == source]
        return {"name": stack.name, "units": units, "period": stack.period, "sources": sources, "identity": copies}
    if not isinstance(at, str) or at != "even":
        raise BadRequest(f"--layers-at says where identity layers stand; --depth {depth} has its own places")
    total = units + more
    order = [place % units if depth == "stack" else place * units // total for place in range(total)]
    return {"name": stack.name, "units": units, "period": stack.period, "sources": order, "identity": []}


def _behind(stack: Stack, more: int, at: LayersAt) -> list[int]:
    """For each new unit, the unit behind which it stands."""
    units = len(stack.units)
    if at == "even":
        return [(number + 1) * units // more - 1 if more <= units else number * units // more for number in range(more)]
    if at == "end":
        return [units - 1] * more
    assert not isinstance(at, str)
    places = list(at)
    beyond = [place for place in places if not 0 <= place < stack.layers]
    if beyond:
        raise BadRequest(
            f"--layers-at names layer {beyond[0]}; the layers of {stack.name!r} are 0 to {stack.layers - 1}"
        )
    if len(places) != more * stack.period:
        raise BadRequest(
            f"--layers-at lists {len(places)} layers, but {more * stack.period} new ones were asked for: "
            "each new layer stands behind one layer of the list"
        )
    if stack.period > 1:
        raise BadRequest(
            f"the layers of {stack.name!r} repeat in groups of {stack.period}, which are copied as a whole: "
            "--layers-at even or end"
        )
    return places


def _with_copies(units: int, behind: Sequence[int]) -> list[int]:
    return [unit for unit in range(units) for _ in range(1 + behind.count(unit))]


def deepened(steps: Iterable[TransformStep]) -> dict[str, tuple[int, int]]:
    """The number of layers before and after, for each stack that the steps of a plan make deeper."""
    counts: dict[str, tuple[int, int]] = {}
    for step in steps:
        for stack in step.options["stacks"] if step.name == "layers" else ():
            before, after = (stack["period"] * number for number in (stack["units"], len(stack["sources"])))
            counts[stack["name"]] = counts.get(stack["name"], (before, 0))[0], after
    return counts
