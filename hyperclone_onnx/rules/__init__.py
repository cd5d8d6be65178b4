"""The rules of every operator; importing this package registers them."""

from hyperclone_onnx.rules import (
    attention,
    contractions,
    control,
    convolution,
    elementwise,
    flex_attention,
    indexing,
    layout,
    microsoft,
    normalisation,
    pinned,
    recurrent,
    reductions,
    shapes,
    spatial,
    transforms,
)

__all__ = [
    "attention",
    "contractions",
    "control",
    "convolution",
    "elementwise",
    "flex_attention",
    "indexing",
    "layout",
    "microsoft",
    "normalisation",
    "pinned",
    "recurrent",
    "reductions",
    "shapes",
    "spatial",
    "transforms",
]
