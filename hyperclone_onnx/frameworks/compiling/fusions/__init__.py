"""Recognise patterns of nodes by structure, and put one operator that frameworks compute faster in their place.

Exporters write attention, RMS norm, GELU, SiLU and linear layers as several nodes. We replace these nodes by one if no
other node reads the values between them.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.activations import fuse_gelu, fuse_silu
from hyperclone_onnx.frameworks.compiling.fusions.attention import fuse_attention
from hyperclone_onnx.frameworks.compiling.fusions.experts import fuse_experts
from hyperclone_onnx.frameworks.compiling.fusions.graphs import put_in_place
from hyperclone_onnx.frameworks.compiling.fusions.linear import fuse_linear
from hyperclone_onnx.frameworks.compiling.fusions.norms import fuse_norm
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL

__all__ = ["fuse", "put_in_place"]


def fuse(model: ir.Model) -> None:
    """Replace all patterns of a model in place."""
    for node in list(model.graph):
        if node.graph is None or node.domain:
            continue
        if node.op_type == "Softmax":
            fuse_attention(node)
        elif node.op_type in ("Mul", "Div"):
            fuse_norm(node) or fuse_gelu(node) or fuse_silu(node)
        elif node.op_type == "Add":
            fuse_linear(node)
        elif node.op_type == "ReduceSum":
            fuse_experts(node)
    model.graph.opset_imports.setdefault(INTERNAL, 1)
