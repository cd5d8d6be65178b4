"""The strategies of bert2BERT: `fpi` is the symmetric law, `aki` takes extra outputs from the next layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Array, Command, names_in, perceptron

from hyperclone_onnx import BadRequest, Plan, Refused, Strategy, analyse, expand, plan_expansion, validate_files
from hyperclone_onnx.plan.maps import FirstAndFurther

Zoo = Callable[[str], Path]


def tensors(path: Path) -> dict[str, Array]:
    """The stored tensors of a file, by name."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_fpi_is_the_symmetric_law(small: Path, tmp_path: Path) -> None:
    for name in ("fpi", "symmetric"):
        expand(small, tmp_path / f"{name}.onnx", 3, strategy=Strategy(name), device="cpu")
    fpi, symmetric = tensors(tmp_path / "fpi.onnx"), tensors(tmp_path / "symmetric.onnx")
    assert fpi.keys() == symmetric.keys()
    assert all(np.array_equal(fpi[name], symmetric[name]) for name in fpi)


@pytest.mark.parametrize("factor", [2, 3])
def test_aki_takes_extra_outputs_from_the_next_layer(small: Path, tmp_path: Path, factor: int) -> None:
    out = tmp_path / "big.onnx"
    report = expand(small, out, factor, strategy=Strategy("aki"), allow_change=True, device="cpu")
    source, grown = tensors(small), tensors(out)
    extra = factor - 1
    assert np.array_equal(grown["bias.0"], np.concatenate([source["bias.0"], *[source["bias.1"]] * extra]))
    for name, other in (("up.0", "up.1"), ("down.0", "down.1"), ("up.1", "up.1"), ("down.1", "down.1")):
        both = np.concatenate([source[name], *[source[other]] * extra], axis=1)
        np.testing.assert_allclose(grown[name], np.tile(both, (factor, 1)) / factor, rtol=1e-6)
    assert report.validation is not None
    assert not report.validation.problems
    assert not report.validation.equal


def test_aki_grows_to_a_size_that_is_no_multiple(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    strategy = Strategy("aki")
    report = expand(small, out, sizes={"ffn": 50}, strategy=strategy, allow_change=True, device="cpu")
    source, grown = tensors(small), tensors(out)
    assert np.array_equal(grown["bias.0"], np.concatenate([source["bias.0"], source["bias.1"], source["bias.1"][:10]]))
    assert np.array_equal(grown["up.0"], np.concatenate([source["up.0"], source["up.1"], source["up.1"][:, :10]], 1))
    assert np.array_equal(grown["up.1"], np.concatenate([source["up.1"], source["up.1"], source["up.1"][:, :10]], 1))
    copies = np.array([3] * 10 + [2] * 10)[:, None]
    shares = (source["down.0"] / copies)[np.arange(50) % 20]
    np.testing.assert_allclose(grown["down.0"], shares, rtol=1e-6)
    assert report.validation is not None
    assert not report.validation.problems
    assert Plan.loads(report.plan.dumps()) == report.plan


def test_aki_keeps_the_stretch_of_a_normalised_stream(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    sizes = {"hidden": 53}
    report = expand(zoo("llama.distinct"), out, sizes=sizes, strategy=Strategy("aki"), allow_change=True, device="cpu")
    assert report.validation is not None
    assert not report.validation.problems
    (hidden,) = [dim.map for dim in report.plan.dims.values() if dim.role == "hidden"]
    source, grown = tensors(zoo("llama.distinct")), tensors(out)
    checked = 0
    for name, recipe in report.plan.tensors.items():
        if len(recipe.sources) == 2:
            first, second = (source[tensor] for tensor in recipe.sources)
            (axis,) = [n for n, factors in enumerate(recipe.axes) if isinstance(factors[0], FirstAndFurther)]
            if recipe.shared or first.shape[axis] != hidden.size:
                continue
            power = recipe.axes[axis][0].power
            both = np.concatenate([first, second.take(range(hidden.grown - hidden.size), axis)], axis)
            shape = [-1 if n == axis else 1 for n in range(both.ndim)]
            np.testing.assert_allclose(grown[name], both * (hidden.stretch**power).reshape(shape), rtol=1e-5)
            checked += power != 0
    assert checked >= 2, "writers of the stream and gains of norms"


def test_aki_needs_to_be_allowed_and_reports_how_far_outputs_moved(small: Path, tmp_path: Path, cli: Command) -> None:
    command = ("expand", small, "--factor", "2", "--strategy", "aki", "-o", tmp_path / "big.onnx")
    outcome = cli(*command)
    assert outcome.code == 2
    assert "the strategy 'aki' changes what the model computes: --allow-change" in outcome.stderr
    assert not names_in(tmp_path)
    lines = cli(*command, "--allow-change").stdout.splitlines()
    assert any(line.split() == ["output", "max", "abs", "max", "rel", "top-1", "KL"] for line in lines)
    assert any(line.startswith("the strategy changes the function: outputs moved by up to") for line in lines)
    assert any(line.startswith("3 of ") and "take their extra outputs from the next layer" in line for line in lines)
    assert "equal" not in lines


def test_a_tensor_that_is_not_as_planned_is_noticed(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    expand(small, out, 2, strategy=Strategy("aki"), allow_change=True, device="cpu")
    assert not validate_files(small, out, "cpu").problems
    model = onnx.load(out)
    (up,) = [tensor for tensor in model.graph.initializer if tensor.name == "up.0"]
    array = onnx.numpy_helper.to_array(up).copy()
    array[3, 25] *= 1.01
    up.CopyFrom(onnx.numpy_helper.from_array(array, "up.0"))
    onnx.save(model, out)
    assert any("up.0" in problem for problem in validate_files(small, out, "cpu").problems)


def test_a_model_of_grouped_attention(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    report = expand(zoo("llama.distinct"), out, 2, strategy=Strategy("aki"), allow_change=True, device="cpu")
    assert report.validation is not None
    assert not report.validation.problems
    joined = [name for name, recipe in report.plan.tensors.items() if len(recipe.sources) == 2]
    assert len(joined) == 9, "seven weights and two norms of the first of two layers"


def test_models_without_a_next_layer(tmp_path: Path, small: Path) -> None:
    onnx.save(perceptron(layers=1), tmp_path / "one.onnx")
    with pytest.raises(Refused, match="this graph has no layers whose tensors can take them"):
        plan_expansion(analyse(tmp_path / "one.onnx"), 2, strategy=Strategy("aki"), allow_change=True)
    with pytest.raises(BadRequest, match="changes what the model computes"):
        plan_expansion(analyse(small), 2, strategy=Strategy("aki"))
