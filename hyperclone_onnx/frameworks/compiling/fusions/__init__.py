"""Patterns that one operator of a framework computes faster, recognised by structure.

Attention, RMS norm, GELU, SiLU and linear layers are written out by exporters; each is put back together where nothing
else reads what lies between.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.activations import fuse_gelu, fuse_silu
from hyperclone_onnx.frameworks.compiling.fusions.attention import fuse_attention
from hyperclone_onnx.frameworks.compiling.fusions.graphs import put_in_place
from hyperclone_onnx.frameworks.compiling.fusions.linear import fuse_linear
from hyperclone_onnx.frameworks.compiling.fusions.norms import fuse_norm
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL

__all__ = ["fuse", "put_in_place"]


def fuse(model: ir.Model) -> None:
    """Recognise every pattern, in place."""
    for node in list(model.graph):
        if node.graph is None or node.domain:
            continue
        if node.op_type == "Softmax":
            fuse_attention(node)
        elif node.op_type in ("Mul", "Div"):
            fuse_norm(node) or fuse_gelu(node) or fuse_silu(node)
        elif node.op_type == "Add":
            fuse_linear(node)
    model.graph.opset_imports.setdefault(INTERNAL, 1)
