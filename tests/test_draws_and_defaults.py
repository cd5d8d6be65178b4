"""Models that draw random numbers, and inputs that have a default: both are compared, and mistakes in both show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, normal, with_adapter
from onnx import helper, numpy_helper

from hyperclone_onnx import expand, validate_files
from hyperclone_onnx.errors import BadRequest

Array = np.ndarray[Any, Any]


def change(path: Path, name: str, edit: Callable[[Array], Array]) -> None:
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, path)


# -- random numbers ---------------------------------------------------------------------------------------

DRAWS = {
    "uniform": "n = RandomUniformLike (r)",
    "normal": "n = RandomNormalLike <dtype = 1> (r)",
    "of a fixed shape": "n = RandomNormal <shape = [1, 1, 1]> ()",
    "bernoulli": "half = Sigmoid (r)\n n = Bernoulli (half)",
}
IN_A_BRANCH = """yes = Constant <value_int = 1> ()
    flag = Cast <to = 9> (yes)
    n = If (flag) <
        then_branch = t () => (float[batch, sequence, 1] x) { x = RandomUniformLike (r) },
        else_branch = e () => (float[batch, sequence, 1] z) { z = Identity (r) }
    >"""


def random_model(draw: str, others: str = "") -> onnx.ModelProto:
    """A model whose hidden states are multiplied with random numbers, one for each word."""
    text = f"""g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits{others}) {{
        h = Gather (embedding, ids)
        r = ReduceMean (h, last)
        {draw}
        h1 = Mul (h, n)
        u = MatMul (h1, up)
        a = Relu (u)
        d = MatMul (a, down)
        h2 = Add (h1, d)
        logits = MatMul (h2, head)
        {"plain = MatMul (h, head)" if others else ""}
    }}"""
    weights: dict[str, Array] = normal(3, {"embedding": (31, 12), "up": (12, 20), "down": (20, 12), "head": (12, 31)})
    return build_model(text, {**weights, "last": np.array([-1])})


@pytest.mark.parametrize("draw", DRAWS)
def test_both_models_get_the_same_random_numbers(draw: str, tmp_path: Path) -> None:
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(random_model(DRAWS[draw]), small)
    result = expand(small, big, 2, device="cpu", precision="float64").validation
    assert result is not None and result.equal
    assert [report.name for report in result.outputs] == ["logits"]
    assert any("the same random numbers" in note for note in result.notes)
    assert validate_files(small, big, "cpu").equal


def test_a_mistake_shows_among_random_numbers(tmp_path: Path) -> None:
    """Without its plan the grown model is judged by its outputs alone."""
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(random_model(DRAWS["uniform"]), small)
    expand(small, big, 2, device="cpu")
    model = onnx.load(big)
    del model.metadata_props[:]
    onnx.save(model, big)
    assert validate_files(small, big, "cpu").equal
    change(big, "up", lambda array: array * np.float32(1.001))
    assert any("output logits" in problem for problem in validate_files(small, big, "cpu").problems)


def test_random_numbers_in_a_branch_are_not_compared(tmp_path: Path, cli: Command) -> None:
    """The graph is checked instead, and outputs that are not random are compared."""
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(random_model(IN_A_BRANCH, ", float[batch, sequence, 31] plain"), small)
    done = cli("expand", small, "--factor", "2", "-o", big, "--device", "cpu")
    assert done.code == 0, done.error
    assert "output logits is random and was not compared: RandomUniformLike" in " ".join(done.stdout.split())
    result = validate_files(small, big, "cpu")
    assert result.equal and [report.name for report in result.outputs] == ["plain"]
    model = onnx.load(big)
    next(node for node in model.graph.node if node.output[0] == "a").op_type = "Tanh"
    onnx.save(model, big)
    assert any(problem.startswith("graph: ") for problem in validate_files(small, big, "cpu").problems)


def test_where_all_outputs_are_random_the_way_out_is_shown(tmp_path: Path, cli: Command) -> None:
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(random_model(IN_A_BRANCH), small)
    arguments = ("expand", small, "--factor", "2", "-o", big, "--device", "cpu")
    done = cli(*arguments)
    assert done.code == 3 and "all outputs are random" in done.error and not big.exists()
    assert cli(*arguments, "--validate", "algebraic").code == 0


# -- inputs with defaults ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    onnx.save(with_adapter(3), folder / "small.onnx")
    expand(folder / "small.onnx", folder / "big.onnx", 2, device="cpu", check=False)
    return folder / "small.onnx", folder / "big.onnx"


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_adapters_are_fed_and_left_out(rank: int, keep: bool, tmp_path: Path) -> None:
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(with_adapter(rank), small)
    result = expand(small, big, 2, device="cpu", keep_interface=keep, precision="float64").validation
    assert result is not None and result.equal
    assert [case.endswith("inputs with defaults left out") for case in result.cases] == [False, True, False]


def test_an_adapter_that_the_grown_model_ignores_shows(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    """With the default, both models agree still: only the random adapter shows the mistake."""
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(with_adapter(0), small)
    expand(small, big, 2, device="cpu")
    model = onnx.load(big)
    del model.metadata_props[:]
    next(node for node in model.graph.node if node.output[0] == "nab").input[1] = "ignored"
    model.graph.node.insert(0, helper.make_node("Sub", ["b", "b"], ["ignored"]))
    onnx.save(model, big)
    assert any("output logits" in problem for problem in validate_files(small, big, "cpu").problems)


@pytest.mark.parametrize("mode", ["full", "algebraic"])
def test_a_wrong_default_shows(mode: Any, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    small, big = adapters[0], tmp_path / "big.onnx"
    big.write_bytes(adapters[1].read_bytes())
    assert validate_files(small, big, "cpu", mode=mode).equal
    change(big, "a", lambda array: np.concatenate([array[:12], np.zeros_like(array[12:])]))
    assert validate_files(small, big, "cpu", mode=mode).problems


def test_one_s_own_inputs_need_no_adapter(adapters: tuple[Path, Path]) -> None:
    ids = np.arange(6).reshape(2, 3)
    assert validate_files(*adapters, "cpu", inputs={"ids": ids}).equal
    rng = np.random.default_rng(0)
    given = {"ids": ids, "a": rng.standard_normal((12, 2)), "b": rng.standard_normal((2, 12))}
    assert validate_files(*adapters, "cpu", inputs=given).equal
    with pytest.raises(BadRequest, match="'ids'"):
        validate_files(*adapters, "cpu", inputs={"a": given["a"], "b": given["b"]})
