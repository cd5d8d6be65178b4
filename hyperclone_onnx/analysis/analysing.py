"""Reads a model and finds its dimensions: every command begins with this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.analysis.roles import NamedDim, explain, name_dimensions
from hyperclone_onnx.analysis.walk import infer, pin_interface
from hyperclone_onnx.plan.plans import TransformStep
from hyperclone_onnx.reading.defaults import defaults_of
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.system.stamps import Stamp
from hyperclone_onnx.transforms.source import source_of


@dataclass(frozen=True, repr=False)
class Analysis(Summarised):
    """A source model, normalised and transformed, and its dimensions."""

    path: Path
    model: ir.Model
    dimensions: Dimensions
    stamps: Mapping[Path, Stamp]
    """The files that the model is read from, each with a stamp that tells versions of a file apart."""
    transforms: tuple[TransformStep, ...] = ()
    """The steps that made the model from the file."""

    @property
    def files(self) -> frozenset[Path]:
        """The resolved paths of the files that the model is read from."""
        return frozenset(self.stamps)

    @property
    def named(self) -> list[NamedDim]:
        """All dimensions, with their roles and names."""
        return name_dimensions(self.dimensions)

    def summary(self) -> Summary:
        """The dimensions that have a role, and why some keep their sizes."""
        named = [dimension for dimension in self.named if dimension.role != "other"]
        rows = [
            (dimension.label or dimension.name, dimension.size, explain(self.dimensions, dimension.dim))
            if dimension.dim.pin is not None
            else (dimension.label or dimension.name, dimension.size, "")
            for dimension in named
        ]
        line = f"{self.path}, {count_parameters(self.model):,} parameters, {len(named)} dimensions"
        return Summary(line, ("dimension", "size", "keeps its size because"), rows)


def analyse(model: GivenModel, transforms: Iterable[TransformStep] = ()) -> Analysis:
    """Read a model, normalise it, apply the transforms, and find its dimensions.

    Args:
        model: the path of a file, an ``onnx.ModelProto`` or an ``onnx_ir.Model``. It is not changed.
        transforms: the transforms, in order.

    Raises:
        BadModel: the file is not a readable, complete ONNX model.
        Refused: its opset is too old, or one of its nodes does not fit the specification of its operator.
    """
    source = source_of(model, transforms)
    dimensions = infer(source.model)
    pin_interface(dimensions)
    return Analysis(source.path, source.model, dimensions, source.stamps, source.transforms)


def count_parameters(model: ir.Model) -> int:
    """The number of stored elements that are weights: floating-point numbers, and codes of at most 8 bits."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    tensors += [tensor for _, tensor in defaults_of(model)]
    return sum(tensor.size for tensor in tensors if tensor.dtype.is_floating_point() or is_code(tensor.dtype))


def stored_bytes(model: ir.Model) -> int:
    """The bytes of all stored tensors."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype != ir.DataType.STRING)


def is_code(dtype: ir.DataType) -> bool:
    """Whether quantised weights are stored in a type: integers of at most 8 bits."""
    return dtype.is_integer() and dtype.bitwidth <= 8


def untransformed(analysis: Analysis) -> ir.Model | None:
    """The source as its file has it, normalised; None if it was not transformed."""
    return source_of(analysis.path).model if analysis.transforms else None
