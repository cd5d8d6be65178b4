"""The rules of every operator; importing this package registers them."""

from hyperclone_onnx.rules import (
    contractions,
    control,
    convolution,
    elementwise,
    indexing,
    layout,
    normalisation,
    reductions,
    shapes,
)

__all__ = [
    "contractions",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "layout",
    "normalisation",
    "reductions",
    "shapes",
]
