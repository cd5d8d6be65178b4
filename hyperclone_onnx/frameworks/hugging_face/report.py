"""What a handoff to Hugging Face did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """What the handoff did."""

    model: str
    matched: dict[str, str] = field(default_factory=dict)
    """How each checkpoint tensor is made from the file's initializers."""
    repeated: dict[str, str] = field(default_factory=dict)
    """Tensors that are not in the file, and so were repeated without noise."""
    unchanged: dict[str, str] = field(default_factory=dict)
    """Tensors taken over as they are, and why."""
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The configuration's fields that changed: from, to."""
    compensations: dict[str, str] = field(default_factory=dict)
    """What was folded into stored tensors for constants that the model derives from its sizes."""
    copied: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    trained: bool = False
    """Whether the file's weights are others than growth made: only the file itself is then a reference."""
    cases: list[str] = field(default_factory=list)
    error_to_source: float | None = None
    error_to_file: float = 0.0
    tolerance: float = 0.0
    tolerance_reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)
