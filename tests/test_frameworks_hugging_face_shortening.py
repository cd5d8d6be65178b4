"""Constants are measured on a few layers of a checkpoint, and on all of them where the few do not say enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import transformers  # noqa: E402
from test_frameworks_hugging_face import tiled  # noqa: E402
from test_frameworks_hugging_face_folder import checkpoint, logits, tokens  # noqa: E402

from hyperclone_onnx.frameworks.hugging_face import expand_checkpoint, growing  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.checkpoint import read_checkpoint, stored_tensors  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, changed_fields  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.shortening import for_all_layers, shortened  # noqa: E402

SIZES = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 3, "head_dim": 8}


def gemma(layers: int = 4) -> Any:
    """A model that multiplies its embedding by a constant made of its width, with layers of two kinds."""
    sizes = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64, "query_pre_attn_scalar": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, num_hidden_layers=layers))


def t5() -> Any:
    sizes = {"vocab_size": 90, "d_model": 24, "d_kv": 8, "d_ff": 28, "num_heads": 3}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_layers=3, num_decoder_layers=5))


def test_a_shorter_list_takes_the_changes_of_the_entries_that_it_has() -> None:
    changes = [Change(("conv_dim", number), 24, 48) for number in range(3)]
    assert changed_fields({"conv_dim": [24, 24, 24]}, changes) == {"conv_dim": [48, 48, 48]}
    assert changed_fields({"conv_dim": [24, 24]}, changes) == {"conv_dim": [48, 48]}


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (gemma, {"num_hidden_layers": 2}),
        (t5, {"num_layers": 2, "num_decoder_layers": 2}),
        (lambda: gemma(2), None),
    ],
    ids=["lists with an entry for each layer", "two stacks", "too few layers"],
)
def test_the_number_of_layers_is_found(build: Any, fields: dict[str, int] | None, tmp_path: Path) -> None:
    folder = checkpoint(build, tmp_path / "small")
    read = read_checkpoint(folder)
    whole = {name: tuple(tensor.shape) for name, tensor in stored_tensors(build()).items()}
    short = shortened(read, whole)
    if fields is None:
        assert short is None
        return
    assert short is not None
    before, after = read.config.to_dict(), short.config.to_dict()
    lists = [key for key, value in after.items() if isinstance(value, list) and value != before[key]]
    assert {key: after[key] for key in before if before[key] != after[key] and key not in lists} == fields
    assert all(after[key] == before[key][:2] for key in lists)


TWICE, THRICE = Compensation(2.0), Compensation(3.0)


@pytest.mark.parametrize(
    ("folded", "names", "want"),
    [
        ({}, ["a.0.w", "a.1.w", "a.2.w", "b"], {}),
        ({"b": TWICE}, ["a.0.w", "a.1.w", "a.2.w", "b"], {"b": TWICE}),
        (
            {"a.0.w": TWICE, "a.1.w": Compensation(2.0 + 1e-9)},
            ["a.0.w", "a.1.w", "a.2.w", "b"],
            {"a.0.w": TWICE, "a.1.w": Compensation(2.0 + 1e-9), "a.2.w": TWICE},
        ),
        ({"a.0.w": TWICE, "a.1.w": THRICE}, ["a.0.w", "a.1.w", "a.2.w", "b"], None),
        ({"a.0.w": TWICE}, ["a.0.w", "a.1.w", "a.2.w", "b"], None),
        ({}, ["a.0.w", "a.1.w", "b", "c.2.w"], None),
    ],
)
def test_factors_of_all_layers(folded: dict[str, Compensation], names: list[str], want: Any) -> None:
    factors = for_all_layers(folded, ["a.0.w", "a.1.w", "b"], names)
    if want is None:
        assert factors is None
        return
    assert factors is not None and factors.keys() == want.keys()
    assert all(abs(factors[name].factor - want[name].factor) < 1e-6 for name in want)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_checkpoint_of_many_layers(wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the factors are wrong, the comparison with the source notices it, and all layers are measured."""
    measured: list[int] = []

    def recorded(folded: Any, names: Any, every: Any) -> Any:
        measured.append(len(names))
        factors = for_all_layers(folded, names, every)
        return {**(factors or {}), "model.norm.weight": THRICE} if wrong and len(measured) == 1 else factors

    monkeypatch.setattr(growing, "for_all_layers", recorded)
    small, stages = checkpoint(gemma, tmp_path / "small"), list[str]()
    report = expand_checkpoint(small, tmp_path / "big", 2, notify=stages.append)
    assert ("measuring all layers" in stages) == wrong
    assert len(measured) == 1 + wrong and measured == sorted(measured)
    assert "model.embed_tokens.weight" in report.handover.hugging_face["compensations"]
    want, got = (logits(folder, {"input_ids": tokens(7)}) for folder in (small, tmp_path / "big"))
    np.testing.assert_allclose(got, tiled(want, got.shape), atol=2e-5 * np.abs(want).max())
