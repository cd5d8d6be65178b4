"""A model and what inference found of it: the first stages, as every command begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.analysis.roles import NamedDim, name_dimensions
from hyperclone_onnx.analysis.walk import infer, pin_interface
from hyperclone_onnx.errors import BadModel, Refused
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.system.stamps import Stamp


@dataclass(frozen=True)
class Analysis:
    """A normalised source model with its dimensions."""

    path: Path
    model: ir.Model
    dimensions: Dimensions
    stamps: Mapping[Path, Stamp]
    """The files that the model is read from, each with what tells it from another version."""

    @property
    def files(self) -> frozenset[Path]:
        """The files that the model is read from, resolved."""
        return frozenset(self.stamps)

    @property
    def named(self) -> list[NamedDim]:
        """Every dimension with its role and name."""
        return name_dimensions(self.dimensions)


def analyse(path: str | os.PathLike[str]) -> Analysis:
    """Read a model, normalise it and find its dimensions.

    Raises:
        BadModel: the file is not a readable, complete ONNX model.
        Refused: its opset is too old.
    """
    file = Path(path)
    before = loading.stamps({file.resolve()}) if file.is_file() else {}
    model = loading.load(file)
    loading.check_unchanged(before)
    stamps = loading.stamps(loading.source_files(file, model))
    try:
        normalise(model)
    except (BadModel, Refused) as problem:
        raise type(problem)(f"{file}: {problem}") from problem
    except Exception as problem:  # the passes raise whatever a malformed graph makes them raise
        raise BadModel(f"{file}: a malformed graph ({type(problem).__name__}: {problem})") from problem
    dimensions = infer(model)
    pin_interface(dimensions)
    return Analysis(file, model, dimensions, stamps)


def count_parameters(model: ir.Model) -> int:
    """The number of stored elements that are weights: floating-point ones, and codes of up to 8 bits."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(tensor.size for tensor in tensors if tensor.dtype.is_floating_point() or is_code(tensor.dtype))


def is_code(dtype: ir.DataType) -> bool:
    """Whether a type holds the codes of quantised weights."""
    return dtype.is_integer() and dtype.bitwidth <= 8
