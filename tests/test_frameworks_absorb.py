"""Trained weights come back into ONNX, or nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Command, names_in

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Zoo = Callable[[str], Path]


def write_safetensors(path: Path, tensors: dict[str, Any]) -> Path:
    """A safetensors file of float32 tensors, as its specification says: a header's length, the header, the bytes."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def trained(path: Path) -> Any:
    model = load(path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(path: Path, ids: Any) -> Any:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)})[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_trained_is_what_onnx_runtime_runs(family: str, zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    source = zoo(f"{family}.distinct")
    model = trained(source)
    file = write_safetensors(tmp_path / "w.safetensors", {n: p.detach().numpy() for n, p in model.named_parameters()})
    done = cli("absorb", source, file, "-o", tmp_path / "trained.onnx")
    assert done.code == 0 and done.stdout.rstrip().endswith("0 kept, as PyTorch computes it")
    ids = torch.randint(0, 95, (2, 7))
    with torch.no_grad():
        wanted = model(ids, torch.ones_like(ids)).numpy()
    assert np.abs(logits(tmp_path / "trained.onnx", ids) - wanted).max() < 2e-6 * np.abs(wanted).max()
    assert np.abs(logits(source, ids) - wanted).max() > 1e-3 * np.abs(wanted).max()
    graphs = [onnx.load(path).graph for path in (source, tmp_path / "trained.onnx")]
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]


def test_jax_params_and_part_of_the_weights(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from hyperclone_onnx.frameworks.jax import load as load_function

    _, params = load_function(zoo("llama.distinct"), train=["*"], freeze=["model.norm.weight"])
    result = absorb(zoo("llama.distinct"), {"model": params["model"]}, tmp_path / "trained.onnx")
    assert result.kept == ["val_451"] and "model.norm.weight" in result.replaced


WRONG: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "an unknown name": (
        {"model.norm.wait": (48,)},
        "no floating tensor of this model; did you mean 'model.norm.weight'",
    ),
    "another shape": ({"model.norm.weight": (47,)}, "has the shape (47,) in the weights, (48,) in the model"),
    "none at all": ({}, "the weights hold no tensor of this model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_write_nothing(case: str, zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    shapes, message = WRONG[case]
    file = write_safetensors(tmp_path / "w.safetensors", {name: np.ones(shape) for name, shape in shapes.items()})
    done = cli("absorb", zoo("llama.distinct"), file, "-o", tmp_path / "trained.onnx")
    assert done.code == 2 and message in done.error
    assert names_in(tmp_path) == {"w.safetensors"}


def test_a_truncated_file_writes_nothing(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    file = write_safetensors(tmp_path / "w.safetensors", {"model.norm.weight": np.ones(48)})
    for content in (file.read_bytes()[:-4], b"", b"\xff" * 40):
        file.write_bytes(content)
        done = cli("absorb", zoo("llama.distinct"), file, "-o", tmp_path / "trained.onnx")
        assert done.code == 4 and "w.safetensors" in done.error
        assert names_in(tmp_path) == {"w.safetensors"}


def test_values_that_are_not_finite_write_nothing(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    file = write_safetensors(tmp_path / "w.safetensors", {"model.norm.weight": np.full(48, np.nan)})
    done = cli("absorb", zoo("llama.distinct"), file, "-o", tmp_path / "trained.onnx")
    assert done.code == 2 and "not finite" in done.error and names_in(tmp_path) == {"w.safetensors"}
