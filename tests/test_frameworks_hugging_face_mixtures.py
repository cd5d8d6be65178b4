"""A mixture of experts as the mixture class of its family in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, names_in

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors", "onnxscript"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
import transformers  # noqa: E402

from hyperclone_onnx import Experts, Refused, expand, hand_over  # noqa: E402

SIZES = {
    "vocab_size": 90,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
IDS = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))

FAMILIES = {
    "Llama": ("Mixtral", {"tie_word_embeddings": True}),
    "Mistral": ("Mixtral", {"tie_word_embeddings": False, "sliding_window": None}),
    "Qwen3": ("Qwen3Moe", {"head_dim": 8, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Moe", {"tie_word_embeddings": False}),
    "Granite": ("GraniteMoe", {"tie_word_embeddings": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.4}),
}
"""For each dense family the mixture's, and fields of its configuration."""


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval().float()(input_ids=IDS).logits


def dense(family: str, folder: Path, cli: Command) -> tuple[Any, Path]:
    """A small checkpoint of a family, and its ONNX file."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family][1])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    model.save_pretrained(folder / family)
    outcome = cli("export", folder / family, "-o", folder / f"{family}.onnx")
    assert outcome.code == 0, outcome.stderr
    (file,) = (folder / f"{family}.onnx").glob("*.onnx")
    return model, file


@pytest.mark.parametrize(("family", "granularity"), [("Llama", 2), *((family, 1) for family in FAMILIES)])
def test_a_mixture_computes_what_the_dense_model_computes(
    family: str, granularity: int, tmp_path: Path, cli: Command
) -> None:
    source, small = dense(family, tmp_path, cli)
    expand(small, tmp_path / "moe.onnx", experts=Experts(4, 2, granularity=granularity))
    report = hand_over(tmp_path / "moe.onnx", "hf", tmp_path / "moe", like=tmp_path / family, source=small)
    assert report.hugging_face["error_to_source"] < 1e-5 and report.hugging_face["cases"]
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["architectures"] == [f"{FAMILIES[family][0]}ForCausalLM"]
    assert config["num_experts_per_tok"] == 2 * granularity and config.get("norm_topk_prob", True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-5)
    if FAMILIES[family][1]["tie_word_embeddings"]:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_experts_that_have_parted_go_along(tmp_path: Path, cli: Command) -> None:
    """The router decides now, so its weights must be right too."""
    family = "Llama"
    _, small = dense(family, tmp_path, cli)
    expand(small, tmp_path / "moe.onnx", experts=Experts(4, 2))
    proto = onnx.load(tmp_path / "moe.onnx")
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith((".experts", ".router")):
            array = onnx.numpy_helper.to_array(tensor)
            array = array + 0.05 * rng.standard_normal(array.shape).astype(array.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, tmp_path / "trained.onnx")
    report = hand_over(tmp_path / "trained.onnx", "hf", tmp_path / "moe", like=tmp_path / family, source=small)
    assert report.hugging_face["trained"] and report.hugging_face["error_to_source"] is None
    assert report.hugging_face["error_to_file"] < 1e-5


def test_a_checkpoint_becomes_a_mixture_that_is_wider_and_deeper(tmp_path: Path, cli: Command) -> None:
    """The widths and layers grow first, and the experts are made of that checkpoint. Bad requests come before all."""
    source, _ = dense("Llama", tmp_path, cli)
    folder, out = tmp_path / "Llama", tmp_path / "moe"
    how = ["--experts", "4", "--top-k", "2", "--factor", "2", "--layers", "3"]
    before = names_in(tmp_path)
    for wrong, why in (("--shared-expert", "has none without a gate"), (("--plan-out", tmp_path / "p"), "leave out")):
        outcome = cli("expand", folder, *how, *([wrong] if isinstance(wrong, str) else wrong), "-o", out)
        assert outcome.code in (2, 3) and why in outcome.error, outcome.stderr
        assert names_in(tmp_path) == before
    outcome = cli("expand", folder, *how, "--keep-onnx", "-o", out)
    assert outcome.code == 0, outcome.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, transformers.MixtralForCausalLM)
    sizes = {"hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 3, "num_local_experts": 4}
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-5)
    assert names_in(out / "onnx")


def test_some_layers_stay_dense_where_the_class_has_such(tmp_path: Path, cli: Command) -> None:
    _, small = dense("Qwen3", tmp_path, cli)
    expand(small, tmp_path / "moe.onnx", experts=Experts(4, 2, where=2))
    hand_over(tmp_path / "moe.onnx", "hf", tmp_path / "moe", like=tmp_path / "Qwen3", source=small)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["mlp_only_layers"] == [0]
    _, small = dense("Llama", tmp_path, cli)
    expand(small, tmp_path / "moe.onnx", experts=Experts(4, 2, where=2))
    with pytest.raises(Refused, match=r"layers without experts \(0\) are nothing that the class 'mixtral' has"):
        hand_over(tmp_path / "moe.onnx", "hf", tmp_path / "moe2", like=tmp_path / "Llama", source=small)
    assert "moe2" not in names_in(tmp_path)


@pytest.mark.parametrize(
    ("how", "experts", "message"),
    [
        ({"factor": 2}, Experts(4, 2), "with the same options grows them first and then makes the experts"),
        ({}, Experts(4, 2, shared=True), "has none without a gate. Leave out --shared-expert"),
    ],
)
def test_what_no_class_has_is_refused(
    how: dict[str, Any], experts: Experts, message: str, tmp_path: Path, cli: Command
) -> None:
    _, small = dense("Llama", tmp_path, cli)
    expand(small, tmp_path / "moe.onnx", experts=experts, check=False, **how)
    with pytest.raises(Refused, match=message):
        hand_over(tmp_path / "moe.onnx", "hf", tmp_path / "moe", like=tmp_path / "Llama", source=small)
    assert "moe" not in names_in(tmp_path)
