"""A refusal has the name of the dimension, the reason, the node, and the chain of nodes that leads to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, names_in, normal

WEIGHTS = {"table": (31, 12), "up": (12, 20), "down": (20, 12), "gain": (12,), "head": (12, 31)}
DOMAIN = "my.domain"


def residual_model(branch: str) -> onnx.ModelProto:
    """A model in which `branch`, nodes that compute x from d, is on the way back into the hidden stream."""
    model = build_model(
        f"""g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {{
            h = Gather (table, ids)
            n = LayerNormalization (h, gain)
            u = MatMul (n, up)
            r = Relu (u)
            d = MatMul (r, down)
            {branch}
            s = Add (h, x)
            m = LayerNormalization (s, gain)
            logits = MatMul (m, head)
        }}""",
        normal(0, WEIGHTS),
    )
    if DOMAIN in branch:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model


@dataclass(frozen=True)
class Obstacle:
    """Nodes that a growing hidden cannot pass, and the text of the refusal."""

    label: str
    branch: str
    node: str
    reason: str = ""
    runs: bool = True


OBSTACLES = [
    Obstacle("drawn", "e = RandomNormalLike (d)  x = Add (d, e)", "RandomNormalLike", "its random numbers", runs=False),
    Obstacle(
        "foreign operator",
        f"x = {DOMAIN}.Twist (d)",
        f"{DOMAIN}.Twist",
        "no rule",
        runs=False,
    ),
    Obstacle("log-softmax", "x = LogSoftmax <axis = -1> (d)", "LogSoftmax"),
    Obstacle("hardmax", "x = Hardmax <axis = -1> (d)", "Hardmax"),
    Obstacle("running sum", "a = Constant <value_int = -1> ()  x = CumSum (d, a)", "CumSum", "summed step by step"),
    Obstacle("sorted", "k = Constant <value_ints = [12]> ()  x, i = TopK (d, k)", "TopK"),
    Obstacle("searched", "i = ArgMax <axis = -1> (d)  f = Cast <to = 1> (i)  x = Add (d, f)", "ArgMax", "searched by"),
    Obstacle("multiplied together", "p = ReduceProd <keepdims = 1> (d)  x = Add (d, p)", "ReduceProd"),
    Obstacle(
        "rows that straddle",
        "a = Constant <value_ints = [0, -1, 8]> ()  b = Constant <value_ints = [0, -1, 12]> ()"
        "  y = Reshape (d, a)  z = Relu (y)  x = Reshape (z, b)",
        "Reshape",
        "do not divide each other",
    ),
    Obstacle(
        "factors that straddle",
        "a = Constant <value_ints = [0, 0, 4, 3]> ()  b = Constant <value_ints = [0, 0, 2, 6]> ()"
        "  c = Constant <value_ints = [0, 0, 12]> ()  p = Reshape (d, a)  q = Transpose <perm = [0, 1, 3, 2]> (p)"
        "  y = Reshape (q, b)  z = Transpose <perm = [0, 1, 3, 2]> (y)  x = Reshape (z, c)",
        "Reshape",
        "an axis is divided into 3 x 4 and into 2 x 6, which do not divide each other",
    ),
    Obstacle(
        "halves that are joined and shuffled",
        "a = Constant <value_ints = [0, 0, 3, 4]> ()  c = Constant <value_ints = [0, 0, 12]> ()"
        "  e, f = Split <axis = -1, num_outputs = 2> (d)  k = Relu (f)  j = Concat <axis = -1> (e, k)"
        "  p = Reshape (j, a)  q = Transpose <perm = [0, 1, 3, 2]> (p)  y = Reshape (q, c)"
        "  g, i = Split <axis = -1, num_outputs = 2> (y)  w = Relu (i)  z = Concat <axis = -1> (g, w)"
        "  b = Reshape (z, a)  o = Transpose <perm = [0, 1, 3, 2]> (b)  x = Reshape (o, c)",
        "Reshape",
        "an axis is divided into 2 x 3 + 2 x 3 and into 3 x 4, whose boundaries do not line up",
    ),
]


def cases(*names: str) -> list[object]:
    return [pytest.param(obstacle, id=obstacle.label) for obstacle in OBSTACLES if not names or obstacle.label in names]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("request_", ["--factor 2", "--set hidden=2", "--factor 2 --no-validate"])
@pytest.mark.parametrize("obstacle", cases())
def test_the_refusal_names_the_obstacle(cli: Command, place: Path, obstacle: Obstacle, request_: str) -> None:
    if "hidden=2" in request_ and re.search("factors|halves", obstacle.label):
        pytest.skip("hidden is two dimensions there, and each is refused by its own name")
    onnx.save(residual_model(obstacle.branch), "model.onnx")
    outcome = cli("expand", "model.onnx", "-o", "big.onnx", *request_.split())
    assert (outcome.code, outcome.stdout) == (3, ""), outcome
    assert re.search(r"error: hidden(\.\d)? \(size \d+\) cannot grow: ", outcome.error)
    assert obstacle.reason in outcome.error
    assert f"(at {obstacle.node} '" in outcome.error
    # The chain leads from the hidden stream over the norm to the obstacle.
    chain = outcome.error.partition("reached by way of ")[2]
    assert chain.startswith("LayerNormalization 'LayerNormalization_1' -> ")
    assert re.search(r"To keep its size and grow the rest: --set hidden(\.\d)?=1", outcome.error)
    assert names_in(place) == {"model.onnx"}


@pytest.mark.parametrize("obstacle", [case for case in cases() if case.values[0].runs])  # type: ignore[attr-defined]
def test_the_advice_works(cli: Command, place: Path, obstacle: Obstacle) -> None:
    """With the option that the refusal suggests, the same command succeeds, and grows the rest."""
    onnx.save(residual_model(obstacle.branch), "model.onnx")
    arguments = ["expand", "model.onnx", "-o", "big.onnx", "--factor", "2", "--precision", "float64"]
    outcome = cli(*arguments)
    assert outcome.code == 3
    for _ in range(6):  # a refusal names one dimension at a time
        advice = re.search(r"grow the rest: (--set) (\S+=1)$", outcome.error)
        assert advice is not None
        arguments += advice.groups()
        outcome = cli(*arguments)
        if outcome.code != 3:
            break
    assert outcome.code == 0, outcome.error
    weights = {tensor.name: list(tensor.dims) for tensor in onnx.load("big.onnx").graph.initializer}
    assert weights["up"] == [12, 40] and weights["down"] == [40, 12]


def test_hidden_that_is_a_head_too(cli: Command, place: Path) -> None:
    """If hidden is contracted between two activations, it is still hidden: it grows, or is refused."""
    branch = "t = Transpose <perm = [0, 2, 1]> (d)  a = MatMul (d, t)  p = Softmax (a)  x = MatMul (p, d)"
    onnx.save(residual_model(branch), "model.onnx")
    outcome = cli("expand", "model.onnx", "-o", "big.onnx", "--factor", "2")
    if outcome.code == 0:
        weights = {tensor.name: list(tensor.dims) for tensor in onnx.load("big.onnx").graph.initializer}
        assert weights["up"] == [24, 40]
    else:
        assert outcome.code == 3


def test_one_refusal_of_one_dimension_names_it(cli: Command, place: Path) -> None:
    onnx.save(residual_model("x = Identity (d)"), "model.onnx")
    outcome = cli("expand", "model.onnx", "-o", "big.onnx", "--set", "vocab=2")
    assert outcome.code == 3
    assert "vocab (size 31) cannot grow: indexed by values (at Gather '" in outcome.error
    assert names_in(place) == {"model.onnx"}


def test_parts_of_a_norm_that_grow_unequally(cli: Command, place: Path) -> None:
    """A norm over two segments would compute something else if they repeat by different factors: it is written out."""
    rolled = (
        "a = Constant <value_ints = [0]> ()  b = Constant <value_ints = [5]> ()  c = Constant <value_ints = [12]> ()"
        "  e = Constant <value_ints = [2]> ()  p = Slice (d, a, b, e)  q = Slice (d, b, c, e)"
        "  x = Concat <axis = 2> (p, q)"
    )
    onnx.save(residual_model(rolled), "model.onnx")
    outcome = cli("expand", "model.onnx", "-o", "big.onnx", "--set", "hidden.0=2")
    assert outcome.code == 0 and "each source channel once" in " ".join(outcome.stdout.split())
    assert not [node for node in onnx.load("big.onnx").graph.node if node.op_type == "LayerNormalization"]
    assert cli("expand", "model.onnx", "-o", "even.onnx", "--factor", "2").code == 0
    assert [node for node in onnx.load("even.onnx").graph.node if node.op_type == "LayerNormalization"]


@pytest.mark.parametrize("request_", ["--factor 2", "--set ffn=2"])
def test_a_model_in_which_nothing_grows(cli: Command, place: Path, request_: str) -> None:
    onnx.save(build_model("g (float[batch, 12] x) => (float[batch, 12] y) {\n y = Softmax (x)\n}", {}), "model.onnx")
    outcome = cli("expand", "model.onnx", "-o", "big.onnx", *request_.split())
    assert outcome.code == (3 if "factor" in request_ else 2)
    assert outcome.stdout == "" and names_in(place) == {"model.onnx"}


@pytest.mark.parametrize("name", ["hidden", "ffn"])
def test_inspect_gives_the_same_reasons(cli: Command, place: Path, name: str) -> None:
    onnx.save(residual_model("a = Constant <value_int = -1> ()  x = CumSum (d, a)"), "model.onnx")
    printed = cli("inspect", "model.onnx").stdout
    row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
    assert re.split(r"\s{2,}", row.strip())[2] == ("no" if name == "hidden" else "yes")
    assert ("CumSum" in row) == (name == "hidden")


@pytest.mark.parametrize("axis", [5, 2, -3])
def test_an_axis_that_the_operand_does_not_have(cli: Command, place: Path, axis: int) -> None:
    stored = {"table": (11, 8), "down": (8, 7)}
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["x"]),
        onnx.helper.make_node("Softmax", ["x"], ["s"], axis=axis, name="bad"),
        onnx.helper.make_node("MatMul", ["s", "down"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 7])],
        [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in stored.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, place / "bad.onnx")
    outcome = cli("expand", place / "bad.onnx", "--factor", "2", "--no-validate", "-o", place / "out.onnx")
    assert outcome.code == 3
    assert f"Softmax 'bad' does not fit the specification of its operator (axis {axis}" in outcome.stderr
    assert not (place / "out.onnx").exists()
