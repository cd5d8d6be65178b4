"""Turns a request for experts into the step of a plan that makes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.analysis.feed_forward import Blocks, find_feed_forward
from hyperclone_onnx.analysis.mixtures import find_mixtures
from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.plan.plans import TransformStep
from hyperclone_onnx.planning.activations_of_experts import with_activation
from hyperclone_onnx.transforms.feed_forward import FeedForward

STEP, MORE = "experts", "more_experts"
"""The names of the transforms: one makes experts of feed-forward blocks, the other multiplies those of mixtures."""

Operator = Literal["standard", "microsoft"]
OPERATORS: tuple[Operator, ...] = ("standard", "microsoft")

ExpertsIn = Literal["all"] | int | Sequence[int]
"""Which blocks become experts: all; every second, third, ... one; or those of a list, counted from 0."""


@dataclass(frozen=True)
class Experts:
    """The request for a mixture of experts.

    Args:
        number: the number of experts of each block.
        top_k: how many of them are chosen for a token.
        where: which blocks become experts.
        granularity: the number of parts that each expert is cut into.
        shared: also keep the block as an expert that always runs.
        seed: the seed of the routers, and of what parts the experts.
        noise: the standard deviation of the noise on the weights of each routed expert, as a part of that of the
            weight. It changes what the model computes.
        redraw: the ratio of the hidden units of each routed expert that are drawn anew. It changes that too.
        operator: "standard" for ONNX's own operators, or "microsoft" for ONNX Runtime's operator MoE.

    Raises:
        BadRequest: the numbers do not fit together.
    """

    number: int
    top_k: int
    where: ExpertsIn = "all"
    granularity: int = 1
    shared: bool = False
    seed: int = 0
    noise: float = 0.0
    redraw: float = 0.0
    operator: Operator = "standard"

    def __post_init__(self) -> None:
        for name, number in (("number", self.number), ("top_k", self.top_k), ("granularity", self.granularity)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise BadRequest(f"{name} is {number!r}: give a whole number from 1 on")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise BadRequest(f"--expert-noise {self.noise} is no level: give a number from 0 on, such as 0.1")
        if not 0 <= self.redraw <= 1:
            raise BadRequest(f"--drop-upcycle {self.redraw} is no ratio: give a number from 0 to 1, such as 0.5")
        if self.operator not in OPERATORS:
            raise BadRequest(f"no operator {self.operator!r} for a mixture: it is {' or '.join(OPERATORS)}")
        if self.top_k > self.number:
            raise BadRequest(
                f"--top-k {self.top_k} chooses more experts than the {self.number} of --experts: give at most "
                f"{self.number}"
            )

    def step(self, analysis: Analysis) -> TransformStep:
        """The step that makes the experts.

        Args:
            analysis: the graph whose blocks become experts.

        Raises:
            BadRequest: the request does not fit the graph.
            Refused: a block is of a form that cannot be taken apart.
        """
        blocks = self._chosen(find_feed_forward(analysis))
        for block in blocks:
            if block.ffn % self.granularity:
                raise BadRequest(
                    f"--granularity {self.granularity} does not divide the {block.ffn} hidden units of {block.name} "
                    f"(it ends at {block.gives!r}): give a number that divides {block.ffn}"
                )
        if self.operator == "microsoft":
            blocks = tuple(with_activation(analysis.model, block) for block in blocks)
        options: dict[str, Any] = {"experts": self.number, "top_k": self.top_k}
        if self.granularity > 1:
            options["granularity"] = self.granularity
        if self.shared:
            options["shared"] = True
        if self.noise:
            options["noise"] = self.noise
        if self.redraw:
            options["redraw"] = self.redraw
        if self.operator != "standard":
            options["operator"] = self.operator
        return TransformStep(STEP, {**options, "seed": self.seed, "blocks": [block.to_json() for block in blocks]})

    def _chosen(self, blocks: Blocks) -> tuple[FeedForward, ...]:
        count = len(blocks.blocks)
        if not count:
            reasons = [f"{node}: {why}" for node, why in blocks.refused.items()]
            if reasons:
                more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
                raise Refused(f"no feed-forward block of this graph can become experts: {reasons[0]}{more}")
            raise BadRequest(
                "experts were asked for, but this graph has no feed-forward block: no weights make hidden units that "
                "other weights sum over. Leave out --experts"
            )
        if isinstance(self.where, int):
            if self.where > count:
                raise BadRequest(
                    f"--experts-in takes every {self.where} blocks, and this graph has {count} feed-forward blocks"
                )
            return blocks.blocks[self.where - 1 :: self.where]
        if isinstance(self.where, str):
            return blocks.blocks
        beyond = [number for number in self.where if not 0 <= number < count]
        if beyond:
            raise BadRequest(
                f"--experts-in names block {beyond[0]}; the feed-forward blocks of this graph are 0 to {count - 1}"
            )
        return tuple(blocks.blocks[number] for number in sorted(set(self.where)))


def more_experts_step(analysis: Analysis, factor: int) -> TransformStep | None:
    """The step that multiplies the experts of a graph's mixtures, and how many are chosen; None for the factor 1.

    Args:
        analysis: the graph.
        factor: how often each expert is there afterwards.

    Raises:
        BadRequest: the factor is no whole number from 1 on, or the graph has no mixture.
        Refused: none of its mixtures is of a form whose experts can be multiplied.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise BadRequest(f"--more-experts {factor!r}: give a whole number from 1 on, such as 2")
    search = find_mixtures(analysis)
    if search.refused:
        (node, why), more = next(iter(search.refused.items())), len(search.refused) - 1
        others = f" (and {more} more)" if more else ""
        raise Refused(f"the experts that {node} chooses cannot be multiplied: {why}{others}")
    if not search.mixtures:
        raise BadRequest(
            "--more-experts multiplies experts, and this graph has no mixture of experts. "
            "--experts 8 --top-k 2 makes experts of its feed-forward blocks"
        )
    if factor == 1:
        return None
    return TransformStep(MORE, {"factor": factor, "mixtures": [mixture.to_json() for mixture in search.mixtures]})


def mixtures(steps: Iterable[TransformStep]) -> list[dict[str, int]]:
    """What the steps of a plan make of feed-forward blocks: the numbers of blocks, of experts and of chosen ones."""
    return [
        {
            "blocks": len(step.options["blocks"]),
            "experts": step.options["experts"] * step.options.get("granularity", 1),
            "chosen": step.options["top_k"] * step.options.get("granularity", 1),
        }
        for step in steps
        if step.name == STEP
    ] + [
        {
            "blocks": len(step.options["mixtures"]),
            "experts": step.options["factor"] * step.options["mixtures"][0]["experts"],
            "chosen": step.options["factor"] * step.options["mixtures"][0]["chosen"],
        }
        for step in steps
        if step.name == MORE
    ]
