"""A checkpoint grows, and is checked, without a whole model in memory; and the check finds one wrong number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import names_in

from hyperclone_onnx.errors import ModelsDiffer, Refused
from hyperclone_onnx.writing.safetensors_files import write_safetensors

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_frameworks_hugging_face_folder import WIDTHS, checkpoint, deep, t5, tokens, whisper  # noqa: E402

from hyperclone_onnx.frameworks.checkpoints import read_weights  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face import checking, expand_checkpoint, export_checkpoint, growing, streaming  # noqa: E402  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.checkpoint import read_checkpoint  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.layout import LaidOut, Layout, Piece  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.recording import floating_outputs, run_model  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.verifying import TensorsChecked  # noqa: E402
from hyperclone_onnx.validation.sessions import Runner  # noqa: E402

LAYER = "model.layers.2"
WRONG = f"{LAYER}.mlp.up_proj.weight"


def small_llama() -> Any:
    return deep().bfloat16()


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tied, in half precision": (small_llama, {"input_ids": tokens(7)}),
    "a table read by its weight": (t5, {"input_ids": tokens(7), "decoder_input_ids": tokens(5)}),
    "convolutions": (
        whisper,
        {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(5)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_weights_stay_in_their_files_computes_the_same(name: str, tmp_path: Path) -> None:
    build, feeds = MODELS[name]
    read = read_checkpoint(checkpoint(build, tmp_path / "small"))
    opened = streaming.open_model(read)
    assert opened.stored is not None and not opened.missing
    assert {parameter.untyped_storage().nbytes() for parameter in opened.model.parameters()} == {4}
    got, want = (floating_outputs(run_model(model, feeds)) for model in (opened.model, read.load().model))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_an_operator_without_numbers_ends_the_run(tmp_path: Path) -> None:
    opened = streaming.open_model(read_checkpoint(checkpoint(small_llama, tmp_path / "small")))
    assert isinstance(opened.reads, dict)
    del opened.reads[id(opened.model.model.norm.weight)]
    with pytest.raises(RuntimeError, match="no number at all"):
        run_model(opened.model, {"input_ids": tokens(7)})


def test_a_checkpoint_whose_names_transformers_changes_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = checkpoint(small_llama, tmp_path / "small")
    tensors = load_file(small / "model.safetensors")
    save_file(
        {key.removeprefix("model."): value for key, value in tensors.items()},
        small / "model.safetensors",
        {"format": "pt"},
    )
    opened = streaming.open_model(read_checkpoint(small))
    assert opened.stored is None and not opened.missing
    monkeypatch.setattr(streaming, "free_memory", lambda: 1000)
    with pytest.raises(Refused, match=r"all of them, which needs .* of memory .*, and .* are free: stop"):
        expand_checkpoint(small, tmp_path / "big", 2)
    assert names_in(tmp_path) == {"small"}


def spoilt(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let each written checkpoint have other numbers in one tensor."""

    def write(self: Any, folder: Path, *rest: Any, real: Any = growing.Writer.write) -> None:
        real(self, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        change(tensors[WRONG])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(growing.Writer, "write", write)


def test_one_wrong_number_is_found_and_its_tensor_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is so near to the right one that no output shows it."""
    small = checkpoint(small_llama, tmp_path / "small")

    def change(tensor: Any) -> None:
        tensor[3, 5] *= 1 + 2**-6

    spoilt(monkeypatch, change)
    with pytest.raises(ModelsDiffer, match=rf"wrong: {WRONG}: its repeats .* \(most at \[3, 5\] of the source's\)"):
        expand_checkpoint(small, tmp_path / "big", 2)
    assert names_in(tmp_path) == {"small"}
    monkeypatch.setattr(growing, "check_tensors", lambda *_: TensorsChecked())
    expand_checkpoint(small, tmp_path / "big", 2)


def test_the_first_layer_with_wrong_outputs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = checkpoint(small_llama, tmp_path / "small")
    spoilt(monkeypatch, lambda tensor: tensor.zero_())
    monkeypatch.setattr(growing, "check_tensors", lambda *_: TensorsChecked())
    with pytest.raises(ModelsDiffer, match=rf"differs from its source's.*the first layer that differs is {LAYER} "):
        expand_checkpoint(small, tmp_path / "big", 2)


def test_numbers_that_transformers_changes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperclone_onnx.frameworks.hugging_face import verifying

    def load(*words: Any, real: Any = verifying.load, **options: Any) -> Any:
        loaded = real(*words, **options)
        with torch.no_grad():
            loaded.model.get_parameter(WRONG)[0, 0] += 1
        return loaded

    monkeypatch.setattr(verifying, "load", load)
    with pytest.raises(ModelsDiffer, match=f"loads other numbers for {WRONG} than"):
        expand_checkpoint(checkpoint(small_llama, tmp_path / "small"), tmp_path / "big", 2)


def test_no_onnx_file_of_the_grown_model_is_written_unless_it_is_kept(tmp_path: Path) -> None:
    small = checkpoint(small_llama, tmp_path / "small")
    written: list[tuple[int, int]] = []
    result = expand_checkpoint(small, tmp_path / "big", 2, progress=lambda *bytes_: written.append(bytes_))
    assert written[-1][0] == written[-1][1] and written == sorted(written)
    report = result.handover.hugging_face
    assert result.models["model.onnx"].files == {} and report["error_to_file"] is None
    assert report["tensors_checked"] == len(load_file(tmp_path / "big" / "model.safetensors"))
    assert report["error_to_source"] < 1e-5 and len(report["cases"]) == 3
    kept = expand_checkpoint(small, tmp_path / "kept", 2, keep_onnx=True)
    assert kept.models["model.onnx"].files and kept.handover.hugging_face["error_to_file"] < 1e-5
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("big", "kept"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_types_may_be_mixed_in_a_checkpoint(tmp_path: Path) -> None:
    def mixed() -> Any:
        model = small_llama()
        for layer in model.model.layers:
            layer.input_layernorm.float()
        return model

    expand_checkpoint(checkpoint(mixed, tmp_path / "small"), tmp_path / "big", 2)
    kinds = {name: str(array.dtype) for name, array in read_weights(tmp_path / "big").items()}
    assert kinds[f"{LAYER}.input_layernorm.weight"] == "float32" and kinds[WRONG] == "bfloat16"


def test_too_little_memory_is_said_before_the_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    monkeypatch.setattr(streaming, "free_memory", lambda: 1000)
    with pytest.raises(Refused, match=r"must be measured, which needs .* of memory \(float32\), and 1.0 KB are free"):
        expand_checkpoint(checkpoint(small_llama, tmp_path / "small"), tmp_path / "big", 2, notify=stages.append)
    assert "writing" not in stages and names_in(tmp_path) == {"small"}


def test_a_file_runs_with_its_weights_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "LARGE", 0)
    export_checkpoint(checkpoint(small_llama, tmp_path / "small"), tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    mapped = checking.MappedRunner(file)
    assert all(isinstance(array, np.memmap) for array in mapped.weights.values())
    assert sum(array.size for array in mapped.weights.values()) > WIDTHS["hidden_size"] * 90
    feeds = {"input_ids": tokens(7).numpy(), "attention_mask": np.ones((2, 7), np.int64)}
    (want,), (got,) = Runner(file, "cpu").run(feeds).values(), mapped.run(feeds).values()
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_written_tensors_do_not_stay_in_memory(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    entry = LaidOut(
        Layout((Piece("w", (1, 0)),), (4, 3)), lambda _: array, lambda _, axis: np.arange(array.shape[axis]), np.float32
    )
    write_safetensors({"w": entry}, tmp_path)
    assert "_view" not in vars(entry)
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["w"].numpy(), array.T)
