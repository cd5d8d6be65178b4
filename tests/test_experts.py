"""Experts out of dense models: feed-forward blocks in every form, the mixtures that they become, and bad requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import Command, build_model, normal

from hyperclone_onnx import (
    BadModel,
    BadRequest,
    Experts,
    ModelsDiffer,
    Plan,
    Refused,
    Strategy,
    analyse,
    expand,
    shrink,
)
from hyperclone_onnx.analysis.feed_forward import find_feed_forward
from hyperclone_onnx.diagnosis import diagnose
from hyperclone_onnx.expansion.validating import validate_files
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.tensors import stored_rows
from hyperclone_onnx.tensors.expert_parts import Part, PartTensor
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.transforms import experts as transform
from hyperclone_onnx.transforms.source import source_of
from models import zoo_store

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]

HIDDEN, FFN = 6, 8


@dataclass(frozen=True)
class Form:
    """A way to write a feed-forward block: nodes that compute `d` from `n`, [b, s, 6]."""

    body: str
    weights: Shapes
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Other stored tensors."""


UP: Shapes = {"up": (HIDDEN, FFN), "down": (FFN, HIDDEN)}
GATED: Shapes = {**UP, "gate": (HIDDEN, FFN)}
FUSED: Shapes = {"both": (HIDDEN, 2 * FFN), "down": (FFN, HIDDEN)}
BIASED: Shapes = {**UP, "up_bias": (FFN,), "down_bias": (HIDDEN,)}

FORMS: dict[str, Form] = {
    "plain": Form("u = MatMul (n, up)\n r = Relu (u)\n d = MatMul (r, down)", UP),
    "gated": Form(
        "g = MatMul (n, gate)\n a = Sigmoid (g)\n s = Mul (g, a)\n u = MatMul (n, up)\n h = Mul (s, u)\n"
        "d = MatMul (h, down)",
        GATED,
    ),
    "biases": Form(
        "u0 = MatMul (n, up)\n u = Add (up_bias, u0)\n r = Gelu (u)\n d0 = MatMul (r, down)\n d = Add (d0, down_bias)",
        BIASED,
    ),
    "biases, tanh": Form(
        'u0 = MatMul (n, up)\n u = Add (up_bias, u0)\n r = Gelu <approximate = "tanh"> (u)\n'
        " d0 = MatMul (r, down)\n d = Add (d0, down_bias)",
        BIASED,
    ),
    "written-out activation": Form(
        "u = MatMul (n, up)\n p = Pow (u, three)\n q = Mul (p, one)\n r = Tanh (q)\n h = Mul (u, r)\n"
        "d = MatMul (h, down)",
        UP,
        {"three": np.array(3, np.float32), "one": np.array([0.3], np.float32)},
    ),
    "slopes": Form("u = MatMul (n, up)\n r = PRelu (u, slope)\n d = MatMul (r, down)", {**UP, "slope": (1, 1, FFN)}),
    "transposed": Form(
        "a = Transpose <perm = [1, 0]> (up)\n u = MatMul (n, a)\n r = Relu (u)\n b = Transpose <perm = [1, 0]> (down)\n"
        "d = MatMul (r, b)",
        {"up": (FFN, HIDDEN), "down": (HIDDEN, FFN)},
    ),
    "fused, split": Form(
        "b = MatMul (n, both)\n g, u = Split <axis = -1, num_outputs = 2> (b)\n a = Sigmoid (g)\n h = Mul (a, u)\n"
        "d = MatMul (h, down)",
        FUSED,
    ),
    "fused, sliced": Form(
        "b = MatMul (n, both)\n g = Slice (b, zero, width, axis)\n u = Slice (b, width, end, axis)\n a = Tanh (g)\n"
        "h = Mul (a, u)\n d = MatMul (h, down)",
        FUSED,
        {
            "zero": np.array([0], np.int64),
            "width": np.array([FFN], np.int64),
            "end": np.array([2**62], np.int64),
            "axis": np.array([2], np.int64),
        },
    ),
    "flattened, Gemm": Form(
        "f = Reshape (n, rows)\n u = Gemm <transB = 1> (f, up, up_bias)\n t = Shape (n)\n r = Gelu (u)\n"
        "e = Gemm <alpha = 0.5, beta = 2.0> (r, down, down_bias)\n d = Reshape (e, t)",
        {**BIASED, "up": (FFN, HIDDEN)},
        {"rows": np.array([-1, HIDDEN], np.int64)},
    ),
    "convolutions": Form(
        "t = Transpose <perm = [0, 2, 1]> (n)\n u = Conv (t, up, up_bias)\n r = Relu (u)\n e = Conv (r, down)\n"
        "d = Transpose <perm = [0, 2, 1]> (e)",
        {"up": (FFN, HIDDEN, 1), "up_bias": (FFN,), "down": (HIDDEN, FFN, 1)},
    ),
    "weights at the left": Form(
        "t = Transpose <perm = [0, 2, 1]> (n)\n u = MatMul (up, t)\n r = Relu (u)\n e = MatMul (down, r)\n"
        "d = Transpose <perm = [0, 2, 1]> (e)",
        {"up": (FFN, HIDDEN), "down": (HIDDEN, FFN)},
    ),
}
"""Every form of a block that becomes experts."""


def block(form: Form, layers: int = 1, kind: type[np.floating[Any]] = np.float32) -> onnx.ModelProto:
    """A residual model with blocks of one form."""
    lines, weights, numbers = ["x0 = Gather (table, ids)"], {"table": (11, HIDDEN)}, dict(form.numbers)
    for layer in range(layers):
        weights |= {f"gain{layer}": (HIDDEN,), f"shift{layer}": (HIDDEN,)}
        weights |= {f"{name}{layer}": shape for name, shape in form.weights.items()}
        lines.append(f"n{layer} = LayerNormalization (x{layer}, gain{layer}, shift{layer})")
        lines.append(_numbered(form.body, layer, set(form.numbers)))
        lines.append(f"x{layer + 1} = Add (x{layer}, d{layer})")
    name = {np.float16: "float16", np.float64: "double"}.get(kind, "float")
    text = f"g (int64[b, s] ids) => ({name}[b, s, {HIDDEN}] y) {{\n{chr(10).join(lines)}\n y = Identity (x{layers})\n}}"
    return build_model(text, {key: array.astype(kind) for key, array in normal(5, weights).items()} | numbers)


def _numbered(body: str, layer: int, shared: set[str]) -> str:
    """The nodes of a block, with the number of its layer in each name of its own."""
    lines = []
    for line in body.splitlines():
        outputs, call = line.split("=", 1)
        attributes, operands = call.rsplit("(", 1)
        names = [name.strip() for name in operands.rstrip(" )").split(",")]
        read = ", ".join(name if name in shared else f"{name}{layer}" for name in names)
        given = ", ".join(f"{name.strip()}{layer}" for name in outputs.split(","))
        lines.append(f"{given} ={attributes}({read})")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("experts") / "dense.onnx"
    onnx.save(block(FORMS["gated"], 2), path)
    return path


def stored(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# -- every form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"granularity": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"granularity": 4, "shared": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FORMS)
def test_experts_compute_the_block(name: str, how: Mapping[str, Any], tmp_path: Path) -> None:
    """The grown width has unequal repeats, so that mistakes about the order of hidden units show."""
    source, out = tmp_path / "dense.onnx", tmp_path / "moe.onnx"
    onnx.save(block(FORMS[name]), source)
    result = expand(source, out, experts=Experts(4, 2, **how), sizes={"hidden": 12}, precision="float64")
    report = result.validation
    assert report is not None and report.equal and report.double
    assert max(output.max_relative for output in report.double) <= 1e-12
    parts = how.get("granularity", 1)
    counts = [node.op_type for node in onnx.load(out).graph.node]
    assert counts.count("TopK") == 1 and result.to_json()["experts"] == [
        {"blocks": 1, "experts": 4 * parts, "chosen": 2 * parts}
    ]


def test_experts_in_half_precision(tmp_path: Path) -> None:
    """The router's scores are sorted in float32."""
    source, out = tmp_path / "dense.onnx", tmp_path / "moe.onnx"
    onnx.save(block(FORMS["biases"], kind=np.float16), source)
    report = expand(source, out, experts=Experts(4, 2)).validation
    assert report is not None and report.equal
    assert stored(out)["down0.experts"].dtype == np.float16


def test_a_block_whose_weights_are_joined_with_others_is_refused_by_name(tmp_path: Path) -> None:
    body = "b = MatMul (n, both)\n g, u = Split <axis = -1> (b, widths)\n r = Relu (g)\n e = MatMul (r, down)\n"
    body += " v = MatMul (u, other)\n d = Add (e, v)"
    form = Form(
        body,
        {"both": (HIDDEN, FFN + 4), "down": (FFN, HIDDEN), "other": (4, HIDDEN)},
        {"widths": np.array([FFN, 4], np.int64)},
    )
    onnx.save(block(form), tmp_path / "dense.onnx")
    with pytest.raises(Refused, match=r"no feed-forward block .* can become experts: MatMul .* cuts the hidden units"):
        expand(tmp_path / "dense.onnx", tmp_path / "moe.onnx", experts=Experts(4, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["dense.onnx"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("u = MatMul (n, up)\n d = MatMul (u, down)", "a weight of low rank"),
        (
            "u = MatMul (n, up)\n s = Transpose <perm = [0, 2, 1]> (u)\n t = Relu (s)\n"
            "r = Transpose <perm = [0, 2, 1]> (t)\n d = MatMul (r, down)",
            "does not act on each by itself",
        ),
        ("u = MatMul (n, up)\n r = Relu (u)\n e = MatMul (r, down)\n d = Mul (e, n)", "is not added to a stream"),
    ],
)
def test_what_is_no_block_stays_and_the_reason_is_named(body: str, reason: str, tmp_path: Path) -> None:
    onnx.save(block(Form(body, UP)), tmp_path / "dense.onnx")
    blocks = find_feed_forward(analyse(tmp_path / "dense.onnx"))
    assert not blocks.blocks and [text for text in blocks.refused.values() if reason in text]


# -- the mixture ------------------------------------------------------------------------------------------


def test_the_tensors_of_a_mixture(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe.onnx"
    expand(dense, out, experts=Experts(3, 2, granularity=2))
    before, after = stored(dense), stored(out)
    assert not {"up0", "down0", "gate1"} & after.keys()
    for expert in range(6):
        part = slice(expert % 2 * FFN // 2, (expert % 2 + 1) * FFN // 2)
        np.testing.assert_array_equal(after["up0.experts"][expert], before["up0"][:, part])
        np.testing.assert_array_equal(after["down1.experts"][expert], 2 * before["down1"][part])
    routers = [array for name, array in after.items() if name.endswith(".router")]
    assert [router.shape for router in routers] == [(HIDDEN, 6)] * 2
    for router in routers:
        np.testing.assert_array_equal(router[:, ::2], router[:, 1::2])
        assert len(np.unique(router)) == 3 * HIDDEN and 0.005 < router.std() < 0.05
    assert not np.array_equal(*routers)


def test_the_seed_decides_the_routers(dense: Path, tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        expand(dense, tmp_path / f"{number}.onnx", experts=Experts(3, 2, seed=seed), check=False)
        results.append((tmp_path / f"{number}.onnx").read_bytes())
    assert results[0] == results[1] != results[2]


def test_experts_of_some_blocks(tmp_path: Path) -> None:
    onnx.save(block(FORMS["plain"], 4), tmp_path / "dense.onnx")
    for where, numbers in (("all", [0, 1, 2, 3]), (2, [1, 3]), ([2, 0], [0, 2])):
        expand(tmp_path / "dense.onnx", tmp_path / "moe.onnx", experts=Experts(2, 1, where=where))
        names = stored(tmp_path / "moe.onnx")
        assert [layer for layer in range(4) if f"up{layer}.experts" in names] == numbers


def test_a_tied_block_stays_tied(tmp_path: Path) -> None:
    """Blocks that read the same weights read the same experts and the same router."""
    model = block(FORMS["plain"], 2)
    for node in model.graph.node:
        node.input[:] = [name.replace("up1", "up0").replace("down1", "down0") for name in node.input]
    onnx.save(model, tmp_path / "dense.onnx")
    expand(tmp_path / "dense.onnx", tmp_path / "moe.onnx", experts=Experts(4, 2))
    names = stored(tmp_path / "moe.onnx")
    assert [name for name in names if "expert" in name and names[name].ndim > 2] == ["up0.experts", "down0.experts"]
    assert sum(name.endswith(".router") for name in names) == 1


def test_deep_and_wide_and_experts_at_once(dense: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "moe.onnx", tmp_path / "again.onnx"
    result = expand(
        dense,
        out,
        1.5,
        layers=3,
        experts=Experts(4, 2, granularity=2),
        strategy=Strategy("noisy-symmetric"),
        precision="float64",
        plan_out=tmp_path / "plan.json",
    )
    assert result.validation is not None and result.validation.equal and result.validation.double
    assert max(output.max_relative for output in result.validation.double) <= 1e-12
    assert [step.name for step in Plan.read(tmp_path / "plan.json").transforms] == ["layers", "experts"]
    assert validate_files(dense, out).equal and validate_files(dense, out, mode="algebraic").equal
    expand(dense, again, 1.5, layers=3, experts=Experts(4, 2, granularity=2), strategy=Strategy("noisy-symmetric"))
    assert out.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", FORMS)
def test_collapse_makes_the_block_of_its_experts(name: str, tmp_path: Path) -> None:
    """Node by node and number by number the dense model comes back: parts in their order, factors divided out."""
    source, big, small = (tmp_path / file for file in ("dense.onnx", "moe.onnx", "small.onnx"))
    onnx.save(block(FORMS[name]), source)
    expand(source, big, experts=Experts(3, 2, granularity=2, shared=True), sizes={"hidden": 12}, check=False)
    result = shrink(big, small, check=False)
    assert result.method == "collapse" and result.is_tied
    graphs = {provenance(source_of(file).model, {})["graph"] for file in (source, small)}
    assert len(graphs) == 1
    before, after = stored(source), stored(small)
    assert before.keys() == after.keys()
    for tensor, array in before.items():
        np.testing.assert_allclose(after[tensor], array, rtol=3e-7, atol=3e-7, err_msg=tensor)


def test_collapse_after_training_gives_the_mean_expert(dense: Path, tmp_path: Path) -> None:
    expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2), layers=3, check=False)
    before, trained = stored(dense), onnx.load(tmp_path / "moe.onnx")
    (tensor,) = [one for one in trained.graph.initializer if one.name == "down0.experts"]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[1] += 1.0
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(trained, tmp_path / "trained.onnx")
    result = shrink(tmp_path / "trained.onnx", tmp_path / "small.onnx")
    after = stored(tmp_path / "small.onnx")
    np.testing.assert_allclose(after["down0"], before["down0"] + 0.25, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(after["up0"], before["up0"])
    untied = {residue.name: residue.residue for residue in result.residues if not residue.is_tied}
    wanted = np.linalg.norm(array - after["down0"]) / np.linalg.norm(array)
    assert untied == {"down0.experts": pytest.approx(wanted, rel=1e-5)}
    assert not result.is_tied and result.validation is None and result.moved


def test_diagnosis_reads_a_mixture(dense: Path, tmp_path: Path) -> None:
    expand(dense, tmp_path / "moe.onnx", 2, experts=Experts(4, 2))
    assert diagnose(tmp_path / "moe.onnx", source=dense).to_json()


def test_a_mixture_that_computes_something_else_is_not_published(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixture is compared with the file, so a transform that is wrong shows."""
    monkeypatch.setattr(transform, "scale_of_down", lambda mixture: 1.0)
    with pytest.raises(ModelsDiffer, match="output y: relative error"):
        expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2, granularity=2))
    assert not (tmp_path / "moe.onnx").exists()


def test_a_plan_that_describes_other_blocks_is_refused(dense: Path, tmp_path: Path) -> None:
    expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2), plan_out=tmp_path / "plan.json")
    (step,) = Plan.read(tmp_path / "plan.json").transforms
    onnx.save(block(FORMS["plain"]), tmp_path / "other.onnx")
    with pytest.raises(BadModel, match="this graph has no such value"):
        analyse(tmp_path / "other.onnx", (step,))


# -- experts that part ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"noise": 0.1}, {"redraw": 0.5}], ids=str)
def test_experts_that_part_are_allowed_and_reported(how: Mapping[str, float], dense: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"experts that part .* change what the model computes: --allow-change"):
        expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2, **how))
    assert not list(tmp_path.iterdir())
    report = expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2, **how), allow_change=True).validation
    assert report is not None and not report.preserves and report.outputs[0].max_relative > 1e-3
    again = expand(dense, tmp_path / "again.onnx", experts=Experts(4, 2, **how), allow_change=True, workers=2)
    assert again.validation and (tmp_path / "moe.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_noise_has_its_level_and_is_another_one_for_each_expert(dense: Path, tmp_path: Path) -> None:
    expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2, noise=0.1), allow_change=True, check=False)
    before, after = stored(dense), stored(tmp_path / "moe.onnx")
    for name in ("up0", "down0", "gate1"):
        noise = after[f"{name}.experts"] - before[name]
        assert 0.08 < noise.std() / before[name].std() < 0.12
        assert np.abs(np.corrcoef(noise.reshape(4, -1)) - np.eye(4)).max() < 0.5


def test_the_same_hidden_units_are_drawn_anew_in_all_weights(dense: Path, tmp_path: Path) -> None:
    """Drop-Upcycling, also with experts that are cut into parts. The shared expert keeps its numbers."""
    wanted = Experts(3, 2, granularity=2, shared=True, redraw=0.5)
    expand(dense, tmp_path / "moe.onnx", experts=wanted, allow_change=True, check=False)
    before, after = stored(dense), stored(tmp_path / "moe.onnx")
    chosen = set()
    for expert in range(6):
        part = slice(expert % 2 * FFN // 2, (expert % 2 + 1) * FFN // 2)
        redrawn = [
            (after["up0.experts"][expert] != before["up0"][:, part]).all(axis=0),
            (after["gate0.experts"][expert] != before["gate0"][:, part]).all(axis=0),
            (after["down0.experts"][expert] != before["down0"][part]).all(axis=1),
        ]
        assert redrawn[0].sum() == 2 and all(np.array_equal(redrawn[0], other) for other in redrawn[1:])
        chosen.add(tuple(redrawn[0]))
    assert len(chosen) > 1
    np.testing.assert_array_equal(after["up0"], before["up0"])
    np.testing.assert_array_equal(after["down0.shared"], before["down0"] / 2)


# -- ONNX Runtime's operator ---------------------------------------------------------------------------

MICROSOFT = {
    "plain": "relu",
    "gated": "swiglu",
    "transposed": "relu",
    "fused, split": None,
    "written-out activation": None,
    "convolutions": "relu",
    "biases": None,
    "biases, tanh": "gelu",
}
"""What the operator calls the function of some forms; None where it does not know the function."""


@pytest.mark.parametrize("name", MICROSOFT)
def test_a_mixture_in_one_node(name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "dense.onnx", tmp_path / "moe.onnx"
    onnx.save(block(FORMS[name]), source)
    wanted = Experts(4, 2, granularity=2, shared=True, operator="microsoft")
    if MICROSOFT[name] is None:
        with pytest.raises(Refused, match=r"--moe-operator microsoft: block 0 .* computes another function"):
            expand(source, out, experts=wanted)
        return
    report = expand(source, out, experts=wanted, sizes={"hidden": 12}).validation
    assert report is not None and report.equal
    (node,) = (node for node in onnx.load(out).graph.node if node.op_type == "MoE")
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes["activation_type"].decode() == MICROSOFT[name] and attributes["k"] == 4


def test_one_node_chooses_as_the_standard_operators_do(dense: Path, tmp_path: Path) -> None:
    """Experts that have parted, in both ways to write a mixture."""
    results = []
    for operator in ("standard", "microsoft"):
        wanted = Experts(4, 2, noise=0.5, operator=operator)  # type: ignore[arg-type]
        expand(dense, tmp_path / f"{operator}.onnx", experts=wanted, allow_change=True, check=False)
        session = ort.InferenceSession(str(tmp_path / f"{operator}.onnx"), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"ids": np.arange(10).reshape(2, 5)})[0])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


# -- more experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"granularity": 2, "shared": True}], ids=str)
def test_a_mixture_gets_more_experts(how: Mapping[str, Any], dense: Path, tmp_path: Path) -> None:
    """Experts that have parted: the right ones must be chosen, with the right gates."""
    first, out = tmp_path / "moe.onnx", tmp_path / "more.onnx"
    expand(dense, first, experts=Experts(4, 2, noise=0.5, **how), allow_change=True, check=False)
    model = onnx.load(first)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".router"):  # scores so far apart that the choice matters
            array = 30 * onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    del model.metadata_props[:]
    onnx.save(model, first)
    result = expand(first, out, 2, more_experts=2, precision="float64")
    assert result.validation is not None and result.validation.equal and result.validation.double
    assert max(output.max_relative for output in result.validation.double) <= 1e-12
    parts = how.get("granularity", 1)
    assert result.to_json()["experts"] == [{"blocks": 2, "experts": 8 * parts, "chosen": 4 * parts}]
    assert stored(out)["up0.experts"].shape[0] == 8 * parts


def test_a_mixture_becomes_deeper_and_wider(dense: Path, tmp_path: Path) -> None:
    """A new layer adds nothing if the second weights of its experts, the shared one included, are zero."""
    expand(dense, tmp_path / "moe.onnx", experts=Experts(4, 2, noise=0.3, shared=True), allow_change=True, check=False)
    model = onnx.load(tmp_path / "moe.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "source.onnx")
    report = expand(tmp_path / "source.onnx", tmp_path / "big.onnx", 2, layers=3).validation
    assert report is not None and report.equal
    after = stored(tmp_path / "big.onnx")
    assert not after["down2.experts"].any() and after["up2.experts"].any()


def test_experts_of_the_runtimes_operator(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    result = expand(zoo("gpt_oss_runtime.built"), tmp_path / "more.onnx", more_experts=2)
    assert result.validation is not None and result.validation.equal
    assert result.to_json()["experts"] == [{"blocks": 2, "experts": 10, "chosen": 6}]


def test_experts_that_are_nodes_of_their_own_are_refused(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"experts that TopK .* chooses cannot be multiplied: .* does not treat all experts"
    ):
        expand(zoo("mixtral.built"), tmp_path / "more.onnx", more_experts=2)
    assert not list(tmp_path.iterdir())


def test_more_experts_of_a_dense_model(dense: Path, tmp_path: Path, cli: Command) -> None:
    result = cli("expand", dense, "--more-experts", "2", "-o", tmp_path / "more.onnx")
    assert result.code == 2 and "this graph has no mixture of experts" in result.stderr
    assert not list(tmp_path.iterdir())


# -- parts of tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_any_bytes_of_a_part(kind: Any, scale: float, tmp_path: Path) -> None:
    """Bytes that are read by pieces are those of the whole, also of pieces that begin inside a number."""
    array = np.random.default_rng(0).standard_normal((6, 12)).astype(kind)
    whole = ir.Tensor(array, name="w")
    for shape, run, rows in (((6, 4), 4, array.reshape(6, 3, 4)), ((2, 12), 24, array.reshape(1, 3, 24))):
        for number in range(3):
            tensor = PartTensor(whole, Part(shape, number, 3, run, scale))
            wanted = (rows[:, number].reshape(shape).astype(np.float64) * scale).astype(kind)
            np.testing.assert_array_equal(tensor.numpy(), wanted)
            content = np.ascontiguousarray(wanted).view(np.uint8).reshape(-1)
            bytes_of = stored_rows.StoredRows(tensor, 1, tensor.nbytes)
            for start in (0, 3, 17):
                for count in (1, 9, content.size - start):
                    got = bytes_of.read_bytes(start, count, Scratch())
                    np.testing.assert_array_equal(got, content[start : start + count])
    with pytest.raises(ValueError, match="has no part"):
        PartTensor(whole, Part((5, 5)))


# -- requests ---------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"number": 4, "top_k": 5}, "--top-k 5 chooses more experts than the 4 of --experts"),
    ({"number": 0, "top_k": 1}, "number is 0: give a whole number from 1 on"),
    ({"number": 4, "top_k": 2, "granularity": 3}, "--granularity 3 does not divide the 8 hidden units of block 0"),
    ({"number": 4, "top_k": 2, "where": [0, 7]}, "--experts-in names block 7; the feed-forward blocks .* are 0 to 1"),
    ({"number": 4, "top_k": 2, "noise": -1.0}, "--expert-noise -1.0 is no level: give a number from 0 on"),
    ({"number": 4, "top_k": 2, "redraw": 1.5}, "--drop-upcycle 1.5 is no ratio: give a number from 0 to 1"),
    ({"number": 4, "top_k": 2, "where": 3}, "--experts-in takes every 3 blocks, and this graph has 2"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_request_that_does_not_fit(options: Mapping[str, Any], message: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=message):
        expand(dense, tmp_path / "moe.onnx", experts=Experts(**options))
    assert not list(tmp_path.iterdir())


def test_a_graph_without_blocks(tmp_path: Path) -> None:
    text = f"g (float[b, {HIDDEN}] x) => (float[b, 3] y) {{ y = MatMul (x, w) }}"
    onnx.save(build_model(text, normal(1, {"w": (HIDDEN, 3)})), tmp_path / "linear.onnx")
    with pytest.raises(BadRequest, match=r"linear.onnx: .*this graph has no feed-forward block"):
        expand(tmp_path / "linear.onnx", tmp_path / "moe.onnx", experts=Experts(4, 2))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--experts 4", 2, "--experts needs --top-k"),
        ("--factor 2 --top-k 2", 2, "--top-k says how --experts makes experts: give --experts too"),
        ("--factor 2 --shared-expert", 2, "--shared-expert says how --experts makes experts"),
        ("--experts 4 --top-k 2 --experts-in some", 2, "write all, 'every 2', or numbers of feed-forward blocks"),
        ("--experts 4 --top-k 9", 2, "--top-k 9 chooses more experts"),
    ],
)
def test_a_command_line_that_is_wrong(
    options: str, code: int, message: str, dense: Path, tmp_path: Path, cli: Command
) -> None:
    result = cli(*f"expand {dense} -o {tmp_path / 'moe.onnx'} {options}".split())
    assert result.code == code and message in " ".join(result.stderr.split()) and not list(tmp_path.iterdir())


def test_the_command_and_the_recipe_file_mean_the_same(dense: Path, tmp_path: Path, cli: Command) -> None:
    first, second, recipe = (tmp_path / name for name in ("a.onnx", "b.onnx", "r.yaml"))
    options = ["--experts", "4", "--top-k", "2", "--experts-in", "every 2", "--granularity", "2", "--shared-expert"]
    result = cli("expand", str(dense), "-o", str(first), *options, "--write-recipe", str(recipe), "--json")
    assert json.loads(result.stdout)["experts"] == [{"blocks": 1, "experts": 8, "chosen": 4}]
    shown = cli("expand", str(dense), "-o", str(second), "--recipe", str(recipe)).stdout
    assert "experts: feed-forward block with 8 experts, 4 chosen for a token" in " ".join(shown.split())
    assert first.read_bytes() == second.read_bytes()


# -- the zoo ----------------------------------------------------------------------------------------------


WITHOUT_BLOCKS = {
    "gpt_oss": "it has experts already",
    "jamba": "it has experts already, and state spaces",
    "mamba": "it has state spaces",
    "mamba_loop": "it has state spaces",
    "mixtral": "it has experts already",
    "olmoe": "it has experts already",
    "opt.extended": "one node makes the hidden units and computes their function",
    "qwen3_moe": "it has experts already",
    "resnet": "convolutions of several places",
}
"""The zoo graphs without blocks that become experts, and why: by name, or by family."""


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("name", zoo_store.names())
def test_experts_of_the_zoo(name: str, granularity: int, tmp_path: Path) -> None:
    source = tmp_path / "dense.onnx"
    onnx.save(zoo_store.load(name), source)
    wanted = Experts(8, 2, granularity=granularity)
    try:
        wanted.step(analyse(source))
    except (BadRequest, Refused):
        assert name.split(".")[0] in WITHOUT_BLOCKS or name in WITHOUT_BLOCKS
        return
    report = expand(source, tmp_path / "moe.onnx", experts=wanted, device="cpu").validation
    assert report is not None and report.equal
