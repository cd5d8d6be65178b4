"""The transform that changes nothing: the smallest example of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.transforms.registry import transform


@transform("identity")
def identity(model: ir.Model, options: Mapping[str, Any]) -> ir.Model:
    """The graph as it is. It has no options."""
    return model
