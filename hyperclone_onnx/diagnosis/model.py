"""The result of a diagnosis, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hyperclone_onnx.summaries import Summarised, Summary

SCHEMA = 1
"""The version of the data that `Diagnosis.to_json` returns."""

Verdict = Literal["tied", "ready", "parting", "parted", "unknown"]
"""The verdict on clones.

* tied: they compute the same, and will do so for ever;
* ready: they compute the same, and training will make them differ;
* parting: they differ a little;
* parted: they differ;
* unknown: nothing could be compared.
"""


@dataclass(frozen=True)
class Rank:
    """The effective rank of a matrix: exp of the entropy of its singular values, divided by their sum (see `rank`)."""

    effective: float
    stable: float
    """The sum of the squared singular values, divided by the largest of them."""
    largest: int
    """The largest possible rank: the smaller side of the matrix."""
    source: float | None
    """The effective rank of the source's matrix; None without a source."""
    by: str
    """How the rank was computed: "exact", or "lanczos" for an estimate."""


@dataclass(frozen=True)
class TensorDiagnosis:
    """How far the clones in a stored tensor differ. A distance is None where there is nothing to compare."""

    name: str
    layer: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    """The growing dimensions of the axes that a contraction sums over."""
    others: tuple[str, ...]
    """The growing dimensions of the other axes."""
    matched: float | None
    forward: float | None
    backward: float | None
    plain_forward: float | None
    plain_backward: float | None
    tolerance: float
    """The largest distance of weights that rounding can explain."""
    rank: Rank | None = None
    residue: float | None = None
    """What is left of the tensor when it is collapsed and grown again, divided by it (see `shrinking.residue`)."""

    @property
    def dims(self) -> tuple[str, ...]:
        """All growing dimensions of the tensor."""
        return tuple(dict.fromkeys((*self.inputs, *self.others)))

    @property
    def quantised(self) -> bool:
        """Whether the tensor has integer codes, which rounding does not change."""
        return self.tolerance == 0.0

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ValueDiagnosis:
    """How far the clones of an activation differ."""

    name: str
    layer: str
    dims: tuple[str, ...]
    distance: float | None


@dataclass(frozen=True)
class PartDiagnosis:
    """All tensors and activations of one part of the model: of a layer, or of the dimensions of one role."""

    name: str
    tensors: int
    values: int
    weights: float | None
    forward: float | None
    backward: float | None
    activations: float | None
    rank: float | None
    """The mean effective rank of its matrices, divided by the source's, or else by the largest possible rank."""
    verdict: Verdict


@dataclass(frozen=True, repr=False)
class Diagnosis(Summarised):
    """How far the clones of a grown model differ. `docs/diagnose.md` defines every number."""

    model: str
    source: str | None
    strategy: Mapping[str, Any]
    weights: float
    """The distance of the weights of clones, under the best matching: root mean square over elements."""
    forward: float
    backward: float
    activations: float
    """The distance of the activations of clones: root mean square over values; NaN where no value was measured."""
    stuck: bool
    """Whether all clones compute the same, and will do so for ever."""
    tied: tuple[str, ...]
    """The dimensions whose clones compute the same, and will do so for ever."""
    conclusion: str
    layers: tuple[PartDiagnosis, ...]
    roles: tuple[PartDiagnosis, ...]
    tensors: tuple[TensorDiagnosis, ...]
    values: tuple[ValueDiagnosis, ...]
    tolerance: float
    """The largest distance of activations that rounding can explain; NaN where no value was measured."""
    ran_on: str
    """The provider that ran the model, and the inputs."""
    notes: tuple[str, ...]
    residue: float | None = None
    """The residue of all tensors together: what a small model would lose into which this one is collapsed."""

    def summary(self) -> Summary:
        """The conclusion, and the verdict on each layer."""
        rows = [(part.name, part.tensors, part.verdict) for part in self.layers]
        return Summary(f"{self.model}: {self.conclusion}", ("layer", "tensors", "clones"), rows)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain data. Numbers that are not finite, and so were not measured, become None."""
        return {"schema": SCHEMA, **_plain(asdict(self))}


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return [_plain(item) for item in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data
