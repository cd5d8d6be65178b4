"""One command grows the folder of every family that people come with: transformers loads it and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
import transformers as hf  # noqa: E402

from hyperclone_onnx.frameworks.checkpoints import read_weights  # noqa: E402

Array = np.ndarray[Any, Any]

LAYERS = 3
"""Layers in each stack: more than are exported where layers are alike."""

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 6, "num_hidden_layers": LAYERS}
TEXT = {**WIDTHS, "vocab_size": 90, "max_position_embeddings": 64}
GROUPED = {**TEXT, **IDS, "num_key_value_heads": 2, "head_dim": 8}
OLMO = {name: value for name, value in GROUPED.items() if name != "head_dim"}
DEEPSEEK = {
    **OLMO,
    "num_key_value_heads": 6,
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
GPT2 = {"vocab_size": 90, "n_positions": 64, "n_embd": 48, "n_layer": LAYERS, "n_head": 6}
T5 = {
    **IDS,
    "decoder_start_token_id": 0,
    "vocab_size": 90,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 56,
    "num_heads": 6,
    "num_layers": LAYERS,
}
VIT = {**WIDTHS, "image_size": 16, "patch_size": 8, "num_labels": 4}
WHISPER = {
    **{
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in {"layers": LAYERS, "attention_heads": 6, "ffn_dim": 56}.items()
    },
    **{"d_model": 48, "num_mel_bins": 8, "vocab_size": 90, "max_source_positions": 10, "max_target_positions": 20},
    **{**IDS, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama_8_heads_of_8": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**GROUPED, "hidden_size": 64, "num_attention_heads": 8})
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**OLMO, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**OLMO)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED, num_experts=4, moe_intermediate_size=20)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
}

QUICK = {
    *((name, "float32") for name in ("llama_8_heads_of_8", "gpt_oss", "deepseek_v3", "bert")),
    *((name, "bfloat16") for name in ("llama", "gpt2")),
}
CASES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=() if (name, dtype) in QUICK else pytest.mark.slow_frameworks)
    for name in MODELS
    for dtype in ("float32", "bfloat16")
]


def inputs(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (2, 7), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": tokens}
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}


def computed(folder: Path) -> tuple[Array, list[Any]]:
    """The logits of a checkpoint in float32, and what it goes on with, where it generates text."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(hf, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32).eval()
    feeds = inputs(model)
    with torch.no_grad():
        logits = np.asarray(model(**feeds).logits.numpy())
        if not model.can_generate():
            return logits, []
        feeds.pop("decoder_input_ids", None)
        text = model.generate(**feeds, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return logits, text.tolist()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_folder_of_every_family_grows(name: str, dtype: str, tmp_path: Path, cli: Command) -> None:
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    small, big = tmp_path / "small", tmp_path / "big"
    MODELS[name]().to(getattr(torch, dtype)).save_pretrained(small)
    done = cli("expand", small, "--factor", "2", "-o", big)
    assert done.code == 0, done.stderr
    assert {str(array.dtype) for array in read_weights(big).values()} == {dtype}
    assert json.loads((big / "config.json").read_text())["dtype"] == dtype
    (want, text), (got, other) = computed(small), computed(big)
    rounded = dtype == "bfloat16" and "compensated" in done.stdout
    np.testing.assert_allclose(got, want, atol=(1e-2 if rounded else 2e-5) * np.abs(want).max())
    assert rounded or text == other
