"""A Hugging Face checkpoint that grows to sizes that are no multiples, under an RMSNorm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, names_in

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
import transformers  # noqa: E402

SIZES = {
    "vocab_size": 90,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
WANTED = ("--size", "hidden=72", "--size", "heads=9", "--size", "ffn=70")
IDS = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def stirred(model: Any) -> Any:
    """The model with gains that differ: an exporter stores equal ones once, also where a tied embedding needs two."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval().float()(input_ids=IDS).logits


def test_a_tied_llama(tmp_path: Path, cli: Command) -> None:
    torch.manual_seed(0)
    source = stirred(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)))
    source.save_pretrained(tmp_path / "small")
    outcome = cli("expand", tmp_path / "small", *WANTED, "-o", tmp_path / "big")
    assert outcome.code == 0, outcome.stderr
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    wanted = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 70}
    assert {name: config[name] for name in wanted} == wanted
    big = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "big")
    assert big.lm_head.weight is big.model.embed_tokens.weight
    torch.testing.assert_close(logits(big), logits(source), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(big.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = big(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_channels_that_hold_a_mean(tmp_path: Path, cli: Command) -> None:
    """Under a LayerNorm in front of each block: the channels left over are ordinary numbers of the checkpoint."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 56}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    source = stirred(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids)))
    source.save_pretrained(tmp_path / "small")
    outcome = cli("expand", tmp_path / "small", "--size", "hidden=72", "--size", "heads=9", "-o", tmp_path / "big")
    assert outcome.code == 0, outcome.stderr
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    assert (config["n_embd"], config["n_head"]) == (72, 9)
    big = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "big")
    torch.testing.assert_close(logits(big), logits(source), rtol=1e-4, atol=1e-5)


def test_a_number_that_the_model_derives_from_its_width_is_noticed(tmp_path: Path, cli: Command) -> None:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**SIZES, head_dim=8)
    stirred(transformers.GemmaForCausalLM(config)).save_pretrained(tmp_path / "small")
    outcome = cli("expand", tmp_path / "small", *WANTED, "-o", tmp_path / "big")
    assert outcome.code == 3, outcome.stdout
    assert "the model derives numbers from its sizes" in outcome.stderr
    assert names_in(tmp_path) == {"small"}
