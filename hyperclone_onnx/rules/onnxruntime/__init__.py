"""The rules of ONNX Runtime's own operators (domain com.microsoft); importing this package registers them."""

from hyperclone_onnx.rules.onnxruntime import (
    attention,
    branches,
    convolution,
    fused,
    grouped_attention,
    layout,
    linear_attention,
    mixture,
    pinned,
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
    "pinned",
    "positions",
    "projected_attention",
    "quantised",
    "quantised_blocks",
]
