"""What `validate` must notice: changed tensors, changed graphs, values that are not finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, perceptron
from onnx import numpy_helper

from hyperclone_onnx import BadRequest, expand, validate_files
from hyperclone_onnx.plan import METADATA_KEY
from hyperclone_onnx.sessions import providers

Array = np.ndarray[Any, Any]


@pytest.fixture
def pair(small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A small model and what grew from it."""
    big = tmp_path / "big.onnx"
    expand(small, big, 2, device="cpu")
    return small, big


def edit(path: Path, name: str, change: Callable[[Array], Array]) -> None:
    model = onnx.load(path)
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, path)


def set_plan(path: Path, text: str | None) -> None:
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if text is not None:
        model.metadata_props.add(key=METADATA_KEY, value=text)
    onnx.save(model, path)


# -- tensors ----------------------------------------------------------------------------------------------


def one_percent(array: Array) -> Array:
    middle = np.argsort(np.abs(array), axis=None)[array.size // 2]
    array.flat[middle] *= 1.01
    return array


def swapped(array: Array) -> Array:
    assert not np.array_equal(array[0], array[1])
    array[[0, 1]] = array[[1, 0]]
    return array


# Each kind of tensor once: shared rows, shared columns, copied rows, copied vectors.
CHANGES: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "a shared weight by 1%": ("up.0", one_percent),
    "another by 1%": ("down.1", one_percent),
    "a copied weight by 1%": ("embedding", one_percent),
    "the head by 1%": ("head", one_percent),
    "a bias by 1%": ("bias.1", one_percent),
    "a gain by 1%": ("gain", one_percent),
    "swapped rows": ("up.1", swapped),
    "swapped words": ("embedding", swapped),
    "swapped biases": ("bias.0", swapped),
    "another scale": ("down.0", lambda array: array * np.float32(1.001)),
    "zeros": ("head", np.zeros_like),
    "not a number": ("up.0", lambda array: np.where(array == array.max(), np.float32(np.nan), array)),
    "another type": ("gain", lambda array: array.astype(np.float64)),
    "another shape": ("bias.0", lambda array: array[:-1]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_tensor_is_named(case: str, cli: Command, pair: tuple[Path, Path]) -> None:
    assert cli("validate", *pair, "--device", "cpu").code == 0
    name, change = CHANGES[case]
    edit(pair[1], name, change)
    done = cli("validate", *pair, "--device", "cpu")
    # A tensor of another type or shape may also be one that ONNX Runtime does not load.
    assert done.code == 1 or (case.startswith("another ") and done.code == 3)
    assert done.code == 3 or f"DIFFERS: tensor {name}: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", [np.float16])
@pytest.mark.parametrize("percent", [1, 5])
def test_a_changed_weight_of_half_precision(dtype: Any, percent: int, tmp_path: Path) -> None:
    source, big = tmp_path / "half.onnx", tmp_path / "big.onnx"
    model = perceptron(hidden=32, ffn=48)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, source)
    result = expand(source, big, 2, device="cpu").validation
    assert result is not None and result.outputs[0].max_relative < 1e-2

    def change(array: Array) -> Array:
        array.flat[np.abs(array).argmax()] *= dtype(1 + percent / 100)
        return array

    edit(big, "up.0", change)
    assert not validate_files(source, big, "cpu").equal


# -- outputs ----------------------------------------------------------------------------------------------


def test_without_a_plan_only_outputs_are_compared(cli: Command, pair: tuple[Path, Path]) -> None:
    set_plan(pair[1], None)
    done = cli("validate", *pair, "--device", "cpu")
    assert done.code == 0 and "carries no plan" in done.stdout
    edit(pair[1], "down.0", lambda array: array * np.float32(1.01))
    done = cli("validate", *pair, "--device", "cpu")
    assert done.code == 1 and "DIFFERS: output logits: relative error" in done.stdout


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 99}'])
def test_a_plan_that_cannot_be_read(text: str, cli: Command, pair: tuple[Path, Path]) -> None:
    set_plan(pair[1], text)
    done = cli("validate", *pair)
    assert done.code == 4 and "plan" in done.error and "Traceback" not in done.stderr


def test_a_plan_of_another_model(cli: Command, pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(perceptron(layers=3), other)
    assert cli("validate", other, pair[1], "--device", "cpu").code in (1, 4)
    deeper = tmp_path / "deeper.onnx"
    expand(other, deeper, 2, device="cpu")
    done = cli("validate", pair[0], deeper, "--device", "cpu")
    assert done.code in (1, 4) and "Traceback" not in done.stderr


def test_two_unlike_models(cli: Command, pair: tuple[Path, Path], tmp_path: Path) -> None:
    unlike = tmp_path / "unlike.onnx"
    onnx.save(perceptron(vocab=37), unlike)
    assert cli("validate", pair[0], unlike, "--device", "cpu").code == 1
    assert cli("validate", pair[0], pair[0], "--device", "cpu").code == 0


@dataclass(frozen=True)
class Ends:
    """How two graphs end that are alike up to `t`, and whether they may count as equal."""

    label: str
    small: str
    big: str
    equal: bool


ENDS = [
    Ends(
        "infinity-in-the-same-places",
        "y = Add (t, some_inf)",
        "y = Add (t, some_inf)",
        True,
    ),
    Ends("infinity-and-its-opposite", "y = Add (t, some_inf)", "y = Sub (t, some_inf)", False),
    Ends("infinity-and-no-number", "y = Add (t, some_inf)", "y = Add (t, some_nan)", False),
    Ends("nothing-but-no-numbers", "y = Add (t, nan)", "n = Neg (t)\ny = Add (n, nan)", False),
    Ends("tiny-outputs", "y = Mul (t, tiny)", "n = Neg (t)\ny = Mul (n, tiny)", False),
    Ends("one-in-a-thousand", "y = Identity (t)", "y = Mul (t, near)", False),
    Ends("no-such-shape", "y = Identity (t)", "y = Transpose (t)", False),
]


@pytest.mark.parametrize(
    "ends",
    [pytest.param(e, id=e.label) for e in ENDS],
)
def test_outputs_are_compared(ends: Ends, tmp_path: Path) -> None:
    some = np.array([0, 1, 0, 0, 0, 0], dtype=np.float32)
    weights = {
        "w": np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32),
        "some_inf": np.where(some, np.float32(np.inf), some),
        "some_nan": np.where(some, np.float32(np.nan), some),
        "nan": np.full(6, np.nan, dtype=np.float32),
        "tiny": np.full(6, 1e-30, dtype=np.float32),
        "near": np.full(6, 1.001, dtype=np.float32),
    }
    for name, end in (("small", ends.small), ("big", ends.big)):
        text = f"g (float[batch, 6] x) => (float[rows, columns] y) {{ t = MatMul (x, w)\n {end} }}"
        onnx.save(build_model(text, weights), tmp_path / f"{name}.onnx")
    result = validate_files(tmp_path / "small.onnx", tmp_path / "big.onnx", "cpu")
    assert result.equal == ends.equal and bool(result.problems) != ends.equal


def test_logits_of_words_that_cannot_come(tmp_path: Path) -> None:
    model, mask = perceptron(), np.zeros(31, dtype=np.float32)
    mask[3] = -np.inf
    model.graph.node[-1].output[0] = "free"
    model.graph.node.append(onnx.helper.make_node("Add", ["free", "mask"], ["logits"]))
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    onnx.save(model, tmp_path / "small.onnx")
    result = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, device="cpu").validation
    assert result is not None and result.equal
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["equal"]
    assert result.outputs[0].kl_divergence is not None and result.outputs[0].kl_divergence < 1e-9


# -- tolerance and devices --------------------------------------------------------------------------------


def test_the_tolerance_and_its_reason(pair: tuple[Path, Path]) -> None:
    result = validate_files(*pair, "cpu")
    assert result.tensors is not None and result.tensors.checked >= 9 and result.tensors.residue < 1e-6
    assert result.outputs[0].max_relative <= result.tolerance < 1e-4
    for word in ("float eps 1.2e-07", "sqrt(", "residue"):
        assert word in result.tolerance_reason


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
EXACT_CUDA = (CUDA, {"use_tf32": "0"})


@pytest.mark.parametrize(
    ("device", "available", "wanted"),
    [
        ("auto", [CPU], [CPU]),
        ("auto", [CUDA, CPU], [EXACT_CUDA, CPU]),
        ("auto", ["TensorrtExecutionProvider", CUDA, CPU], [EXACT_CUDA, CPU]),
        ("cpu", [CUDA, CPU], [CPU]),
        ("cuda", [CUDA, CPU], [EXACT_CUDA, CPU]),
    ],
)
def test_providers(device: Any, available: list[str], wanted: list[Any]) -> None:
    assert providers(device, available) == wanted


def test_cuda_that_this_runtime_has_not() -> None:
    with pytest.raises(BadRequest, match=r"hyperclone-onnx\[cuda\].*--device cpu"):
        providers("cuda", [CPU])


def test_cuda_that_does_not_start(cli: Command, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    done = cli("validate", *pair, "--device", "cuda")
    assert done.code == 2 and "--device cpu" in done.error and done.stdout == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2.distinct", "llama.distinct"])
def test_on_cuda(name: str, zoo: Callable[[str], Path], cli: Command, tmp_path: Path) -> None:
    big = tmp_path / "big.onnx"
    done = cli("expand", zoo(name), "--factor", "2", "-o", big, "--device", "cuda", "--json")
    assert done.code == 0 and json.loads(done.stdout)["validation"]["provider"] == CUDA
    # Products rounded to 10 bits would be off by a thousand times as much.
    assert max(each["max_relative"] for each in json.loads(done.stdout)["validation"]["outputs"]) < 1e-5
    assert cli("validate", zoo(name), big, "--device", "cuda").code == 0
