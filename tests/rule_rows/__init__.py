"""One row or more for every registered rule; importing this package registers them."""

from rule_rows import (
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
    quantised,
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
    "quantised",
    "recurrent",
    "reductions",
    "shapes",
    "spatial",
    "transforms",
]
