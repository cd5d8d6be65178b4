"""The transform that changes nothing: the smallest example of a transform."""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.transforms.registry import transform


@transform("identity")
def identity(model: ir.Model) -> ir.Model:
    """Return the graph unchanged. This transform has no options."""
    return model
