"""Growth undone: the small model comes back from a grown file alone, and training shows as a residue."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Outcome, build_model, names_in, normal, perceptron, with_adapter
from test_layers import blocks

from hyperclone_onnx import (
    BadRequest,
    Experts,
    ModelsDiffer,
    Plan,
    Refused,
    analyse,
    expand,
    plan_expansion,
    rewrite,
    shrink,
)
from hyperclone_onnx.diagnosis import diagnose
from hyperclone_onnx.plan.plans import METADATA_KEY, TransformStep
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.rewriting.source_record import METADATA_KEY as SOURCE_KEY
from hyperclone_onnx.rewriting.source_record import SourceRecord, record_source, steps_kept
from hyperclone_onnx.shrinking import collapse as collapsing
from hyperclone_onnx.shrinking.collapse import collapse
from hyperclone_onnx.shrinking.residue import residues
from hyperclone_onnx.tensors.collapsed import CollapsedTensor
from hyperclone_onnx.transforms.layers import step_for
from hyperclone_onnx.transforms.source import source_of
from models import zoo_store

Array = np.ndarray[Any, Any]
GROWTHS: dict[str, dict[str, Any]] = {
    **{f"x2 {name}": {"factor": 2, "strategy": name} for name in ("symmetric", "diagonal")},
    **{f"x3 {name}": {"factor": 3, "strategy": name} for name in ("noisy-symmetric", "noisy-diagonal")},
    "x1.5": {"factor": 1.5},
    "x2 fpi": {"factor": 2, "strategy": "fpi"},
    "x2 aki": {"factor": 2, "strategy": "aki", "allow_change": True},
    "x2 copy-fresh": {"factor": 2, "strategy": "copy-fresh", "allow_change": True},
    "x2 untied": {"factor": 2, "untie": True},
    "x1.5 untied": {"factor": 1.5, "untie": True},
}


def collapsed(
    model: onnx.ModelProto, layers: int | None = None, experts: Experts | None = None, **growth: Any
) -> tuple[ir.Model, ir.Model, ir.Model]:
    """A source, what it grows into, and what that collapses into. No file is written, and nothing is run."""
    source = source_of(model).model
    step = None if layers is None else step_for(source_of(model).model, layers)
    steps: list[TransformStep] = [] if step is None else [step]
    if experts is not None:
        steps.append(experts.step(analyse(model, steps)))
    analysis = analyse(model, steps)
    plan = plan_expansion(analysis, **growth)
    big = rewrite(analysis.model, plan)
    record = record_source(source if steps else analysis.model, analysis.model, plan, big)
    assert record is not None
    again = SourceRecord.loads(record.dumps())
    return source, big, collapse(Path("big.onnx"), big, plan, again).model


def assert_same(source: ir.Model, small: ir.Model, eps: float) -> None:
    """The graphs are the same, node by node, and the tensors are equal but for rounding."""
    assert provenance(small, {})["graph"] == provenance(source, {})["graph"]
    assert small.graph.initializers.keys() == source.graph.initializers.keys()
    for name, value in source.graph.initializers.items():
        want, got = (model.graph.initializers[name].const_value for model in (source, small))
        assert want is not None and got is not None
        assert want.dtype == got.dtype and want.shape == got.shape
        if not want.dtype.is_floating_point():
            assert np.array_equal(want.numpy(), got.numpy())
            continue
        a, b = (np.asarray(tensor.numpy(), dtype=np.float64) for tensor in (want, got))
        with np.errstate(invalid="ignore"):
            apart = np.where(a == b, 0.0, np.abs(a - b))
        assert apart.max(initial=0) <= eps * np.abs(a[np.isfinite(a)]).max(initial=0), name
        assert value.name == name


@pytest.mark.parametrize("how", GROWTHS)
@pytest.mark.parametrize("tied", [False, True])
def test_collapse_undoes_growth(how: str, tied: bool) -> None:
    source, _, small = collapsed(perceptron(tied=tied), **GROWTHS[how])
    assert_same(source, small, 4e-7)


@pytest.mark.parametrize(("dtype", "eps"), [("float16", 1e-3), ("double", 2e-15)])
@pytest.mark.parametrize("factor", [2, 1.5])
def test_collapse_is_as_exact_as_the_type(dtype: str, eps: float, factor: float) -> None:
    source, _, small = collapsed(perceptron(dtype=dtype), factor=factor)
    assert_same(source, small, eps)


@pytest.mark.parametrize("growth", [{}, {"factor": 2}, {"factor": 1.5}])
def test_collapse_undoes_depth(growth: dict[str, Any]) -> None:
    source, big, small = collapsed(blocks("aaa"), layers=5, **({"factor": 1} | growth))
    assert len(big.graph) > len(source.graph)
    assert_same(source, small, 4e-7)


@pytest.mark.parametrize("name", ["gpt2.distinct", "phi3.fused", "bert.distinct", "t5_encoder.torchscript"])
@pytest.mark.parametrize("factor", [2, 1.5])
def test_collapse_undoes_edits_of_whole_families(name: str, factor: float) -> None:
    """Sizes in attributes and inputs, inserted products, norms that are written out: all of it is undone."""
    source, big, small = collapsed(zoo_store.load(name), factor=factor)
    assert provenance(big, {})["graph"] != provenance(source, {})["graph"]
    assert_same(source, small, 1e-6)


def test_defaults_of_inputs_come_back() -> None:
    source, _, small = collapsed(with_adapter(4), factor=2)
    assert [value.name for value in small.graph.inputs] == [value.name for value in source.graph.inputs]
    assert small.graph.initializers["a"].const_value.shape == (12, 4)  # type: ignore[union-attr]


def test_a_wrong_weight_of_the_way_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: copies that are added where their mean is due."""
    block = CollapsedTensor._narrowed
    monkeypatch.setattr(CollapsedTensor, "_narrowed", lambda self, rows: 1.001 * block(self, rows))
    source, _, small = collapsed(perceptron(), factor=2)
    with pytest.raises(AssertionError):
        assert_same(source, small, 4e-7)


def test_the_last_transforms_are_undone() -> None:
    separate, layers = TransformStep("separate"), TransformStep("layers")
    assert steps_kept((separate, layers)) == (separate,)
    assert steps_kept((layers, separate)) == (layers, separate)
    assert steps_kept((layers, layers)) == ()


# -- files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grown file. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("grown")
    onnx.save(perceptron(), folder / "small.onnx")
    expand(folder / "small.onnx", folder / "big.onnx", 2, check=False)
    return folder / "big.onnx"


def stored(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def trained(path: Path, out: Path, change: Callable[[str, Array], Array]) -> Path:
    """A copy of a model with other floating-point weights."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and ".scale" not in tensor.name:
            changed = change(tensor.name, array).astype(array.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, out)
    return out


def without(path: Path, out: Path, *keys: str) -> Path:
    """A copy of a model without entries of its metadata."""
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key not in keys]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, out)
    return out


def test_the_command_collapses_a_file(grown: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    outcome = cli("shrink", grown, "-o", tmp_path / "small.onnx", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["tied"] and report["validation"]["equal"]
    assert {(size["role"], size["from"], size["to"]) for size in report["sizes"]} >= {("hidden", 24, 12)}
    source = stored(grown.with_name("small.onnx"))
    small = stored(tmp_path / "small.onnx")
    assert small.keys() == source.keys()
    assert all(np.allclose(small[name], source[name], rtol=0, atol=1e-6) for name in source)


def test_training_shows_as_a_residue(grown: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    """Every weight moves by noise of a known size: the residue of a tensor is about that, its clones being several."""
    rng = np.random.default_rng(0)
    big = trained(grown, tmp_path / "big.onnx", lambda _, a: a + 0.1 * rng.standard_normal(a.shape) * a.std())
    result = shrink(big, tmp_path / "small.onnx", device="cpu")
    assert not result.is_tied and result.validation is None
    of = {residue.name: residue.residue for residue in result.residues}
    assert 0.05 < of["up.0"] < 0.15
    assert result.moved and result.moved[0].max_relative > 1e-4
    assert "equal" not in result.verdict
    seen = diagnose(big, activations=False, ranks=False)
    assert seen.residue == pytest.approx(result.residue)
    assert {tensor.name: tensor.residue for tensor in seen.tensors}["up.0"] == of["up.0"]
    outcome = cli("shrink", big, "-o", tmp_path / "again.onnx", "--device", "cpu")
    assert outcome.code == 0 and "parted" in outcome.stdout and "equal" not in outcome.stdout


def test_the_mean_of_parted_clones(grown: Path, tmp_path: Path) -> None:
    """A change that adds up to zero over the shares, and to zero over the copies, is not in the small model."""
    plan = Plan.carried_by({entry.key: entry.value for entry in onnx.load(grown).metadata_props})
    assert plan is not None and plan.tensors["up.0"].shared == ((0, 0),)
    signs = np.where(np.arange(24) < 12, 1.0, -1.0)[:, None]
    big = trained(grown, tmp_path / "big.onnx", lambda name, a: a + 0.5 * signs if name == "up.0" else a)
    result = shrink(big, tmp_path / "small.onnx", check=False)
    assert [residue.name for residue in result.residues if not residue.is_tied] == ["up.0"]
    small = stored(tmp_path / "small.onnx")["up.0"]
    assert np.allclose(small, stored(grown.with_name("small.onnx"))["up.0"], rtol=0, atol=1e-6)


def test_tensors_that_training_untied_stay_several(tmp_path: Path) -> None:
    onnx.save(perceptron(tied=True), tmp_path / "small.onnx")
    expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, untie=True, check=False)
    before = shrink(tmp_path / "big.onnx", tmp_path / "again.onnx", device="cpu")
    assert before.is_tied and before.validation is not None and before.validation.equal
    plan = before.plan
    second = next(name for name in plan.tensors if name not in stored(tmp_path / "small.onnx"))
    big = trained(tmp_path / "big.onnx", tmp_path / "trained.onnx", lambda name, a: a * (1.5 if name == second else 1))
    result = shrink(big, tmp_path / "both.onnx", device="cpu")
    assert result.apart == (second,)
    assert result.moved[0].max_relative < 1e-5  # nothing was lost: both tensors are there


def test_trained_new_layers_are_left_out(tmp_path: Path) -> None:
    onnx.save(blocks("aa"), tmp_path / "small.onnx")
    expand(tmp_path / "small.onnx", tmp_path / "big.onnx", layers=3, check=False)
    untrained = shrink(tmp_path / "big.onnx", tmp_path / "again.onnx", device="cpu")
    assert untrained.layers == {"layers": (3, 2)}
    assert untrained.validation is not None and untrained.validation.equal
    new = set(stored(tmp_path / "big.onnx")) - set(stored(tmp_path / "small.onnx"))
    big = trained(tmp_path / "big.onnx", tmp_path / "trained.onnx", lambda name, a: a + 0.1 if name in new else a)
    result = shrink(big, tmp_path / "without.onnx", device="cpu")
    assert "new layers" in result.notes[0]
    assert result.moved[0].max_relative > 1e-3


def test_a_small_model_that_differs_is_not_published(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor_back = collapsing._tensor_back

    def wrong(path: Path, model: ir.Model, plan: Plan, source: str, made: str) -> ir.TensorProtocol:
        tensor = tensor_back(path, model, plan, source, made)
        return ir.Tensor(tensor.numpy() * 1.01, name=source) if source == "down.1" else tensor

    monkeypatch.setattr(collapsing, "_tensor_back", wrong)
    with pytest.raises(ModelsDiffer, match=r"down\.1"):
        shrink(grown, tmp_path / "small.onnx", device="cpu")
    assert names_in(tmp_path) == set()


def test_shards_and_workers_give_the_same_numbers(grown: Path, tmp_path: Path) -> None:
    one = shrink(grown, tmp_path / "one.onnx", check=False)
    several = shrink(grown, tmp_path / "several.onnx", check=False, max_shard_size=2000, workers=2)
    assert len(several.files) > 2 and one.residue == several.residue
    first, second = stored(tmp_path / "one.onnx"), stored(tmp_path / "several.onnx")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_without_the_record_the_small_model_gives_the_graph(grown: Path, tmp_path: Path) -> None:
    big = without(grown, tmp_path / "big.onnx", SOURCE_KEY)
    with pytest.raises(BadRequest, match="does not carry the graph of its source"):
        shrink(big, tmp_path / "small.onnx")
    zeros = trained(grown.with_name("small.onnx"), tmp_path / "zeros.onnx", lambda _, a: np.zeros_like(a))
    result = shrink(big, tmp_path / "small.onnx", source=zeros, device="cpu")
    assert result.is_tied
    assert np.allclose(stored(tmp_path / "small.onnx")["up.0"], stored(grown.with_name("small.onnx"))["up.0"])


def test_a_model_in_memory(grown: Path) -> None:
    result = shrink(onnx.load(grown), check=False)
    assert isinstance(result.model, onnx.ModelProto) and result.output is None
    assert "Shrinkage" in repr(result)


def _torn(path: Path, out: Path, key: str) -> Path:
    model = onnx.load(path)
    next(entry for entry in model.metadata_props if entry.key == key).value = "AAAA"
    onnx.save(model, out)
    return out


BAD: Mapping[str, tuple[Callable[[Path, Path], list[str]], int, str]] = {
    "no plan": (lambda big, _: [str(big.with_name("small.onnx"))], 2, "it carries no plan"),
    "no file": (lambda _, tmp: [str(tmp / "none.onnx")], 4, "no such file"),
    "torn plan": (lambda big, tmp: [str(_torn(big, tmp / "torn.onnx", METADATA_KEY))], 4, "its metadata holds"),
    "torn record": (lambda big, tmp: [str(_torn(big, tmp / "torn.onnx", SOURCE_KEY))], 4, "a malformed record"),
    "another source": (
        lambda big, tmp: [str(big), "--source", str(_other(tmp / "other.onnx"))],
        2,
        "the plan is for another model",
    ),
    "itself": (lambda big, tmp: [str(_copy(big, tmp)), "-o", str(tmp / "big.onnx")], 2, "overwrite the source"),
}


def _other(path: Path) -> Path:
    onnx.save(perceptron(hidden=8), path)
    return path


def _copy(path: Path, folder: Path) -> Path:
    (folder / "big.onnx").write_bytes(path.read_bytes())
    return folder / "big.onnx"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str, grown: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    arguments, code, why = BAD[case]
    given = arguments(grown, tmp_path)
    before = names_in(tmp_path)
    outcome = cli("shrink", *given, *([] if "-o" in given else ["-o", str(tmp_path / "out.onnx")]))
    assert (outcome.code, why in outcome.error) == (code, True), outcome.stderr
    assert names_in(tmp_path) == before


def test_a_law_that_does_not_keep_sums_cannot_be_undone() -> None:
    from hyperclone_onnx.plan import strategies

    class Doubled(strategies.Law):
        name = "doubled"
        preserves = False
        shares_equally = True

    strategies.register(Doubled())
    try:
        with pytest.raises(Refused, match="does not keep sums"):
            collapsed(perceptron(), factor=2, strategy="doubled", allow_change=True)
    finally:
        del strategies._laws["doubled"]


def test_quantised_codes_come_back() -> None:
    """Codes are copied and scales are divided: the first copy of a code, and the scale times the repeats."""
    rng = np.random.default_rng(3)
    shapes = {"gain": (8,), "scale": (6,), "head": (6, 8)}
    weights = {name: array.astype(np.float32) for name, array in normal(2, shapes).items()}
    weights["codes"] = rng.integers(-100, 100, (8, 6), dtype=np.int8)
    weights["zero"] = np.zeros(6, dtype=np.int8)
    model = build_model(
        """g (float[n, 8] x) => (float[n, 8] y) {
            a = LayerNormalization (x, gain)
            w = DequantizeLinear <axis = 1> (codes, scale, zero)
            h = MatMul (a, w)
            r = Relu (h)
            y = MatMul (r, head)
        }""",
        weights,
    )
    source, big, small = collapsed(model, factor=2)
    assert big.graph.initializers["codes"].const_value.shape != (8, 6)  # type: ignore[union-attr]
    assert_same(source, small, 4e-7)


def test_residues_of_untrained_clones_are_rounding() -> None:
    for strategy in ("symmetric", "noisy-diagonal"):
        analysis = analyse(perceptron())
        plan = plan_expansion(analysis, 3, strategy=strategy)
        found = residues(rewrite(analysis.model, plan), plan)
        assert found and all(residue.is_tied for residue in found)


# -- the zoo ----------------------------------------------------------------------------------------------

ZOO: dict[str, dict[str, Any]] = {
    "x2": {"factor": 2, "strategy": "noisy-diagonal"},
    "x3": {"factor": 3, "strategy": "symmetric"},
    "x1.5": {"factor": 1.5, "strategy": "noisy-symmetric"},
    "x2 diagonal": {"factor": 2, "strategy": "diagonal"},
    "deep": {"factor": 2, "layers": "x2"},
    "experts": {"factor": 2, "experts": Experts(4, 2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ZOO)
@pytest.mark.parametrize("name", zoo_store.names())
def test_collapse_undoes_growth_in_the_zoo(name: str, how: str) -> None:
    model, growth = zoo_store.load(name), dict(ZOO[how])
    if growth.pop("layers", None):
        from hyperclone_onnx.transforms.layers import stacks_of

        stacks = stacks_of(source_of(model).model)
        if len(stacks) != 1:
            pytest.skip("no layers, or several stacks")
        growth["layers"] = 2 * stacks[0].layers
    try:
        source, _, small = collapsed(model, **growth)
    except (BadRequest, Refused) as problem:
        pytest.skip(str(problem))
    assert_same(source, small, 2e-6)
