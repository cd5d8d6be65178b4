"""One row or more for every registered rule; importing this package registers them."""

from rule_rows import (
    attention,
    contractions,
    control,
    convolution,
    elementwise,
    grouped_attention,
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
    "grouped_attention",
    "indexing",
    "layout",
    "microsoft",
    "microsoft_attention",
    "normalisation",
    "reductions",
    "shapes",
]
