"""The rules of every operator; importing this package registers them."""

from hyperclone_onnx.rules import (
    attention,
    contractions,
    control,
    convolution,
    elementwise,
    indexing,
    layout,
    microsoft,
    microsoft_attention,
    normalisation,
    reductions,
    shapes,
)

__all__ = [
    "attention",
    "contractions",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "layout",
    "microsoft",
    "microsoft_attention",
    "normalisation",
    "reductions",
    "shapes",
]
