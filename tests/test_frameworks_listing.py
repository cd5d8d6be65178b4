"""`handoff --list` says what is trained and why. The structure of the graph decides, and globs override it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import Command, build_model, normal

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")

import onnx_ir as ir  # noqa: E402

from hyperclone_onnx.frameworks.compiling.preparation import prepare_model  # noqa: E402
from hyperclone_onnx.frameworks.compiling.trainable import trainable  # noqa: E402

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
    "running statistics": (
        "g (float[b, 4] x) => (float[b, 4] y) {\ny = BatchNormalization (x, scale, bias, mean, variance)\n}",
        {"scale": (4,), "bias": (4,), "mean": (4,), "variance": (4,)},
        {"scale", "bias"},
    ),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structure_decides(case: str) -> None:
    text, shapes, wanted = STRUCTURES[case]
    model = prepare_model(ir.from_proto(build_model(text, normal(0, shapes))))
    assert set(trainable(model)) == wanted


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
    heads = next(each for each in analyse(source).named if each.role == "head_dim")
    index = (*range(heads.size), 0)
    plan = expand(source, big, maps={heads.name: SourceMap(heads.size, index=index)}, check=False).plan
    added = [each for each in compile_model(big).program.weights if plan.brings_in(each.initializer)]
    assert added and all(each.role == "constant" for each in added)
    assert {each.reason for each in added if each.shape} == {"a divisor that growth put in"}
