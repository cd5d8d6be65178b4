"""Every rule by itself: op(grow(x)) == grow(op(x)), on random maps, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import hyperclone_onnx.rules  # noqa: F401 - importing it registers the rules
from hyperclone_onnx import Refused, SourceMap, Strategy, feeds, rewrite
from hyperclone_onnx.inference import Dimensions, infer
from hyperclone_onnx.normalise import normalise
from hyperclone_onnx.planning import make_plan
from hyperclone_onnx.rules import registry
from hyperclone_onnx.rules.elementwise import BROADCASTING, FIRST_OPERAND_SHAPES, UNARY
from hyperclone_onnx.sizing import Growth, name_dimensions
from hyperclone_onnx.strategies import STRATEGIES

MS = "com.microsoft"
Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(7)


@dataclass(frozen=True)
class Fed:
    """A graph input with the value it is fed."""

    value: Array


@dataclass(frozen=True)
class Row:
    """One form of an operator: its operands (stored arrays, `Fed` ones or None) and what must (not) grow.

    `grows` and `kept` are (input, axis) pairs.
    """

    op: str
    operands: Sequence[Array | Fed | None]
    grows: Sequence[tuple[int, int]] = ()
    kept: Sequence[tuple[int, int]] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    domain: str = ""
    equal_repeats: bool = False
    """Whether unequal repeats are refused: an average cannot have them."""

    def __str__(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.op}-{self.opset}"


def x(*shape: int, low: float = 0.1, high: float = 0.9) -> Fed:
    return Fed(RNG.uniform(low, high, shape).astype(np.float32))


def w(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def ids(limit: int, *shape: int) -> Fed:
    return Fed(RNG.integers(0, limit, shape))


def boolean(*shape: int) -> Fed:
    return Fed(np.asarray(RNG.random(shape) < 0.5))


def body(*nodes: onnx.NodeProto, output: str, inputs: Sequence[str] = ()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", [], [helper.make_tensor_value_info(output, 1, None)])


SPECIAL_UNARY = {
    "Acosh": Row("Acosh", [x(2, 3, low=1.1, high=2)], [(0, 0), (0, 1)]),
    "BitwiseNot": Row("BitwiseNot", [ids(9, 2, 3)], [(0, 1)]),
    "Cast": Row("Cast", [x(2, 3)], [(0, 1)], attributes={"to": TensorProto.DOUBLE}),
    "Not": Row("Not", [boolean(2, 3)], [(0, 1)]),
    "Swish": Row("Swish", [x(2, 3)], [(0, 1)], opset=24),
}
INTEGER = {"BitwiseAnd", "BitwiseOr", "BitwiseXor"}
LOGICAL = {"And", "Or", "Xor"}
SPECIAL_BROADCASTING = {
    "BitShift": Row(
        "BitShift",
        [Fed(RNG.integers(0, 9, (2, 3)).astype(np.uint8)), Fed(RNG.integers(0, 3, (3,)).astype(np.uint8))],
        [(0, 0), (0, 1)],
        attributes={"direction": "LEFT"},
    ),
    "Mod": Row("Mod", [ids(9, 2, 3), Fed(RNG.integers(1, 5, (3,)))], [(0, 0), (0, 1)]),
    "Where": Row("Where", [boolean(3), x(2, 3), x(2, 1)], [(0, 0), (1, 0), (1, 1)]),
}


def elementwise() -> list[Row]:
    rows = [SPECIAL_UNARY.get(op) or Row(op, [x(2, 3)], [(0, 0), (0, 1)]) for op in UNARY]
    for op in BROADCASTING:
        make = (lambda *s: ids(7, *s)) if op in INTEGER else boolean if op in LOGICAL else x
        rows.append(
            SPECIAL_BROADCASTING.get(op) or Row(op, [make(2, 3, 4), make(3, 1)], [(0, 0), (0, 1), (0, 2), (1, 0)])
        )
    operands: dict[str, list[Array | Fed | None]] = {
        "CastLike": [x(2, 3), np.zeros((), np.float64)],
        "Clip": [x(2, 3), np.array(0.2, np.float32), None],
        "Dropout": [x(2, 3)],
    }
    return rows + [Row(op, operands[op], [(0, 0), (0, 1)]) for op in FIRST_OPERAND_SHAPES]


ROWS: list[Row] = [
    *elementwise(),
    # contractions
    Row("MatMul", [x(2, 3, 4), w(4, 6)], [(0, 0), (0, 1), (0, 2), (1, 1)]),
    Row("MatMul", [w(6, 4), x(2, 4, 3)], [(0, 0), (0, 1), (1, 0), (1, 2)]),
    Row("MatMul", [x(2, 3, 4), x(1, 4, 5)], [(0, 0), (0, 2), (1, 2)]),
    Row("MatMul", [x(4), w(4, 6)], [(0, 0), (1, 1)]),
    Row("MatMul", [x(3, 4), w(4)], [(0, 0), (0, 1)]),
    Row("Gemm", [x(3, 4), w(4, 6), w(6)], [(0, 0), (0, 1), (1, 1)], attributes={"alpha": 0.5, "beta": 2.0}),
    Row("Gemm", [x(4, 3), w(6, 4), w(3, 1)], [(0, 0), (0, 1), (1, 0)], attributes={"transA": 1, "transB": 1}),
    Row("Gemm", [x(3, 4), x(4, 6)], [(0, 0), (0, 1), (1, 1)], attributes={"alpha": 0.5}),
    Row("Einsum", [x(2, 3, 4), w(4, 5, 6)], [(0, 0), (0, 2), (1, 2)], attributes={"equation": "bsd,dhe->bshe"}),
    Row("Einsum", [x(2, 3, 4, 5), w(4, 5, 6)], [(0, 2), (0, 3), (1, 2)], attributes={"equation": "bshd,hde->bse"}),
    Row("Einsum", [x(2, 3, 4), x(2, 5, 4)], [(0, 0), (0, 2), (1, 1)], attributes={"equation": "...ik,...jk->...ij"}),
    Row("Einsum", [x(3, 4)], [(0, 0), (0, 1)], attributes={"equation": "ij->i"}),
    Row("Einsum", [x(3, 3)], [], [(0, 0)], attributes={"equation": "ii->i"}),
    Row("FusedMatMul", [x(2, 4, 3), w(6, 4)], [(0, 1), (0, 2)], attributes={"transA": 1, "transB": 1}, domain=MS),
    Row("TransposeMatMul", [x(2, 3, 4), w(6, 4)], [(0, 2), (1, 0)], attributes={"transB": 1}, domain=MS),
    Row("Conv", [x(2, 4, 5, 5), w(6, 4, 3, 3), w(6)], [(1, 0)], [(0, 1), (1, 2)]),
    # layout
    Row("Transpose", [x(2, 3, 4)], [(0, 0), (0, 1)], attributes={"perm": [2, 0, 1]}),
    Row("Reshape", [x(2, 12), ints(2, 3, 4)], [(0, 0), (0, 1)]),
    Row("Reshape", [x(2, 3, 4), ints(0, -1)], [(0, 0), (0, 1), (0, 2)]),
    Row("Reshape", [x(4, 9), ints(6, 6)], [], [(0, 0), (0, 1)]),
    Row("Flatten", [x(2, 3, 4)], [(0, 0), (0, 1)], attributes={"axis": 2}),
    Row("Squeeze", [x(2, 1, 4), ints(1)], [(0, 0), (0, 2)]),
    Row("Squeeze", [x(2, 1, 4)], [(0, 0), (0, 2)], attributes={"axes": [1]}, opset=11),
    Row("Unsqueeze", [x(2, 4), ints(-1, 0)], [(0, 0), (0, 1)]),
    Row("Expand", [x(3, 1), ints(2, 1, 4)], [(0, 0)]),
    Row("Tile", [x(2, 3), ints(2, 1)], [(0, 0), (0, 1)]),
    Row("Concat", [x(2, 3), w(2, 4)], [(0, 0), (0, 1), (1, 1)], attributes={"axis": 1}),
    Row("Split", [x(2, 9), ints(2, 3, 4)], [(0, 0), (0, 1)], attributes={"axis": 1}, outputs=3),
    Row("Split", [x(2, 6)], [(0, 1)], attributes={"axis": 1, "num_outputs": 3}, outputs=3),
    Row("Split", [x(2, 6)], [(0, 1)], attributes={"axis": 1, "split": [2, 4]}, outputs=2, opset=11),
    Row("Slice", [x(2, 8), ints(3), ints(1000), ints(1)], [(0, 0), (0, 1)]),
    Row("Slice", [x(2, 8), ints(1), ints(8), ints(-1), ints(2)], [(0, 1)]),
    Row("Slice", [x(2, 8), ints(0, 2), ints(2, -1)], [(0, 0), (0, 1)]),
    Row("Slice", [x(2, 8), ints(-1), ints(-100), ints(1), ints(-1)], [(0, 0)], [(0, 1)]),
    Row("Pad", [x(2, 3), ints(0, 1, 0, 2), np.array(0.5, np.float32)], [(0, 0), (0, 1)]),
    Row("Pad", [x(2, 3), ints(0, 1, 0, 2)], [(0, 0)], [(0, 1)], attributes={"mode": "reflect"}),
    # indexing
    Row("Gather", [w(9, 4), ids(9, 2, 3)], [(0, 1), (1, 0)], [(0, 0)]),
    Row("Gather", [x(5, 4), ints(1, 2)], [(0, 0), (0, 1)], attributes={"axis": 0}),
    Row("Gather", [x(2, 5), np.array(-2, dtype=np.int64)], [(0, 0), (0, 1)], attributes={"axis": 1}),
    Row("GatherElements", [x(2, 5), ids(5, 2, 3)], [(0, 0)], [(0, 1)], attributes={"axis": 1}),
    Row("GatherND", [x(4, 5), ids(4, 3, 1)], [(0, 1), (1, 0)], [(0, 0), (1, 1)]),
    Row("GatherND", [x(4, 5), ints(2).reshape(1, 1)], [(0, 0), (0, 1)]),
    Row("ScatterElements", [x(2, 5), ids(5, 2, 1), x(2, 1)], [(0, 0)], [(0, 1)], attributes={"axis": 1}),
    Row("ScatterND", [x(4, 5), ints(2, 0).reshape(2, 1), x(2, 5)], [(0, 1)], [(0, 0)]),
    Row("OneHot", [ids(4, 3), np.array(4, np.int64), np.array([0, 1], np.float32)], [(0, 0)]),
    Row("TopK", [x(3, 5), ints(2)], [(0, 0)], [(0, 1)], outputs=2),
    Row("ArgMax", [x(3, 5)], [(0, 0)], [(0, 1)], attributes={"axis": 1}),
    Row("ArgMin", [x(3, 5)], [(0, 0)], [(0, 1)], attributes={"axis": 1, "keepdims": 0}),
    Row("CumSum", [x(3, 5), np.array(1, np.int64)], [(0, 0)], [(0, 1)]),
    Row("Trilu", [x(2, 4, 4)], [(0, 0)], [(0, 1), (0, 2)]),
    Row("EyeLike", [x(4, 4)], [], [(0, 0), (0, 1)]),
    Row("NonZero", [x(3, 4)], [], [(0, 0), (0, 1)]),
    # sizes
    Row("Shape", [x(2, 3)], [(0, 0), (0, 1)], attributes={"start": 1}),
    Row("Size", [x(2, 3)], [(0, 0), (0, 1)]),
    Row("Range", [ints(1).reshape(()), ints(9).reshape(()), ints(2).reshape(())]),
    Row("ConstantOfShape", [ints(2, 3)]),
    # reductions
    *[
        Row(op, [x(2, 3, 4), ints(-1)], [(0, 0), (0, 1), (0, 2)], attributes={"keepdims": keep})
        for op in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare", "ReduceMax", "ReduceMin")
        for keep in (0, 1)
    ],
    Row("ReduceSum", [x(2, 3)], [(0, 0), (0, 1)]),
    Row("ReduceMean", [x(2, 3, 4), ints(1, 2)], [(0, 0), (0, 1), (0, 2)], equal_repeats=True),
    Row("ReduceProd", [x(2, 3), ints(1)], [(0, 0)], [(0, 1)]),
    Row("ReduceLogSumExp", [x(2, 3), ints(1)], [(0, 0)], [(0, 1)]),
    # normalisation
    Row("LayerNormalization", [x(2, 3, 4), w(4), w(4)], [(0, 0), (0, 2)], equal_repeats=True),
    Row("LayerNormalization", [x(2, 3, 4), w(3, 4)], [(0, 1), (0, 2)], attributes={"axis": 1}, equal_repeats=True),
    Row("RMSNormalization", [x(2, 3, 4), w(4)], [(0, 0), (0, 2)], opset=23, equal_repeats=True),
    Row("GroupNormalization", [x(2, 6, 5), w(6), w(6)], [(0, 1)], attributes={"num_groups": 3}, equal_repeats=True),
    Row("MeanVarianceNormalization", [x(2, 3, 4)], [(0, 1)], attributes={"axes": [2]}, equal_repeats=True),
    Row("BatchNormalization", [x(2, 3, 4), w(3), w(3), w(3), np.ones(3, np.float32)], [(0, 0), (0, 1)]),
    Row("InstanceNormalization", [x(2, 3, 4), w(3), w(3)], [(0, 0), (0, 1)], equal_repeats=True),
    *[Row(op, [x(2, 3)], [(0, 0)], [(0, 1)]) for op in ("Softmax", "LogSoftmax", "Hardmax")],
    Row("Softmax", [x(2, 3, 4)], [(0, 0)], [(0, 1), (0, 2)], opset=11),
    Row("SimplifiedLayerNormalization", [x(2, 3, 4), w(4)], [(0, 0), (0, 2)], equal_repeats=True),
    *[
        Row(op, [x(2, 3, 4), x(2, 3, 4), *[w(4)] * count], [(0, 0), (0, 2)], domain=MS, equal_repeats=True)
        for op, count in (("SkipLayerNormalization", 3), ("SkipSimplifiedLayerNormalization", 2))
    ],
    Row(
        "EmbedLayerNormalization",
        [Fed(RNG.integers(0, 9, (2, 3)).astype(np.int32)), None, w(9, 4), w(5, 4), None, w(4), w(4)],
        [(2, 1)],
        [(2, 0), (3, 0)],
        outputs=2,
        domain=MS,
        equal_repeats=True,
    ),
    Row("Gelu", [x(2, 3)], [(0, 1)], domain=MS),
    Row("QuickGelu", [x(2, 3)], [(0, 1)], domain=MS),
    Row("BiasGelu", [x(2, 3), w(3)], [(0, 1)], domain=MS),
    Row("FastGelu", [x(2, 3), w(3)], [(0, 1)], domain=MS),
    # space
    Row("AveragePool", [x(2, 3, 4, 4)], [(0, 0), (0, 1)], [(0, 2)], attributes={"kernel_shape": [2, 2]}),
    Row("MaxPool", [x(2, 3, 4, 4)], [(0, 0), (0, 1)], attributes={"kernel_shape": [2, 2]}),
    Row("LpPool", [x(2, 3, 4, 4)], [(0, 1)], attributes={"kernel_shape": [2, 2]}),
    Row("GlobalAveragePool", [x(2, 3, 4, 4)], [(0, 0), (0, 1)], equal_repeats=True),
    Row("Resize", [x(2, 3, 4, 4), None, np.array([1, 1, 2, 2], np.float32)], [(0, 0), (0, 1)], [(0, 2)]),
    Row("Resize", [x(2, 3, 4, 4), None, None, ints(2, 3, 8, 6)], [(0, 0), (0, 1)], [(0, 2)]),
    Row("GlobalMaxPool", [x(2, 3, 4, 4)], [(0, 0), (0, 1)]),
    # attention
    Row(
        "Attention",
        [x(2, 3, 24), x(2, 5, 8), x(2, 5, 12)],
        [(0, 2), (1, 2), (2, 2)],
        attributes={"q_num_heads": 6, "kv_num_heads": 2},
        opset=23,
        equal_repeats=True,
    ),
    Row("Attention", [x(2, 4, 3, 6), x(2, 4, 5, 6), x(2, 4, 5, 6)], [(0, 1), (0, 3)], opset=23, equal_repeats=True),
    Row(
        "Attention",
        [x(2, 4, 3, 6), x(2, 4, 1, 6), x(2, 4, 1, 6), x(4, 3, 3), x(2, 4, 2, 6), x(2, 4, 2, 6)],
        [(0, 1), (0, 3), (2, 3)],
        attributes={"scale": 0.3, "softcap": 2.0},
        outputs=3,
        opset=23,
        equal_repeats=True,
    ),
    *[
        Row("RotaryEmbedding", [x(2, 4, 3, 8), w(2, 3, 4), w(2, 3, 4)], [(0, 1), (0, 3)], attributes=a, opset=23)
        for a in ({}, {"interleaved": 1})
    ],
    Row(
        "RotaryEmbedding",
        [x(2, 3, 32), w(9, 2), w(9, 2), ids(9, 2, 3)],
        [(0, 2)],
        [(1, 0)],
        attributes={"num_heads": 4, "rotary_embedding_dim": 4},
        opset=23,
    ),
    Row(
        "RotaryEmbedding",
        [x(2, 4, 3, 8), ids(9, 2, 3), w(9, 4), w(9, 4)],
        [(0, 1), (0, 3)],
        [(2, 0)],
        domain=MS,
    ),
    Row(
        "MultiHeadAttention",
        [x(2, 3, 12), x(2, 5, 12), x(2, 5, 12), w(36)],
        [(0, 2), (3, 0)],
        attributes={"num_heads": 3},
        domain=MS,
        equal_repeats=True,
    ),
    Row(
        "GroupQueryAttention",
        [x(1, 3, 32), x(1, 3, 16), x(1, 3, 16), None, None, np.array([2], np.int32), np.array(3, np.int32)],
        [(0, 2), (1, 2)],
        attributes={"num_heads": 4, "kv_num_heads": 2},
        outputs=3,
        domain=MS,
        equal_repeats=True,
    ),
    Row(
        "Attention",
        [x(2, 3, 10), w(10, 36), w(36)],
        [(0, 2), (1, 0), (1, 1)],
        attributes={"num_heads": 3},
        domain=MS,
        equal_repeats=True,
    ),
    # control flow
    Row(
        "If",
        [boolean()],
        attributes={
            "then_branch": body(helper.make_node("Neg", ["outer"], ["y"]), output="y"),
            "else_branch": body(helper.make_node("Exp", ["outer"], ["z"]), output="z"),
        },
    ),
    Row(
        "If",
        [boolean()],
        attributes={
            "then_branch": body(helper.make_node("Neg", ["outer"], ["y"]), output="y"),
            "else_branch": body(
                helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(w(2, 3), "z")), output="z"
            ),
        },
    ),
    Row("Scatter", [x(2, 5), ids(5, 2, 1), x(2, 1)], [(0, 0)], [(0, 1)], attributes={"axis": 1}, opset=10),
]


def test_every_rule_has_a_row() -> None:
    inner = {node.op_type for row in ROWS for body in row.attributes.values() for node in getattr(body, "node", ())}
    assert {(row.domain, row.op) for row in ROWS} | {("", op) for op in inner} == set(registry.ruled())


def model_of(row: Row) -> tuple[onnx.ModelProto, feeds.Feeds]:
    names = [f"i{index}" if operand is not None else "" for index, operand in enumerate(row.operands)]
    fed = {f"i{i}": operand.value for i, operand in enumerate(row.operands) if isinstance(operand, Fed)}
    if row.op == "If":
        fed["outer"] = np.full((2, 3), 0.5, dtype=np.float32)
    stored = [numpy_helper.from_array(a, f"i{i}") for i, a in enumerate(row.operands) if isinstance(a, np.ndarray)]
    outputs = [f"o{i}" for i in range(row.outputs)]
    node = helper.make_node(row.op, names, outputs, name="node", domain=row.domain, **row.attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in fed.items()
    ]
    values = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph([node], "g", inputs, values, stored)
    opsets = [helper.make_opsetid("", row.opset), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for value, meta in zip(model.graph.output, session.get_outputs(), strict=True):
        kinds = {"tensor(float)": 1, "tensor(double)": 11, "tensor(int64)": 7, "tensor(bool)": 9, "tensor(int32)": 6}
        value.type.tensor_type.elem_type = kinds.get(meta.type, TensorProto.UINT8)
    return model, fed


def run(model: onnx.ModelProto, fed: feeds.Feeds) -> feeds.Feeds:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(None, fed)
    return {meta.name: np.asarray(value) for meta, value in zip(session.get_outputs(), values, strict=True)}


def analysed(row: Row) -> tuple[Dimensions, ir.Node, onnx.ModelProto, feeds.Feeds]:
    proto, fed = model_of(row)
    dimensions = infer(normalise(ir.from_proto(proto)))
    return dimensions, dimensions.walked[0], proto, fed


def random_map(rng: np.random.Generator, size: int, kind: str) -> SourceMap:
    if kind == "unequal":
        index = np.concatenate([np.arange(size), rng.integers(0, size, rng.integers(1, size + 1))])
        return SourceMap(size, index=tuple(rng.permutation(index).tolist()))
    return SourceMap(size, **{kind: int(rng.integers(2, 4))})


ALL = pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row}" for i, row in enumerate(ROWS)])


@ALL
def test_what_grows_and_what_does_not(row: Row) -> None:
    dimensions, node, _, _ = analysed(row)
    for pairs, wanted in ((row.grows, True), (row.kept, False)):
        for index, axis in pairs:
            axes = dimensions.axes_of(node, index)
            assert axes is not None
            atoms = list(dimensions.space.atoms(axes[axis]))
            assert any(atom.growable for atom in atoms) is wanted, (index, axis)


@ALL
@pytest.mark.parametrize("kind", ["tile", "repeat", "unequal"])
def test_growing_and_computing_commute(row: Row, kind: str) -> None:
    rng = np.random.default_rng(len(row.op))
    for trial in range(3):
        dimensions, _, proto, fed = analysed(row)
        named = name_dimensions(dimensions)
        growable = [each for each in named if each.dim.growable and (trial == 0 or rng.random() < 0.6)]
        maps = {each.dim: (each.name, random_map(rng, each.size, kind)) for each in growable}
        strategy = Strategy(STRATEGIES[(trial + len(kind)) % 4], seed=trial)
        try:
            plan = make_plan(Growth(dimensions, named, maps), strategy)
        except Refused:
            assert kind == "unequal" and row.equal_repeats
            continue
        grown = ir.to_proto(rewrite(dimensions.model, plan))
        expected = feeds.grown(run(proto, fed), plan.outputs, plan.maps)
        got = run(grown, feeds.grown(fed, plan.inputs, plan.maps))
        for name, want in expected.items():
            assert got[name].shape == want.shape
            np.testing.assert_allclose(got[name], want, rtol=2e-4, atol=2e-5)
