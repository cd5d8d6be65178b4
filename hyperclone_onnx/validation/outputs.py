"""Compares the outputs of two models, one output after the other, over all input sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.rules.dimensions import Dimensions

Array = npt.NDArray[Any]

NOTHING_COMPARED = "nothing was compared: the source gives no number"

NOT_IDENTICAL = "values that must be identical differ"


@dataclass(frozen=True)
class OutputReport:
    """The differences of one output, over one input set or several."""

    name: str
    max_absolute: float = 0.0
    max_relative: float = 0.0
    """The largest difference, divided by the output's largest element."""
    top1_agreement: float | None = None
    kl_divergence: float | None = None
    problem: str = ""
    not_compared: bool = False
    """Whether nothing was compared, because the source has no finite number here; "silent" in the JSON."""
    noise: float | None = None
    """The change of the source when its rounding changes, divided by the output's largest element. None if it was not
    measured."""
    excess: float | None = None
    """The largest quotient of a difference and the difference that this noise allows. None if it was not measured."""
    note: str = ""
    """The reason why a difference does not count."""

    def joined(self, other: OutputReport) -> OutputReport:
        """Merge two reports of one output: the larger errors, the lower agreement, the later problem."""
        agreements = [one for one in (self.top1_agreement, other.top1_agreement) if one is not None]
        divergences = [one for one in (self.kl_divergence, other.kl_divergence) if one is not None]
        return OutputReport(
            self.name,
            max(self.max_absolute, other.max_absolute),
            max(self.max_relative, other.max_relative),
            min(agreements, default=None),
            max(divergences, default=None),
            other.problem or self.problem,
            self.not_compared and other.not_compared,
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, without the values that were not measured."""
        data = asdict(self)
        data["silent"] = data.pop("not_compared")
        unseen = {"silent": False, "noise": None, "excess": None, "note": ""}
        return {name: value for name, value in data.items() if name not in unseen or value != unseen[name]}

    def problem_beyond(self, tolerance: float) -> str:
        """The reason why this output differs. Empty if it is equal within the tolerance or the source's own noise."""
        if self.problem or self.max_relative <= tolerance or (self.excess is not None and self.excess <= 1.0):
            return self.problem
        noise = "" if self.noise is None else f"; the source itself moves by {self.noise:.1e}"
        return f"relative error {self.max_relative:.1e} > {tolerance:.1e}{noise}"


def joined_by_name(reports: Iterable[OutputReport]) -> tuple[OutputReport, ...]:
    """One report for each output, in order of first appearance."""
    by_name: dict[str, OutputReport] = {}
    for report in reports:
        known = by_name.get(report.name)
        by_name[report.name] = report if known is None else known.joined(report)
    return tuple(by_name.values())


def compare(name: str, want: Array, got: Array | None, *, logits: bool = False, tile: bool = False) -> OutputReport:
    """Compare one output of the grown model with the expected output.

    Args:
        name: the name of the output.
        want: the expected output: that of the source, repeated where it grew.
        got: the output of the grown model. None if it has no such output.
        logits: whether the last axis numbers classes. Then the most likely class and the divergence are compared too.
        tile: whether to tile axes whose size has changed.
    """
    if got is None:
        return OutputReport(name, problem="the grown model has no such output")
    if tile:
        want = tile_to(want, got.shape)
    if want.shape != got.shape:
        return OutputReport(name, problem=f"shape {got.shape}, expected {want.shape}")
    if want.dtype.kind in "iubSUO" and want.dtype == got.dtype:
        return OutputReport(name, problem="" if np.array_equal(want, got) else NOT_IDENTICAL)
    a, b = np.asarray(want, dtype=np.float64), np.asarray(got, dtype=np.float64)
    finite = np.isfinite(a)
    if not (np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        return OutputReport(name, problem="infinite, or not a number, in other places than the source's")
    error = np.abs(a[finite] - b[finite])
    if error.size == 0:
        return OutputReport(name, not_compared=bool(np.isnan(a).any()))
    largest = float(np.abs(a[finite]).max())
    return OutputReport(
        name,
        float(error.max()),
        float(error.max()) / (largest or 1.0),
        float(np.mean(a.argmax(-1) == b.argmax(-1))) if logits else None,
        _kl_divergence(a, b) if logits else None,
    )


def tile_to(array: Array, shape: Any) -> Array:
    """Tile an array to a shape. An axis stays if the new size is not a multiple of its size.

    >>> tile_to(np.zeros((2, 3)), (4, 3)).shape
    (4, 3)
    """
    if shape is None or len(shape) != array.ndim:
        return array
    repeats = [
        wide // narrow if isinstance(wide, int) and narrow and wide % narrow == 0 else 1
        for narrow, wide in zip(array.shape, shape, strict=True)
    ]
    return np.tile(array, repeats)


def _kl_divergence(a: Array, b: Array) -> float:
    """The largest KL(softmax a || softmax b) over the last axis, in nats."""

    def log_softmax(x: Array) -> Array:
        shifted = x - x.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    with np.errstate(invalid="ignore"):  # a class of probability 0 adds nothing: 0 log 0
        p, q = log_softmax(a), log_softmax(b)
        return float(np.maximum(np.where(np.exp(p) > 0.0, np.exp(p) * (p - q), 0.0).sum(-1), 0.0).max())


def logits_outputs(dimensions: Dimensions) -> set[str]:
    """The outputs whose last axis numbers classes or a vocabulary: no node sums over it."""
    names: set[str] = set()
    space = dimensions.space
    for value in dimensions.model.graph.outputs:
        axes = dimensions.axes.get(value)
        if axes and value.dtype is not None and value.dtype.is_floating_point():
            atoms = list(space.atoms(axes[-1]))
            if len(atoms) == 1 and atoms[0].pin is not None and space.static(axes[-1]) is not None:
                names.add(value.name or "")
    return names
