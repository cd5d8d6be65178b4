"""What a diagnosis says, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = 1
"""The version of `Diagnosis.to_json`."""

Verdict = Literal["tied", "ready", "parting", "parted", "unknown"]
"""Of clones: they compute the same, and always will; they compute the same, and training will part them; they differ a
little; they differ. Unknown where nothing could be compared."""


@dataclass(frozen=True)
class Rank:
    """The effective rank of a matrix: exp of the entropy of its singular values, each as a part of their sum."""

    effective: float
    stable: float
    """The sum of squared singular values over the largest of them squared."""
    largest: int
    """What no rank exceeds: the smaller side."""
    source: float | None
    """The effective rank of the source's matrix."""
    by: str
    """How it was computed: "exact", or "lanczos" for an estimate."""


@dataclass(frozen=True)
class TensorDiagnosis:
    """How far the clones in a stored tensor are apart; distances are None where there is nothing to compare."""

    name: str
    layer: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    """The dimensions that grow among the axes that a contraction sums over."""
    others: tuple[str, ...]
    """Those among the other axes."""
    matched: float | None
    forward: float | None
    backward: float | None
    plain_forward: float | None
    plain_backward: float | None
    tolerance: float
    """Rounding explains distances of weights up to this."""
    rank: Rank | None = None

    @property
    def dims(self) -> tuple[str, ...]:
        """All dimensions that grow in it."""
        return tuple(dict.fromkeys((*self.inputs, *self.others)))

    @property
    def quantised(self) -> bool:
        """Whether its numbers are codes, which no rounding tells apart."""
        return self.tolerance == 0.0

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ValueDiagnosis:
    """How far the clones of an activation are apart."""

    name: str
    layer: str
    dims: tuple[str, ...]
    distance: float | None


@dataclass(frozen=True)
class PartDiagnosis:
    """A part of the model, a layer or the dimensions of one role, all its tensors and activations together."""

    name: str
    tensors: int
    values: int
    weights: float | None
    forward: float | None
    backward: float | None
    activations: float | None
    rank: float | None
    """The mean effective rank of its matrices, as a part of the source's, or else of the largest possible."""
    verdict: Verdict


@dataclass(frozen=True)
class Diagnosis:
    """How far the clones of a grown model have parted. `docs/diagnose.md` defines every number."""

    model: str
    source: str | None
    strategy: Mapping[str, Any]
    weights: float
    """How far the weights of clones are apart, under the best matching: root mean square over elements."""
    forward: float
    backward: float
    activations: float
    """How far the activations of clones are apart: root mean square over values; NaN where none was measured."""
    stuck: bool
    """Whether all clones compute the same and always will."""
    tied: tuple[str, ...]
    """The dimensions whose clones compute the same and always will."""
    conclusion: str
    layers: tuple[PartDiagnosis, ...]
    roles: tuple[PartDiagnosis, ...]
    tensors: tuple[TensorDiagnosis, ...]
    values: tuple[ValueDiagnosis, ...]
    tolerance: float
    """Rounding explains distances of activations up to this; NaN where none was measured."""
    ran_on: str
    """What ran the model, and on which inputs."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain data: numbers are finite, what was not measured is None."""
        return {"schema": SCHEMA, **_plain(asdict(self))}


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return [_plain(each) for each in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data
