"""`expand FOLDER` and `export FOLDER` for a Hugging Face checkpoint without ONNX files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Command, names_in

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
import transformers  # noqa: E402
from test_frameworks_hugging_face import loaded, tiled  # noqa: E402

from hyperclone_onnx.frameworks.checkpoints import read_weights  # noqa: E402

Array = np.ndarray[Any, Any]

TEXT = {"vocab_size": 90, "num_hidden_layers": 1, "max_position_embeddings": 64}
WIDTHS = {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 6}


def tokens(length: int) -> Any:
    return torch.randint(0, 90, (2, length), generator=torch.Generator().manual_seed(length))


def floats(*shape: int) -> Any:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(len(shape)))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **WIDTHS, num_key_value_heads=2)).bfloat16()


def t5() -> Any:
    sizes = {"vocab_size": 90, "d_model": 48, "d_kv": 8, "d_ff": 56, "num_heads": 6, "num_layers": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def vit() -> Any:
    sizes = {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8, "num_labels": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**WIDTHS, **sizes)).bfloat16()


def whisper() -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 6, "decoder_attention_heads": 6}
    sizes = {"d_model": 48, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "num_mel_bins": 8, "vocab_size": 90}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 10, "max_target_positions": 20}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **layers, **sizes, **ids, **lengths, suppress_tokens=None, begin_suppress_tokens=None
        )
    )


def mixtral() -> Any:
    sizes = {**TEXT, **WIDTHS, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "a decoder": (llama, {"input_ids": tokens(7)}, ["--keep-onnx"]),
    "an encoder and a decoder": (t5, {"input_ids": tokens(7), "decoder_input_ids": tokens(5)}, []),
    "images": (vit, {"pixel_values": floats(3, 16, 16)}, ["--dtype", "float16"]),
    "a mixture of experts": (mixtral, {"input_ids": tokens(7)}, []),
    "speech": (whisper, {"input_features": floats(8, 20), "decoder_input_ids": tokens(5)}, []),
}


def checkpoint(build: Callable[[], Any], folder: Path) -> Path:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


def logits(folder: Path, feeds: dict[str, Any]) -> Array:
    with torch.no_grad():
        return np.asarray(loaded(folder).float().eval()(**feeds).logits.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_grows_in_one_command(name: str, tmp_path: Path, cli: Command) -> None:
    build, feeds, words = MODELS[name]
    small, big = checkpoint(build, tmp_path / "small"), tmp_path / "big"
    done = cli("expand", small, "--factor", "2", "-o", big, *words)
    assert done.code == 0, done.stderr
    assert names_in(tmp_path) == {"small", "big"}
    want, got = logits(small, feeds), logits(big, feeds)
    bound = 2e-3 if "--dtype" in words else 2e-5
    np.testing.assert_allclose(got, tiled(want, got.shape), atol=bound * np.abs(want).max())
    dtype = "float16" if "--dtype" in words else json.loads((small / "config.json").read_text())["dtype"]
    assert {str(array.dtype) for array in read_weights(big).values()} == {dtype}
    assert (big / "onnx").exists() == ("--keep-onnx" in words)


def test_a_checkpoint_with_onnx_files_grows_without_them(tmp_path: Path, cli: Command) -> None:
    """Many published folders have both. The ONNX files grow, unless they are left out."""
    small, big = checkpoint(llama, tmp_path / "small"), tmp_path / "big"
    (small / "onnx").mkdir()
    (small / "onnx" / "model.onnx").write_text("no model")
    (small / "onnx" / "model.onnx_data").write_text("no data")
    (small / "onnx" / "quantize_config.json").write_text("{}")
    (small / "notes.txt").write_text("kept")
    assert cli("expand", small, "--set", "ffn=2", "-o", big).code == 4  # it reads the ONNX file
    done = cli("expand", small, "--set", "ffn=2", "-o", big, "--exclude", "onnx/*", "--exclude", "gen*")
    assert done.code == 0, done.stderr
    assert names_in(big) == {"config.json", "model.safetensors", "hyperclone_onnx.json", "notes.txt"}


def test_a_checkpoint_can_be_inspected(tmp_path: Path, cli: Command) -> None:
    small = checkpoint(llama, tmp_path / "small")
    done = cli("inspect", small, "--json", "--html", tmp_path / "small.html")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == str(small)
    sizes = {dimension["role"]: dimension["size"] for dimension in report["dimensions"] if dimension["growable"]}
    assert (sizes["hidden"], sizes["ffn"]) == (48, 56)
    assert names_in(tmp_path) == {"small", "small.html"}


def test_a_checkpoint_where_a_file_belongs_says_how_to_export_it(tmp_path: Path, cli: Command) -> None:
    small = checkpoint(llama, tmp_path / "small")
    for words in (("shrink", small, "-o", tmp_path / "less.onnx"), ("diagnose", small), ("validate", small, small)):
        done = cli(*words)
        assert done.code == 4 and f"hyperclone-onnx export {small} -o OUT" in done.error
    assert names_in(tmp_path) == {"small"}


def test_gains_that_are_equal_when_exported_are_trained_apart(tmp_path: Path, cli: Command) -> None:
    """Before training all gains are ones. The export keeps them apart, and so does what is grown from it."""
    from hyperclone_onnx import absorb
    from hyperclone_onnx.analysis.trainable import trainable

    small, big = checkpoint(llama, tmp_path / "small"), tmp_path / "big"
    assert cli("expand", small, "--factor", "2", "-o", big, "--keep-onnx").code == 0
    gains = {name for name, array in read_weights(big).items() if array.shape == (96,)}
    file = big / "onnx" / "model.onnx"
    assert len(gains) == 3 and gains <= set(trainable(ir.load(file)))
    model = loaded(big).float()
    for number, name in enumerate(sorted(gains)):
        with torch.no_grad():
            model.get_parameter(name).fill_(1.5 + number)
    model.save_pretrained(tmp_path / "trained")
    done = absorb(file, tmp_path / "trained", tmp_path / "new.onnx", manifest=big)
    stored = ir.load(tmp_path / "new.onnx").graph.initializers
    assert gains <= set(done.replaced)
    assert {float(stored[name].const_value.numpy()[0]) for name in gains} == {1.5, 2.5, 3.5}  # type: ignore[union-attr]


def test_a_checkpoint_grows_in_depth_and_width(tmp_path: Path, cli: Command) -> None:
    def two_layers() -> Any:
        sizes = {**TEXT, **WIDTHS, "num_hidden_layers": 2, "num_key_value_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    small, big = checkpoint(two_layers, tmp_path / "small"), tmp_path / "big"
    done = cli("expand", small, "--layers", "3", "--set", "ffn=2", "-o", big)
    assert done.code == 0, done.stderr
    assert "config.json: num_hidden_layers 2 -> 3" in done.stdout
    feeds = {"input_ids": tokens(7)}
    want = logits(small, feeds)
    np.testing.assert_allclose(logits(big, feeds), want, atol=2e-5 * np.abs(want).max())
    assert not read_weights(big)["model.layers.2.mlp.down_proj.weight"]().any()


def test_kept_onnx_files_compute_what_the_checkpoint_does(tmp_path: Path, cli: Command) -> None:
    import onnxruntime as ort

    small, big = checkpoint(llama, tmp_path / "small"), tmp_path / "big"
    assert cli("expand", small, "--set", "ffn=3", "-o", big, "--keep-onnx", "--no-validate").code == 0
    ids = tokens(7)
    want = logits(big, {"input_ids": ids})
    plain = ort.InferenceSession(big / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 7), np.int64)}
    np.testing.assert_allclose(plain.run(["logits"], feeds)[0], want, atol=2e-5 * np.abs(want).max())
    cached = ort.InferenceSession(big / "onnx" / "model_with_past.onnx", providers=["CPUExecutionProvider"])
    past = {item.name: np.zeros((2, 2, 0, 8), np.float32) for item in cached.get_inputs() if "past" in item.name}
    first = cached.run(None, {"input_ids": ids[:, :4].numpy(), "attention_mask": np.ones((2, 4), np.int64), **past})
    present = dict(zip(past, first[1:], strict=True))
    rest = {"input_ids": ids[:, 4:].numpy(), "attention_mask": np.ones((2, 7), np.int64), **present}
    np.testing.assert_allclose(cached.run(None, rest)[0], want[:, 4:], atol=2e-5 * np.abs(want).max())


def test_export_names_the_axes_as_people_do(tmp_path: Path, cli: Command) -> None:
    small = checkpoint(llama, tmp_path / "small")
    (small / "tokenizer.json").write_text("{}")
    done = cli("export", small, "-o", tmp_path / "out", "--cache")
    assert done.code == 0, done.stderr
    assert {"config.json", "tokenizer.json", "model.onnx", "model_with_past.onnx"} <= names_in(tmp_path / "out")
    graph = ir.load(tmp_path / "out" / "model_with_past.onnx").graph
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in (*graph.inputs, *graph.outputs)}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    assert shapes["past_key_values.0.key"] == ["batch", "2", "past_sequence", "8"]
    assert shapes["logits"] == ["batch", "sequence", "90"]
    assert "attention_mask: batch, total_sequence" in done.stdout


def test_wrong_requests_are_one_line(tmp_path: Path, cli: Command) -> None:
    small = checkpoint(t5, tmp_path / "small")
    rows = {
        "has no cache of keys and values": ("export", small, "-o", tmp_path / "out", "--cache"),
        "lies in the source folder": ("expand", small, "--factor", "2", "-o", small / "big"),
        "has no dimension 'nonesuch'": ("expand", small, "--set", "nonesuch=2", "-o", tmp_path / "out"),
    }
    for text, words in rows.items():
        done = cli(*words)
        assert done.code in (2, 3) and text in done.stderr, (text, done.stderr)
        assert names_in(tmp_path) == {"small"}


def test_a_model_that_takes_other_inputs_is_refused(
    tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as pictures in tiles, which have an axis more than pictures."""

    def forward(*_: Any, **__: Any) -> Any:
        raise ValueError("not enough values to unpack\n(expected 5, got 4)")

    small = checkpoint(llama, tmp_path / "small")
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    done = cli("export", small, "-o", tmp_path / "out")
    assert done.code == 3 and "LlamaForCausalLM does not run on the inputs that are made for it (not" in done.error
    assert names_in(tmp_path) == {"small"}


def deep(inverse: bool = False, **sizes: Any) -> Any:
    """A decoder of four layers. Its gains differ from layer to layer, so that no layer can stand for another."""
    if inverse:
        config = transformers.GPT2Config(
            vocab_size=90, n_positions=64, n_embd=48, n_layer=4, n_head=6, scale_attn_by_inverse_layer_idx=True
        )
        return transformers.GPT2LMHeadModel(config)
    fields = {**TEXT, **WIDTHS, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, **sizes}
    model = (
        transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**fields))
        if "layer_types" in sizes
        else transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, tie_word_embeddings=True))
    )
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.fill_(1.0 + number)
    return model


UNLIKE = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 16}
"""A window that an input of a few tokens does not show."""


@pytest.mark.parametrize(
    ("build", "traced"),
    [(deep, [2]), (lambda: deep(**UNLIKE), [2, 4]), (lambda: deep(inverse=True), [2, 4])],
    ids=["alike", "one layer sees more", "a number in each layer"],
)
def test_only_layers_that_are_alike_are_exported_once(
    build: Callable[[], Any], traced: list[int], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    from hyperclone_onnx.frameworks.hugging_face import exporting

    seen: list[int] = []

    def counted(checkpoint: Any, module: Any, *rest: Any, real: Any = exporting._traced) -> Any:
        seen.append(module.model.config.num_hidden_layers)
        return real(checkpoint, module, *rest)

    monkeypatch.setattr(exporting, "_traced", counted)
    small = checkpoint(build, tmp_path / "small")
    done = cli("export", small, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert seen == traced
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokens(40)
    got = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 40), np.int64)})[0]
    want = logits(small, {"input_ids": ids})
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    stored = set(ir.load(tmp_path / "out" / "model.onnx").graph.initializers)
    assert stored >= {name for name in read_weights(small) if "layers" in name}
