"""`handoff --list` says what is trained and why. The structure of the graph decides, and globs override it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Command, build_model, normal, perceptron

from hyperclone_onnx.analysis.trainable import trainable
from hyperclone_onnx.frameworks.compiling.preparation import prepare_model
from hyperclone_onnx.frameworks.listing import list_weights

Zoo = Callable[[str], Path]


def test_list(cli: Command, zoo: Zoo) -> None:
    done = cli("handoff", zoo("gptj.distinct"), "--list")
    assert done.code == 0
    assert "trainable  transformer.h.0.ln_1.weight" in done.stdout
    assert "rotary angles: looked up by position and multiplied" in done.stdout
    assert "parameters: " in done.stdout.splitlines()[-1]


def test_list_as_json_with_globs(cli: Command, zoo: Zoo) -> None:
    done = cli("handoff", zoo("llama.distinct"), "--list", "--json", "--freeze", "model.*", "--train", "*norm.weight")
    rows = {row["initializer"]: row for row in json.loads(done.stdout)["weights"]}
    assert rows["model.embed_tokens.weight"]["role"] == "frozen"
    assert rows["model.norm.weight"]["role"] == "trainable"
    assert rows["model.rotary_emb.inv_freq"] == {
        "initializer": "model.rotary_emb.inv_freq",
        "path": "model.rotary_emb.inv_freq",
        "role": "constant",
        "type": "float",
        "shape": [4],
        "reason": "meets no activation",
    }


COUNTS = "g (int64[b, 3] n) => (float[b, 3] y) {\nx = Cast <to = 1> (n)\ny = Mul (x, f)\n}"
LARGE = """g (float[b, 4] x) => (float[b, 4] y) {
    h = MatMul (x, w)
    m = Add (h, mask)
    y = Softmax (m)\n}"""


@pytest.mark.parametrize(
    ("model", "arguments", "warning"),
    [
        (perceptron(), (), None),
        (perceptron(), ("--freeze", "*"), None),
        (
            build_model(COUNTS, normal(0, {"f": (3,)})),
            (),
            "warning: nothing is trained: none of the stored tensors is a parameter; `handoff --list` shows",
        ),
        (
            build_model(LARGE, {"mask": np.full((1000, 4), -3e38, np.float32), **normal(0, {"w": (4, 4)})}),
            (),
            "warning: only 0% of the 4,016 stored floating-point numbers are trained. The largest tensor that is "
            "not is 'mask' (a mask); ",
        ),
    ],
    ids=["all", "all frozen", "nothing", "little"],
)
def test_little_that_is_trained(
    model: onnx.ModelProto, arguments: tuple[str, ...], warning: str | None, cli: Command, tmp_path: Path
) -> None:
    onnx.save(model, tmp_path / "model.onnx")
    done = cli("handoff", tmp_path / "model.onnx", "--list", "--json", *arguments)
    assert done.code == 0
    printed = json.loads(done.stdout)["warning"]
    assert (printed is None) == (warning is None) and done.stderr == (
        "" if printed is None else f"warning: {printed}\n"
    )
    assert warning is None or done.stderr.startswith(warning)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say what to do: --list"),
        (("--list", "--freeze", "nothing.*"), 2, "'nothing.*' matches no floating tensor"),
    ],
)
def test_wrong_usage(cli: Command, zoo: Zoo, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = cli("handoff", zoo("llama.distinct"), *arguments)
    assert done.code == code and message in done.error


STRUCTURES = {
    "a learned position table is added": (
        """g (int64[b, s] ids) => (float[b, s, 4] y) {
        h = Gather (words, ids)
        n = Shape <start = 1> (ids)
        zero = Constant <value = int64[1] {0}> ()
        p = Slice (places, zero, n)
        y = Add (h, p)\n}""",
        {"words": (9, 4), "places": (16, 4)},
        {"words", "places"},
    ),
    "rotary tables are looked up and multiplied": (
        """g (int64[b, s] ids, int64[b, s] at) => (float[b, s, 4] y) {
        h = Gather (words, ids)
        q = MatMul (h, weight)
        c = Gather (cosines, at)
        y = Mul (q, c)\n}""",
        {"words": (9, 4), "weight": (4, 4), "cosines": (16, 4)},
        {"words", "weight"},
    ),
    "a table of gains by kind, multiplied by numbers": (
        """g (int64[b, s] ids) => (float[b, s, 4] y) {
        h = Gather (words, ids)
        two = Constant <value = float {2.0}> ()
        y = Mul (h, two)\n}""",
        {"words": (9, 4)},
        {"words"},
    ),
    "what meets no activation": (
        """g (float[b, 4] x, int64[b] n) => (float[b, 4] y, float[b, 4] z) {
        y = Mul (x, gain)
        f = Cast <to = 1> (n)
        one = Constant <value = int64[1] {1}> ()
        u = Unsqueeze (f, one)
        z = Mul (u, rates)\n}""",
        {"gain": (4,), "rates": (4,)},
        {"gain"},
    ),
    "through layouts and stored arithmetic": (
        """g (float[b, 4] x) => (float[b, 6] y) {
        one = Constant <value = float {1.0}> ()
        w = Add (weight, one)
        t = Transpose (w)
        y = MatMul (x, t)\n}""",
        {"weight": (6, 4)},
        {"weight"},
    ),
    "counts that are cast": (
        """g (int64[b, 6] counts) => (float[b, 3] y) {
        x = Cast <to = 1> (counts)
        h = MatMul (x, w)
        y = Add (h, bias)\n}""",
        {"w": (6, 3), "bias": (3,)},
        {"w", "bias"},
    ),
    "a one-hot code times a table": (
        """g (int64[b, n] ids) => (float[b, n, 4] y) {
        depth = Constant <value = int64 {9}> ()
        values = Constant <value = float[2] {0.0, 1.0}> ()
        code = OneHot (ids, depth, values)
        h = MatMul (code, table)
        y = Mul (h, gain)\n}""",
        {"table": (9, 4), "gain": (4,)},
        {"table", "gain"},
    ),
    "time steps": (
        """g (int64[b] steps) => (float[b, 4] y) {
        t = Cast <to = 1> (steps)
        axis = Constant <value = int64[1] {1}> ()
        column = Unsqueeze (t, axis)
        angles = Mul (column, frequencies)
        sine = Sin (angles)
        cosine = Cos (angles)
        code = Concat <axis = 1> (sine, cosine)
        h = Gemm (code, w, bias)
        y = LayerNormalization (h, gain)\n}""",
        {"frequencies": (3,), "w": (6, 4), "bias": (4,), "gain": (4,)},
        {"w", "bias", "gain"},
    ),
    "frequencies, multiplied with positions as a matrix": (
        """g (int64[b, n] positions, float[b, n, 6] x) => (float[b, n, 6] y) {
        axis = Constant <value = int64[1] {2}> ()
        p = Cast <to = 1> (positions)
        column = Unsqueeze (p, axis)
        angles = MatMul (column, frequencies)
        cosine = Cos (angles)
        y = Mul (x, cosine)\n}""",
        {"frequencies": (1, 6)},
        set(),
    ),
    "a network over coordinates": (
        """g (float16[b, n, 4] x) => (float[n, 5] y) {
        shape = Shape <start = 1, end = 2> (x)
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> ()
        count = Squeeze (shape)
        places = Range (zero, count, one)
        p = Cast <to = 1> (places)
        axis = Constant <value = int64[1] {1}> ()
        column = Unsqueeze (p, axis)
        both = Concat <axis = 1> (column, column)
        h = MatMul (both, w)
        b = Add (h, bias)
        r = Relu (b)
        y = MatMul (r, v)\n}""",
        {"w": (2, 8), "bias": (8,), "v": (8, 5)},
        {"w", "bias", "v"},
    ),
    "running statistics": (
        "g (float[b, 4] x) => (float[b, 4] y) {\ny = BatchNormalization (x, scale, bias, mean, variance)\n}",
        {"scale": (4,), "bias": (4,), "mean": (4,), "variance": (4,)},
        {"scale", "bias"},
    ),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structure_decides(case: str) -> None:
    text, shapes, expected = STRUCTURES[case]
    model = prepare_model(ir.from_proto(build_model(text, normal(0, shapes))))
    assert set(trainable(model)) == expected


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_pruning_mask_is_not_trained(kept: float) -> None:
    """Zeros and ones that a weight is multiplied by; a matrix of other numbers there is a factor of the weight."""
    rng = np.random.default_rng(0)
    factor = (rng.random((4, 4)) < 0.5).astype(np.float32) * kept
    text = "g (float[b, 4] x) => (float[b, 4] y) {\np = Mul (w, factor)\nt = Transpose (p)\ny = MatMul (x, t)\n}"
    model = build_model(text, {"factor": factor, **normal(0, {"w": (4, 4)})})
    assert set(trainable(prepare_model(ir.from_proto(model)))) == ({"w"} if kept == 1.0 else {"w", "factor"})


def test_a_mask_is_not_trained(tmp_path: Path) -> None:
    mask = normal(0, {"mask": (4, 4)})["mask"]
    mask[0, 1] = -3e38
    text = "g (float[b, 4] x) => (float[b, 4] y) {\nh = MatMul (x, w)\nm = Add (h, mask)\ny = Softmax (m)\n}"
    model = build_model(text, {"mask": mask, **normal(0, {"w": (4, 4)})})
    onnx.checker.check_model(model)
    assert trainable(prepare_model(ir.from_proto(model))) == ["w"]


def test_a_divisor_that_growth_put_in_is_no_weight(zoo: Zoo, tmp_path: Path) -> None:
    """Heads that are repeated unequally are divided by a vector: an Add or Mul with a stored operand, like a gain."""
    from hyperclone_onnx import SourceMap, analyse, expand
    from hyperclone_onnx.frameworks.compiled_model import compile_model

    source, big = zoo("gpt2.distinct"), tmp_path / "big.onnx"
    heads = next(dimension for dimension in analyse(source).named if dimension.role == "head_dim")
    index = (*range(heads.size), 0)
    plan = expand(source, big, maps={heads.name: SourceMap(heads.size, index=index)}, check=False).plan
    added = [weight for weight in compile_model(big).program.weights if plan.brings_in(weight.initializer)]
    assert added and all(weight.role == "constant" for weight in added)
    assert {weight.reason for weight in added if weight.shape} == {"a constant that growth put in"}


@pytest.mark.parametrize("name", ["bert.fused", "bart.fused", "deberta_v2.extended", "llama.fused"])
def test_fused_graphs_train_the_same_tensors_as_plain_ones(name: str, zoo: Zoo) -> None:
    """ONNX Runtime's operators look up and multiply too; what is left out is less than a tenth of the floats."""
    assert list_weights(zoo(name)).warning is None


REFUSED = {
    "DynamicQuantizeLinear (node 'q'), MatMulInteger (node 'm')": """g (float[b, 4] x) => (int32[b, 4] y) {
        [q] c, s, z = DynamicQuantizeLinear (x)
        [m] y = MatMulInteger (c, codes, z)\n}""",
    "com.microsoft.DynamicQuantizeMatMul (node 'd')": """g (float[b, 4] x) => (float[b, 4] y) {
        [d] y = com.microsoft.DynamicQuantizeMatMul (x, codes, scales)\n}""",
    "SoftmaxCrossEntropyLoss (node 'loss')": """g (float[b, 4] x, int64[b] labels) => (float y) {
        [loss] y = SoftmaxCrossEntropyLoss (x, labels)\n}""",
}


@pytest.mark.parametrize("operators", REFUSED)
def test_an_operator_without_a_handoff_is_named_and_its_node(operators: str, cli: Command, tmp_path: Path) -> None:
    """No such graph is malformed: that ONNX writes an operator out for another opset is not the model's fault."""
    weights = {"codes": np.ones((4, 4), np.int8), "scales": np.ones(4, np.float32)}
    model = build_model(REFUSED[operators], weights)
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, tmp_path / "model.onnx")
    done = cli("handoff", tmp_path / "model.onnx", "--list")
    assert done.code == 3 and done.error == f"error: {tmp_path / 'model.onnx'}: no handoff for {operators}"


def test_a_checkpoint_of_a_model_of_which_little_is_trained(cli: Command, tmp_path: Path) -> None:
    weights = {"mask": np.full((1000, 4), -3e38, np.float32), **normal(0, {"w": (4, 4)})}
    onnx.save(build_model(LARGE, weights), tmp_path / "model.onnx")
    options = ("--to", "safetensors", "-o", tmp_path / "out", "--no-validate", "--json")
    done = cli("handoff", tmp_path / "model.onnx", *options)
    assert done.code == 0 and "warning: only 0% of the 4,016 " in done.stderr
    assert json.loads(done.stdout)["warning"].startswith("only 0% of the 4,016 ")
