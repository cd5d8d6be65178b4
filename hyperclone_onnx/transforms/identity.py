"""The transform that changes nothing: the smallest example of a transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.transforms.registry import transform


@transform("identity")
def identity(model: ir.Model, options: Mapping[str, Any]) -> ir.Model:
    """Return the graph unchanged. This transform has no options."""
    return model
