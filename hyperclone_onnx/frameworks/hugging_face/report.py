"""The report of a handoff to Hugging Face, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """The report of a handoff to Hugging Face. Errors and the tolerance are relative to an output's largest element."""

    model: str
    """The path of the grown ONNX file."""
    matched: dict[str, str] = field(default_factory=dict)
    """How each checkpoint tensor is made from the file's initializers, by the tensor's name."""
    repeated: dict[str, str] = field(default_factory=dict)
    """Tensors that are not in the file and were repeated without noise, with the shapes before and after."""
    unchanged: dict[str, str] = field(default_factory=dict)
    """Tensors that do not grow, with the reason."""
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The configuration's fields that changed, with the values before and after."""
    compensations: dict[str, str] = field(default_factory=dict)
    """The factors folded into stored tensors, because the model derives constants from its sizes."""
    copied: list[str] = field(default_factory=list)
    """Files that were copied from the source's checkpoint."""
    parameters: tuple[int, int] = (0, 0)
    """The number of tensors that were written, and of their elements."""
    weights: list[str] = field(default_factory=list)
    """The safetensors files that were written, and their index."""
    dtype: str = ""
    """The type of the weights that were written, or of most of them."""
    trained: bool = False
    """Whether the file was trained after it was grown. The result is then compared with the file only."""
    tensors_checked: int = 0
    """The tensors whose repeats, as they are in the files, were added up and compared with the source's checkpoint."""
    cases: list[str] = field(default_factory=list)
    """The input sets on which the result was compared with the file."""
    error_to_source: float | None = None
    """The largest error against the source's model; None for a trained file."""
    error_to_file: float | None = None
    """The largest error against the file in ONNX Runtime; None where no file was written."""
    tolerance: float = 0.0
    """The largest error to the source that rounding explains."""
    file_tolerance: float | None = None
    """The largest error to the file that rounding explains; None where no file was written.

    It is larger if the file has numbers in half precision.
    """
    tolerance_reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as a dict for JSON."""
        return asdict(self)
