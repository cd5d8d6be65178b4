"""Validation: it passes what is equal, and each of its checks can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hyperclone_onnx import BadRequest, ModelsDiffer, Strategy, expand, expansion, validate_files
from hyperclone_onnx.plan import METADATA_KEY, Plan
from hyperclone_onnx.sessions import providers

Zoo = Callable[[str], Path]
Edit = Callable[[np.ndarray], None]


@pytest.fixture
def pair(zoo: Zoo, tmp_path: Path) -> tuple[Path, Path]:
    """A source and its grown model."""
    big = tmp_path / "big.onnx"
    expand(zoo("llama.distinct"), big, 2)
    return zoo("llama.distinct"), big


def change(path: Path, edit: Edit, wanted: Callable[[np.ndarray], bool] = lambda array: array.ndim == 2) -> str:
    """Edit the first stored floating-point tensor that is wanted; its name."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.dtype == np.float32 and wanted(array):
            edit(array)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            onnx.save(model, path)
            return tensor.name
    raise AssertionError("no tensor was wanted")


def one_percent(array: np.ndarray) -> None:
    at = np.unravel_index(np.abs(array).argmax(), array.shape)
    array[at] *= 1.01


def swap_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


def one_ulp(array: np.ndarray) -> None:
    array.flat[0] = np.nextafter(array.flat[0], np.float32(np.inf))


EDITS: dict[str, tuple[Edit, Callable[[np.ndarray], bool]]] = {
    "one weight by 1%": (one_percent, lambda array: array.ndim == 2 and array.shape[0] == 96),
    "two rows swapped": (swap_rows, lambda array: array.ndim == 2 and array.shape[0] == 96),
    "a norm's gain by one ulp": (one_ulp, lambda array: array.shape == (96,)),
    "a weight that is not finite": (lambda array: array.__setitem__((0, 0), np.nan), lambda array: array.ndim == 2),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_changed_tensor_is_noticed_and_named(case: str, pair: tuple[Path, Path]) -> None:
    assert validate_files(*pair, device="cpu").equal
    name = change(pair[1], *EDITS[case])
    result = validate_files(*pair, device="cpu")
    assert not result.equal and any(name in problem for problem in result.problems)


def test_without_a_plan_the_outputs_still_tell(pair: tuple[Path, Path]) -> None:
    model = onnx.load(pair[1])
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, pair[1])
    result = validate_files(*pair, device="cpu")
    assert result.equal and result.tensors is None and any("no plan" in note for note in result.notes)
    change(pair[1], lambda array: array.__imul__(1.5), lambda array: array.shape == (96,))
    assert not validate_files(*pair, device="cpu").equal


def test_the_tolerance_says_where_it_comes_from(pair: tuple[Path, Path]) -> None:
    result = validate_files(*pair, device="cpu")
    assert 1e-7 < result.tolerance < 1e-4
    assert "eps 1.2e-07" in result.tolerance_reason and "residue" in result.tolerance_reason
    assert result.provider == "CPUExecutionProvider" and len(result.cases) == 3
    assert result.outputs[0].top1_agreement == 1.0 and result.outputs[0].kl_divergence is not None


def test_a_wrong_plan_is_not_published(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit is dropped on the way: the graph is wrong, and no file appears."""
    plan_expansion = expansion.plan_expansion

    def forgetful(*arguments: object, **options: object) -> Plan:
        plan = plan_expansion(*arguments, **options)  # type: ignore[arg-type]
        return Plan(**{**vars(plan), "edits": plan.edits[1:]})

    monkeypatch.setattr(expansion, "plan_expansion", forgetful)
    with pytest.raises(ModelsDiffer):
        expand(zoo("llama.distinct"), tmp_path / "big.onnx", 2)
    assert list(tmp_path.iterdir()) == []


def test_double_precision_finds_what_single_hides(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that is wrong by 1e-9 is rounding in float32, and an error in float64."""
    plan_expansion = expansion.plan_expansion

    def scaled(*arguments: object, **options: object) -> Plan:
        plan = plan_expansion(*arguments, **options)  # type: ignore[arg-type]
        name, recipe = next((n, r) for n, r in plan.tensors.items() if r.shared)
        wrong = type(recipe)(recipe.source, recipe.axes, recipe.shared, 1 + 1e-9)
        return Plan(**{**vars(plan), "tensors": {**plan.tensors, name: wrong}})

    monkeypatch.setattr(expansion, "plan_expansion", scaled)
    source, out = zoo("llama.distinct"), tmp_path / "big.onnx"
    assert expand(source, out, 2, strategy=Strategy("noisy-diagonal", 0.0)).validation is not None
    with pytest.raises(ModelsDiffer, match="float64"):
        expand(source, tmp_path / "other.onnx", 2, precision="float64")


def test_providers() -> None:
    cpu, cuda = "CPUExecutionProvider", ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert providers("auto", [cuda[0], cpu]) == [cuda, cpu]
    assert providers("cuda", [cuda[0], cpu]) == [cuda, cpu]
    assert providers("cpu", [cuda[0], cpu]) == [cpu]
    assert providers("auto", [cpu]) == [cpu]
    with pytest.raises(BadRequest, match=r"hyperclone-onnx\[cuda\]"):
        providers("cuda", [cpu])


@pytest.mark.gpu
def test_on_cuda(zoo: Zoo, tmp_path: Path) -> None:
    for name in ("llama.distinct", "bert.distinct", "gpt2.distinct"):
        report = expand(zoo(name), tmp_path / f"{name}.onnx", 2, device="cuda")
        assert report.validation is not None and report.validation.provider == "CUDAExecutionProvider"
        print(name, [(each.name, each.max_relative) for each in report.validation.outputs])
