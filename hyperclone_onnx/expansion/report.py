"""The report of a growth: what grew, what did not and why, and whether the result is equal to its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.analysing import Analysis, count_parameters, is_code, untransformed
from hyperclone_onnx.analysis.quantities import quantities
from hyperclone_onnx.analysis.roles import explain
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.experts import mixtures
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.target import Compared, Likeness
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.tensors.assembled import assemble
from hyperclone_onnx.transforms.interface import notes_of
from hyperclone_onnx.transforms.layers import deepened
from hyperclone_onnx.validation.validating import Validation


@dataclass(frozen=True)
class Kept:
    """A dimension that keeps its size: its growth was not requested, or is not possible."""

    name: str
    role: str
    size: int
    reason: str


@dataclass(frozen=True)
class SizeChange:
    """A size as people call it, before and after: hidden, ffn, query heads, key/value heads, the size of a head."""

    role: str
    name: str
    before: int
    after: int
    wanted: float | None = None
    """The size that a fraction as the factor gives, where that is no size which the graph can have."""
    dims: tuple[str, ...] = ()
    """The names of its dimensions."""


@dataclass(frozen=True, repr=False)
class Expansion(Summarised):
    """The report of an expansion."""

    source: str
    output: str | None
    """None if no file was to be written."""
    plan: Plan
    kept: list[Kept]
    parameters_before: int
    parameters_after: int
    separated: dict[str, list[str]] = field(default_factory=dict)
    """For tensors that the source stores once and the grown model several times: the further names."""
    quantised: int = 0
    """The number of quantised weights. Their codes are repeated and their scales divided, so that they get no noise."""
    validation: Validation | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    sizes: tuple[SizeChange, ...] = ()
    """Every size that people have a name for."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The name for people of each dimension that has another one."""
    files: Mapping[str, int] = field(default_factory=dict)
    """The names of the written files, the model first and then its data files, with their sizes in bytes."""
    likeness: Likeness | None = None
    """The target whose sizes were requested, if one was."""
    notes: tuple[str, ...] = ()
    """What the transforms of the source say about their result."""
    model: Any = None
    """The grown model, where `expand` got no output path: an ``onnx_ir.Model`` if the source was one, else an
    ``onnx.ModelProto``."""

    @property
    def compared(self) -> list[Compared]:
        """The sizes of source, target and result side by side; empty without a target."""
        if self.likeness is None:
            return []
        before: dict[str, set[int]] = {}
        after: dict[str, set[int]] = {}
        for change in self.sizes:
            before.setdefault(change.role, set()).add(change.before)
            after.setdefault(change.role, set()).add(change.after)
        tables = {dimension.size for dimension in self.kept if dimension.role == "vocab"}
        sides = (
            {role: next(iter(sizes)) for role, sizes in {**side, "vocab": tables}.items() if len(sizes) == 1}
            for side in (before, after)
        )
        return self.likeness.compared(*sides)

    def summary(self) -> Summary:
        """What grew, and whether the result is equal to its source."""
        grown = [change for change in self.sizes if change.after != change.before]
        rows = [(change.name, change.before, change.after) for change in grown] + [
            (dimension.name, dimension.size, dimension.reason) for dimension in self.kept
        ]
        where = self.output or ("in memory" if self.model is not None else "not written")
        verdict = "not validated" if self.validation is None else self.validation.verdict
        line = (
            f"{self.source} -> {where}, {self.parameters_before:,} -> {self.parameters_after:,} parameters, {verdict}"
        )
        return Summary(line, ("dimension", "from", "to, or why not"), rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, without the recipes of the tensors."""
        return {
            "source": self.source,
            "output": self.output,
            "strategy": self.plan.strategy.to_json(),
            "interface": "keep" if self.plan.keep_interface else "grow",
            "grown": {
                name: {"role": dim.role, "from": dim.map.size, "to": dim.map.grown}
                for name, dim in self.plan.dims.items()
            },
            **({"layers": layers} if (layers := deepened(self.plan.transforms)) else {}),
            **({"experts": experts} if (experts := mixtures(self.plan.transforms)) else {}),
            "kept": [asdict(dimension) for dimension in self.kept],
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "separated": self.separated,
            "quantised": self.quantised,
            **({"weighed_norms": list(weighed)} if (weighed := self.plan.weighed) else {}),
            "validation": None if self.validation is None else self.validation.to_json(),
            "seconds": self.seconds,
            "sizes": [
                {"role": size.role, "name": size.name, "from": size.before, "to": size.after}
                | ({} if size.wanted is None else {"wanted": size.wanted})
                for size in self.sizes
            ],
            "files": dict(self.files),
            **({"notes": list(self.notes)} if self.notes else {}),
            **(
                {}
                if self.likeness is None
                else {
                    "like": self.likeness.path,
                    "compared": [asdict(row) for row in self.compared],
                    "differences": list(self.likeness.differences),
                }
            ),
        }


def report_of(analysis: Analysis, out: Path | None, growth: Growth, plan: Plan, big: ir.Model) -> Expansion:
    """The report of what a plan does to a model, before anything is written."""
    kept = [
        Kept(named.name, named.role, named.size, _why_kept(growth, named.dim))
        for named in growth.named
        if named.name not in plan.dims and named.role != "other"
    ]
    variants: dict[str, list[str]] = {}
    quantised = 0
    for name, recipe in plan.tensors.items():
        tensor = assemble(recipe.origin, analysis.model)
        if isinstance(recipe.origin, str) and name != recipe.origin and tensor.size > 1:
            variants.setdefault(recipe.origin, []).append(name)
        quantised += recipe.grows and is_code(tensor.dtype)
    return Expansion(
        str(analysis.path),
        None if out is None else str(out),
        plan,
        kept,
        count_parameters(untransformed(analysis) or analysis.model),
        count_parameters(big),
        variants,
        quantised,
        sizes=_size_changes(growth),
        labels={named.name: named.label for named in growth.named if named.label},
        notes=notes_of(analysis.model.graph),
    )


def _size_changes(growth: Growth) -> tuple[SizeChange, ...]:
    """Every size that people have a name for, in the order of the graph's dimensions."""
    names = {named.dim: named.name for named in growth.named}
    after = {dim: source_map.grown for dim, (_, source_map) in growth.maps.items()}
    wanted = {dim: growth.rounded[name] for dim, name in names.items() if name in growth.rounded}
    exact = {dim: Fraction(grown) for dim, grown in after.items()} | wanted
    changes = [
        SizeChange(
            quantity.role,
            quantity.name,
            quantity.size,
            quantity.size_with(after),
            float(quantity.exact_size_with(exact)) if not wanted.keys().isdisjoint(quantity.dims) else None,
            tuple(names[dim] for dim in quantity.dims),
        )
        for quantity in quantities(growth.dimensions, growth.named)
    ]
    order = {named.name: number for number, named in enumerate(growth.named)}
    return tuple(sorted(changes, key=lambda change: min(order[name] for name in change.dims)))


def _why_kept(growth: Growth, dim: Dim) -> str:
    if dim in growth.beside:
        return "another factor of the same width grows"
    return explain(growth.dimensions, dim) if dim.pin is not None else "not asked to grow"
