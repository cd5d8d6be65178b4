"""Rows for the rules of `hyperclone_onnx.rules.control`."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rule_rows.harness import Model, row


@row("If", seeds=10)
def if_(m: Model) -> None:
    """The branches read outer values and weights. Each branch has a contraction."""
    n, k, p = m.size(), m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    condition = m.operand(np.asarray(m.coin()), stored=m.coin(0.3))
    weights = [m.operand((k, p), stored=True) for _ in range(2)]
    branches = [
        helper.make_graph(
            [
                helper.make_node("MatMul", [x, weights[i]], [f"inner{i}"], name=f"inner{i}"),
                helper.make_node(op, [f"inner{i}"], [f"branch{i}"], name=f"branch{i}"),
            ],
            f"b{i}",
            [],
            [helper.make_tensor_value_info(f"branch{i}", TensorProto.DOUBLE, (n, p))],
        )
        for i, op in enumerate(("Tanh", "Exp"))
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1], want="gg")


@row("If", seeds=8)
def if_with_weights_of_its_own(m: Model) -> None:
    """A branch stores a weight; another reads a computed outer value."""
    n, k = m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    y = m.node("Tanh", x, inner=True)
    condition = m.operand(np.asarray(m.coin()), stored=False)
    info = [helper.make_tensor_value_info("out", TensorProto.DOUBLE, (n, k))]
    weight = numpy_helper.from_array(m.values((k, k)), "own")
    branches = [
        helper.make_graph([helper.make_node("MatMul", [x, "own"], ["out"], name="a")], "a", [], info, [weight]),
        helper.make_graph([helper.make_node("Mul", [x, y], ["out"], name="b")], "b", [], info),
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1])


@row("If", seeds=6)
def if_that_is_decided(m: Model) -> None:
    """The condition is stored. The branch that never runs uses the same weight, but would not fit after growth."""
    n, k = m.size(), m.size()
    x, weight = m.operand((n, k), "gg", stored=False), m.operand((k, k), "gg", stored=True)
    chosen = m.coin()
    runs = [
        helper.make_node("MatMul", [x, weight], ["product"], name="product"),
        helper.make_node("Tanh", ["product"], ["out"], name="out"),
    ]
    idle = [helper.make_node("MatMul", [weight, weight], ["out"], name="idle")]
    info = [helper.make_tensor_value_info("out", TensorProto.DOUBLE, None)]
    branches = [helper.make_graph(nodes, "b", [], info) for nodes in ((runs, idle) if chosen else (idle, runs))]
    condition = m.operand(np.asarray(chosen), stored=True)
    m.runtime = True
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1], want="gg", kind=np.float64)


@row("If", seeds=4)
def constant_of_a_branch(m: Model) -> None:
    """A branch only returns a stored tensor."""
    n, k = m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    condition = m.operand(np.asarray(m.coin()), stored=False)
    value = numpy_helper.from_array(m.values((n, k)))
    nodes = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Tanh", [x], ["t"], name="t")]
    branches = [
        helper.make_graph([node], "b", [], [helper.make_tensor_value_info(node.output[0], TensorProto.DOUBLE, (n, k))])
        for node in nodes
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1], want="gg")


def carried(name: str) -> onnx.ValueInfoProto:
    """An input or output of a body without a declared shape."""
    return helper.make_tensor_value_info(name, TensorProto.DOUBLE, None)


COUNTER = [
    helper.make_tensor_value_info("turn", TensorProto.INT64, ()),
    helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
]


@row("Loop", seeds=10)
def loop(m: Model) -> None:
    """h = tanh(h W[turn] + x), with experts picked by the number of the iteration. All h are stacked."""
    m.runtime = True
    n, k, turns = m.size(), m.size(), m.size(2, 3)
    x = m.operand((n, k), "gg", stored=False)
    weights = m.operand((turns, k, k), "pgg", stored=True)
    start = m.operand((n, k), "gg", stored=m.coin(0.3))
    nodes = [
        helper.make_node("Gather", [weights, "turn"], ["w"], name="pick", axis=0),
        helper.make_node("MatMul", ["h", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", x], ["sum"], name="sum"),
        helper.make_node("Tanh", ["sum"], ["h_out"], name="h_out"),
        helper.make_node("Identity", ["go"], ["go_out"], name="go_out"),
        helper.make_node("Exp", ["h_out"], ["stacked"], name="stacked"),
    ]
    results = [helper.make_tensor_value_info("go_out", TensorProto.BOOL, ()), carried("h_out"), carried("stacked")]
    body = helper.make_graph(nodes, "body", [*COUNTER, carried("h")], results)
    count = m.ints(np.asarray(turns))
    condition = m.operand(np.asarray(True), stored=True) if m.coin() else ""
    _, stacked = m.node("Loop", count, condition, start, outputs=2, want="gg", body=body)
    m.kinds |= dict.fromkeys(m.outputs, TensorProto.DOUBLE)
    m.expected[stacked] = "pgg"


@row("Loop", seeds=3)
def loop_that_lengthens(m: Model) -> None:
    """A carried value gets longer in each iteration. Its axes and those of the joined parts keep their sizes."""
    m.runtime = True
    k = m.size()
    x = m.operand((1, k), stored=False)
    nodes = [
        helper.make_node("Concat", ["h", x], ["h_out"], name="h_out", axis=0),
        helper.make_node("Identity", ["go"], ["go_out"], name="go_out"),
    ]
    results = [helper.make_tensor_value_info("go_out", TensorProto.BOOL, ()), carried("h_out")]
    body = helper.make_graph(nodes, "body", [*COUNTER, carried("h")], results)
    start = m.operand((m.pick(0, 1, 2), k), stored=False)
    m.node("Loop", m.ints(np.asarray(2)), "", start, body=body, want="..", kind=np.float64)


@row("Scan", seeds=10)
def scan(m: Model) -> None:
    """A linear recurrence: h = a[t] h + b[t] W, y[t] = h."""
    m.runtime = True
    t, n, k, p = m.size(), m.size(), m.size(), m.size()
    axis, out = m.size(0, 2), m.size(0, 2)
    decay = m.operand(np.asarray(m.values((t, n, p))), stored=False)
    shape = [n, k]
    shape.insert(axis, t)
    b = m.operand(tuple(shape), stored=False)
    weight = m.operand((k, p), "gg", stored=True)
    start = m.operand((n, p), "gg", stored=False)
    nodes = [
        helper.make_node("MatMul", ["now", weight], ["product"], name="product"),
        helper.make_node("Mul", ["decay", "h"], ["kept"], name="kept"),
        helper.make_node("Add", ["kept", "product"], ["h_out"], name="h_out"),
        helper.make_node("Identity", ["h_out"], ["y"], name="y"),
    ]
    inputs, results = ["h", "decay", "now"], ["h_out", "y"]
    body = helper.make_graph(nodes, "body", [carried(i) for i in inputs], [carried(o) for o in results])
    attributes = {"num_scan_inputs": 2, "scan_input_axes": [0, axis], "scan_output_axes": [out]}
    _, y = m.node("Scan", start, decay, b, outputs=2, want="gg", body=body, **attributes)
    m.kinds |= dict.fromkeys(m.outputs, TensorProto.DOUBLE)
    letters = ["g", "g"]
    letters.insert(out, "p")
    m.expected[y] = "".join(letters)
