"""In each framework, ONNX Runtime's own operators compute the same as ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")

from hyperclone_onnx.frameworks.compiling import registry  # noqa: E402
from hyperclone_onnx.frameworks.compiling.ops.microsoft import MICROSOFT  # noqa: E402
from tests import node_cases  # noqa: E402

Array = np.ndarray[Any, Any]
B, S, H, D = 2, 5, 4, 16
"""Batch size, sequence length, number of heads, and size of a head."""


@dataclass(frozen=True)
class Row:
    """One call: the operands by position (None: left out), the attributes, which outputs are
    asked for, and how many of these are compared."""

    op_type: str
    operands: tuple[Array | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[bool, ...] = (True,)
    compared: int = 9
    label: str = ""
    whole: frozenset[int] = frozenset()
    """The outputs that are int32."""

    def __str__(self) -> str:
        return f"{self.op_type}{'-' if self.label else ''}{self.label}"


RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def angles(length: int = 16) -> tuple[Array, Array]:
    turn = np.arange(length)[:, None] / 100 ** (np.arange(D // 2) / (D // 2))
    return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


PLACES = np.tile(np.arange(S), (B, 1))
PADDED = np.array([[1] * S, [1] * 3 + [0] * 2], np.int32)
GROUPED = {"num_heads": H, "kv_num_heads": 2}
IDS, KINDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32), np.array([[0] * 5, [1, 1, 0, 1, 0]], np.int32)
NO_PAST = np.zeros((B, 2, 0, D), np.float32)
LAST, TOTAL = np.full(B, S - 1, np.int32), np.array(S, np.int32)

ROWS = [
    Row("Gelu", (floats(3, 4),)),
    Row("QuickGelu", (floats(3, 4),), {"alpha": 1.5}),
    Row("BiasGelu", (floats(3, 4), floats(4))),
    Row("FastGelu", (floats(3, 4),)),
    Row("FastGelu", (floats(3, 4), floats(4)), label="bias"),
    Row("FusedMatMul", (floats(2, 4, 3), floats(2, 5, 4)), {"transA": 1, "transB": 1, "alpha": 0.5}),
    *(
        Row("FusedMatMul", (floats(*a), floats(*b)), attributes, label="batch-inside")
        for a, b, attributes in (
            ((4, 2, 3), (2, 3, 5), {"transBatchA": 1}),
            ((2, 4, 3), (5, 2, 3), {"transBatchB": 1, "transB": 1}),
            ((4, 2, 6, 3), (2, 6, 3, 5), {"transBatchA": 1}),
        )
    ),
    Row("FusedGemm", (floats(3, 4), floats(5, 4), floats(5)), {"transB": 1, "activation": "Relu", "alpha": 0.5}),
    Row(
        "FusedGemm",
        (floats(3, 4), floats(4, 5), floats(5)),
        {"activation": "LeakyRelu", "activation_alpha": 0.3},
        label="slope",
    ),
    *(
        Row(
            "FusedConv",
            (floats(2, 4, 7, 6), floats(6, 2, 3, 3), floats(6)),
            {"group": 2, "pads": [1, 0, 1, 2], "strides": [2, 1], "activation": name, **attributes},
            label=name,
        )
        for name, attributes in (
            ("Relu", {}),
            ("LeakyRelu", {"activation_params": [0.2]}),
            ("Clip", {"activation_params": [-0.5, 0.5]}),
            ("Sigmoid", {}),
        )
    ),
    Row(
        "EmbedLayerNormalization",
        (IDS, KINDS, floats(11, 8), floats(16, 8), floats(2, 8), floats(8), floats(8), PADDED),
        {"epsilon": 1e-5},
        (True, True, True),
        whole=frozenset([1]),
    ),
    Row(
        "EmbedLayerNormalization",
        (IDS, None, floats(11, 8), floats(16, 8), None, floats(8), floats(8), None, IDS),
        {"epsilon": 1e-5},
        (True, True),
        label="places",
        whole=frozenset([1]),
    ),
    *(
        Row(
            "MoE",
            (floats(3, 5, 8), floats(15, 4), *zeros),
            {"k": 2, "normalize_routing_weights": 1, **attributes},
            label=label,
        )
        for label, zeros, attributes in (
            ("relu", (floats(4, 6, 8), floats(4, 6), floats(4, 8, 6), floats(4, 8)), {}),
            ("gelu", (floats(4, 6, 8), None, floats(4, 8, 6)), {"activation_type": "gelu"}),
            (
                "swiglu-interleaved",
                (floats(4, 12, 8), floats(4, 12), floats(4, 8, 6), floats(4, 8)),
                {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.7, "activation_beta": 1.0}
                | {"swiglu_limit": 1.0},
            ),
        )
    ),
    Row("SkipLayerNormalization", (floats(B, S, 8), floats(B, S, 8), floats(8), floats(8), floats(8))),
    Row("SkipLayerNormalization", (floats(B, S, 8),) * 2 + (floats(8),), {"epsilon": 1e-3}, label="bare"),
    Row(
        "SkipSimplifiedLayerNormalization",
        (floats(B, S, 8), floats(B, S, 8), floats(8)),
        {"epsilon": 1e-6},
        (True, False, False, True),
    ),
    Row("RotaryEmbedding", (floats(B, S, H * D), PLACES, *angles())),
    Row("RotaryEmbedding", (floats(B, H, S, D), PLACES, *angles()), {"interleaved": 1}, label="pairs"),
    Row("RotaryEmbedding", (floats(B, S, H * D), np.array([3]), *angles()), label="offset"),
    Row("MultiHeadAttention", (floats(B, S, H * D), floats(B, S, H * D), floats(B, S, H * D)), {"num_heads": H}),
    Row(
        "MultiHeadAttention",
        (floats(B, S, H * D), floats(B, 7, H * D), floats(B, 7, H * D), floats(3 * H * D), None, floats(1, H, S, 7)),
        {"num_heads": H, "scale": 0.3},
        label="bias",
    ),
    Row(
        "MultiHeadAttention",
        (floats(B, S, H * D), floats(B, S, H * D), floats(B, S, H * D), None, PADDED),
        {"num_heads": H},
        label="padded",
    ),
    Row(
        "MultiHeadAttention",
        (floats(B, S, H * D), *[floats(B, S, H * D)] * 2, None, None, None, *[floats(B, H, 3, D)] * 2),
        {"num_heads": H, "unidirectional": 1},
        (True, True, True),
        label="past",
    ),
    Row("Attention", (floats(B, S, 8), floats(8, 3 * H * D), floats(3 * H * D), PADDED), {"num_heads": H}),
    Row(
        "Attention",
        (floats(B, S, 8), floats(8, 3 * H * D), floats(3 * H * D)),
        {"num_heads": H, "unidirectional": 1},
        label="causal",
    ),
    Row(
        "GroupQueryAttention",
        (floats(B, S, H * D), floats(B, S, 2 * D), floats(B, S, 2 * D), NO_PAST, NO_PAST, LAST, TOTAL),
        GROUPED,
        (True, True, True),
    ),
    Row(
        "GroupQueryAttention",
        (floats(B, S, (H + 4) * D), None, None, NO_PAST, NO_PAST, LAST, TOTAL, *angles()),
        {**GROUPED, "do_rotary": 1, "local_window_size": 2, "scale": 0.2},
        label="packed-rotary-window",
    ),
    Row(
        "GroupQueryAttention",
        (floats(B, S, H * D), *[floats(B, S, 2 * D)] * 2, NO_PAST, NO_PAST, LAST, TOTAL, *[None] * 4, floats(H)),
        GROUPED,
        (True, True, True),
        label="sink",
    ),
    Row(
        "GroupQueryAttention",
        (floats(B, S, H * D), *[floats(B, S, 2 * D)] * 2, NO_PAST, NO_PAST, LAST, TOTAL),
        {**GROUPED, "smooth_softmax": 1},
        (True, True, True),
        label="smooth",
    ),
    *(
        Row(
            "CausalConvWithState",
            (floats(2, 6, S), floats(6, 1, 4), bias, past),
            {"activation": activation},
            (True, True),
            label=f"{activation}{'-past' * (past is not None)}",
        )
        for activation, bias, past in (("none", floats(6), None), ("silu", None, floats(2, 6, 3)))
    ),
    *(
        Row(
            "LinearAttention",
            (
                *(floats(B, S, n * 4) / 4 for n in (4, 2)),
                floats(B, S, 2 * 3),
                floats(B, 2, 4, 3) if rule != "linear" else None,
                -np.abs(floats(B, S, decays)) if "gated" in rule else None,
                np.abs(floats(B, S, 2)) / 4 if "delta" in rule else None,
            ),
            {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": rule},
            (True, True),
            label=f"{rule}-{decays}",
        )
        for rule, decays in (("linear", 0), ("gated", 2), ("gated", 8), ("delta", 0), ("gated_delta", 2))
    ),
    *(
        Row(
            "GroupQueryAttention",
            (floats(B, 1, H * D), *[floats(B, 1, 2 * D)] * 2, *[floats(B, 2, 4, D)] * 2, last, TOTAL, *angles()),
            {**GROUPED, "do_rotary": 1},
            (True, True, True),
            compared,
            label,
        )
        for last, compared, label in (
            (np.array([4, 4], np.int32), 3, "past"),
            # Behind the end of the shorter row, the caches contain arbitrary values.
            (np.array([4, 2], np.int32), 1, "pasts-of-two-lengths"),
        )
    ),
]


def model_of(row: Row) -> onnx.ModelProto:
    """The graph of this one call."""
    kinds = {np.dtype(np.float32): 1, np.dtype(np.int64): 7, np.dtype(np.int32): 6}
    names = [f"x{i}" if operand is not None else "" for i, operand in enumerate(row.operands)]
    outputs = [f"y{i}" if compared else "" for i, compared in enumerate(row.outputs)]
    node = onnx.helper.make_node(row.op_type, names, outputs, name="node", domain=MICROSOFT, **row.attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [
            onnx.helper.make_tensor_value_info(name, kinds[operand.dtype], operand.shape)
            for name, operand in zip(names, row.operands, strict=True)
            if operand is not None
        ],
        [
            onnx.helper.make_tensor_value_info(name, 6 if i in row.whole else 1, None)
            for i, name in enumerate(outputs)
            if name
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("framework", node_cases.FRAMEWORKS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_as_onnx_runtime(row: Row, framework: str) -> None:
    if framework != "numpy":
        pytest.importorskip(framework)
    model = model_of(row)
    feeds = {f"x{i}": operand for i, operand in enumerate(row.operands) if operand is not None}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)
    actual = node_cases.run(ir.from_proto(model), framework, list(feeds.values()))
    for got, want in list(zip(actual, expected, strict=True))[: row.compared]:
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * max(float(np.abs(want).max()), 1.0))


def test_every_operator_has_a_row() -> None:
    assert {row.op_type for row in ROWS} == {
        op_type for domain, op_type in registry.covered() if domain == MICROSOFT
    } - {"TransposeMatMul"}  # FusedMatMul under its old name
