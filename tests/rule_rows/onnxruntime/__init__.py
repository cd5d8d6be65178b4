"""Rows for the rules of ONNX Runtime's own operators; importing this package registers them."""

from rule_rows.onnxruntime import (
    attention,
    branches,
    convolution,
    fused,
    grouped_attention,
    layout,
    linear_attention,
    mixture,
    positions,
    projected_attention,
    quantised,
    quantised_blocks,
)

__all__ = [
    "attention",
    "branches",
    "convolution",
    "fused",
    "grouped_attention",
    "layout",
    "linear_attention",
    "mixture",
    "positions",
    "projected_attention",
    "quantised",
    "quantised_blocks",
]
