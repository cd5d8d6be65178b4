"""Checkpoints in half precision grow, keep their type, and compute what their source computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

from hyperclone_onnx import expand

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
import transformers  # noqa: E402
from test_frameworks_hugging_face import export, loaded  # noqa: E402

from hyperclone_onnx.frameworks.checkpoints import read_weights  # noqa: E402
from models import zoo  # noqa: E402

Array = np.ndarray[Any, Any]

TEXT = {"vocab_size": 100, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 6, "max_position_embeddings": 64}
GROUPED = TEXT | WIDTHS | {"num_key_value_heads": 2, "head_dim": 8}
IDS, PAIR = ("input_ids", "attention_mask"), ("input_ids", "decoder_input_ids")

MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        IDS,
        "bfloat16",
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=100, n_positions=64, n_embd=48, n_layer=1, n_head=6)
        ),
        IDS,
        "float16",
    ),
    "gemma": (lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED)), IDS, "bfloat16"),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED)), IDS, "float16"),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=100, d_model=48, d_kv=8, d_ff=56, num_heads=6, num_layers=1, use_cache=False
            )
        ),
        PAIR,
        "float32",
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**(TEXT | WIDTHS))),
        IDS,
        "float16",
    ),
}
"""The model with weights as transformers draws them, its inputs, and the type in which its ONNX file computes."""

Small = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A model and its ONNX file, by name. Both types of half precision hold every weight of the model exactly."""
    zoo.quiet()
    transformers.utils.logging.disable_progress_bar()

    @cache
    def make(name: str) -> tuple[Any, Path]:
        build, inputs, dtype = MODELS[name]
        torch.manual_seed(0)
        model = build().eval()
        model.config.use_cache = False
        model.set_attn_implementation("eager")  # the exporter fails on T5 with fused attention in half precision
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter.clamp(-1, 1) * 2**9).round() / 2**9)
                parameter.copy_(parameter.bfloat16())
        path = tmp_path_factory.mktemp(name) / "small.onnx"
        model = model.to(getattr(torch, dtype))
        export(model, inputs, "logits", path)
        return model, path

    return make


def logits(folder: Path, inputs: tuple[str, ...]) -> Array:
    """The output of a checkpoint in float32."""
    model = loaded(folder).float().eval()
    torch.manual_seed(3)
    feeds = {name: zoo.example(name, model.config) for name in inputs}
    with torch.no_grad():
        return np.asarray(model(**feeds).logits.numpy())


CASES = {
    "llama": ("bfloat16", "float16"),
    "gpt2": ("bfloat16",),
    "gemma": ("bfloat16", "float16"),
    "qwen3": ("float16",),
    "t5": ("bfloat16",),
    "bert": ("float16",),
}
"""The types in which the checkpoint of each model is stored. The file may have the other type."""


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_keeps_its_type_and_its_outputs(name: str, small: Small, tmp_path: Path, cli: Command) -> None:
    model, path = small(name)
    inputs = MODELS[name][1]
    expand(path, tmp_path / "big.onnx", 2, check=False)
    for dtype in CASES[name]:
        folder, out = tmp_path / dtype, tmp_path / f"{dtype}.out"
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        done = cli("handoff", tmp_path / "big.onnx", "--to", "hf", "--like", folder, "-o", out, "--json")
        assert done.code == 0, done.stderr
        report = json.loads(done.stdout)["hugging_face"]
        stored = read_weights(folder)
        written = read_weights(out)
        assert {key: array.dtype for key, array in written.items()} == {k: array.dtype for k, array in stored.items()}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        want, got = logits(folder, inputs), logits(out, inputs)
        rounded = any(text.split()[1] not in ("2", "0.5", "0.25") for text in report["compensations"].values())
        bound = {"bfloat16": 1e-2, "float16": 2e-3}[dtype] if rounded else 2e-5
        np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())
