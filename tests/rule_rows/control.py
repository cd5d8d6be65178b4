"""Rows for the rules of `hyperclone_onnx.rules.control`."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from rule_rows.harness import Model, row


@row("If", seeds=10)
def if_(m: Model) -> None:
    """The branches read outer values and weights; each has a node that contracts."""
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


@row("Constant", seeds=4)
def constant_of_a_branch(m: Model) -> None:
    """All that a branch does is to return a stored tensor."""
    n, k = m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    condition = m.operand(np.asarray(m.coin()), stored=False)
    value = numpy_helper.from_array(m.values((n, k)))
    made = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Tanh", [x], ["t"], name="t")]
    branches = [
        helper.make_graph([node], "b", [], [helper.make_tensor_value_info(node.output[0], TensorProto.DOUBLE, (n, k))])
        for node in made
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1], want="gg")
