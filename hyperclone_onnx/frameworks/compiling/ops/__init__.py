"""The table of operators, with a module for each family. Importing this package fills the table."""

from hyperclone_onnx.frameworks.compiling.ops import (
    attention,
    contractions,
    convolution,
    elementwise,
    host,
    indexing,
    layout,
    microsoft,
    microsoft_attention,
    mixture,
    normalisation,
    pooling,
    recurrence,
    reductions,
    shapes,
)

__all__ = [
    "attention",
    "contractions",
    "convolution",
    "elementwise",
    "host",
    "indexing",
    "layout",
    "microsoft",
    "microsoft_attention",
    "mixture",
    "normalisation",
    "pooling",
    "recurrence",
    "reductions",
    "shapes",
]
