"""`handoff --to hf` writes a grown checkpoint that transformers loads, and that computes the same as its source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Command, names_in

from hyperclone_onnx import BadRequest, ModelsDiffer, Refused, Strategy, expand
from hyperclone_onnx.reading import loading

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("torch", "transformers", "safetensors"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
import transformers  # noqa: E402

from hyperclone_onnx.frameworks.checkpoints import read_weights  # noqa: E402
from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face import growing, read_trained, writing  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.growing import grow_checkpoint  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.groups import adamw_groups, not_exact  # noqa: E402
from models import zoo  # noqa: E402
from models.zoo_families import FAMILIES  # noqa: E402

Array = np.ndarray[Any, Any]
Exported = Callable[[str], Path]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A folder with a family's checkpoint, ``hf``, and its export, ``small.onnx``; by `family.sizing`."""
    zoo.quiet()
    transformers.utils.logging.disable_progress_bar()

    @cache
    def make(name: str) -> Path:
        family, sizing = name.split(".")
        folder = tmp_path_factory.mktemp(name)
        model = zoo.build(family, sizing)[0]
        model.save_pretrained(folder / "hf")
        export(model, FAMILIES[family].inputs, FAMILIES[family].output, folder / "small.onnx")
        return folder

    return make


def export(model: Any, inputs: tuple[str, ...], output: str, path: Path) -> None:
    """Export with dynamic lengths, like models/zoo.py."""
    from onnx_ir.passes.common import InlinePass
    from onnxscript.optimizer import optimize_ir

    examples = {name: zoo.example(name, model.config) for name in inputs}
    batch, sequence, target = (torch.export.Dim(name) for name in ("batch", "sequence", "target"))
    shapes = {
        name: {0: batch} if value.ndim > 2 else {0: batch, 1: target if name.startswith("decoder") else sequence}
        for name, value in examples.items()
    }
    program = torch.onnx.export(
        model,
        (),
        kwargs=examples,
        dynamo=True,
        dynamic_shapes=shapes,
        output_names=[output],
        optimize=False,
        verbose=False,
    )
    InlinePass()(program.model)
    optimize_ir(program.model, input_size_limit=128)
    ir.save(program.model, path)


def logits(model: Any, inputs: tuple[str, ...], seed: int = 5) -> Array:
    """The outputs of a model for random inputs of odd lengths, where the end of one sequence is masked."""
    torch.manual_seed(seed)
    feeds = {name: zoo.example(name, model.config) for name in inputs}
    if "attention_mask" in feeds:
        feeds["attention_mask"][-1, -2:] = 0
    with torch.no_grad():
        return np.asarray(model.float().eval()(**feeds)[0].numpy())


def loaded(folder: Path) -> Any:
    """The model, loaded as a user loads it."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder)


def tiled(array: Array, shape: tuple[int, ...]) -> Array:
    return np.tile(array, [new // old for old, new in zip(array.shape, shape, strict=True)])


DOUBLED = {"hidden_size": (48, 96), "intermediate_size": (56, 112), "num_attention_heads": (6, 12)}
GROUPED = DOUBLED | {"num_key_value_heads": (2, 4)}
SQRT_HALF, QUARTER = "times 0.70710678", "times 0.84089642"


def larger_heads(norm: str, projection: str, output: str) -> dict[str, str]:
    """The factors of each layer where the size of its heads doubles, behind a fused projection."""
    return {
        f"transformer.h.{layer}.{name}": text
        for layer in (0, 1)
        for name, text in (
            (f"{norm}.weight", QUARTER),
            (f"{norm}.bias", QUARTER),
            (f"{projection}.bias", QUARTER),
            (f"{output}.weight", "times 1.1892071"),
        )
    }


GROWN: dict[str, tuple[str, dict[str, int], dict[str, tuple[int, int]], dict[str, str]]] = {
    "llama": ("llama.distinct", {}, GROUPED, {}),
    "sizes that collide": (
        "llama.collide",
        {},
        {"hidden_size": (96, 192), "intermediate_size": (96, 192), "num_attention_heads": (8, 16)}
        | {"num_key_value_heads": (2, 4)},
        {},
    ),
    "feed-forward alone": ("llama.distinct", {"hidden": 1, "heads": 1}, {"intermediate_size": (56, 112)}, {}),
    "heads alone": (
        "qwen3.distinct",
        {"hidden": 1, "ffn": 1},
        {"num_attention_heads": (6, 12), "num_key_value_heads": (2, 4)},
        {},
    ),
    "another class of names, one fused matrix": (
        "gpt2.distinct",
        {},
        {"n_embd": (48, 96), "n_inner": (56, 112), "n_head": (6, 12)},
        {},
    ),
    "heads whose size grows, fused": (
        "gpt2.distinct",
        {"heads": 1, "head_dim": 2},
        {"n_embd": (48, 96), "n_inner": (56, 112)},
        larger_heads("ln_1", "attn.c_attn", "attn.c_proj"),
    ),
    "larger heads beside ALiBi, whose slopes come from their number": (
        "bloom.distinct",
        {"heads": 1, "head_dim": 2},
        {"hidden_size": (48, 96)},
        larger_heads("input_layernorm", "self_attention.query_key_value", "self_attention.dense"),
    ),
    "an embedding multiplied by the root of its width": (
        "gemma.distinct",
        {},
        GROUPED,
        {"model.embed_tokens.weight": SQRT_HALF, "model.norm.weight": "times 1.4142136 of it plus 1"},
    ),
    "a fused matrix of unequal parts": ("phi3.distinct", {}, GROUPED, {}),
    "an encoder": ("bert.distinct", {}, DOUBLED, {}),
    "an encoder and a decoder": (
        "bart.distinct",
        {},
        {"d_model": (48, 96), "encoder_ffn_dim": (56, 112), "decoder_ffn_dim": (56, 112)}
        | {"encoder_attention_heads": (6, 12), "decoder_attention_heads": (6, 12)},
        {},
    ),
    "images, sizes in a list": ("convnext.distinct", {}, {"hidden_sizes.0": (24, 48), "hidden_sizes.1": (40, 80)}, {}),
}


@pytest.mark.parametrize("name", GROWN)
def test_a_grown_checkpoint_computes_the_same_as_its_source(
    name: str, exported: Exported, tmp_path: Path, cli: Command
) -> None:
    zoo_name, requests, config, compensations = GROWN[name]
    folder = exported(zoo_name)
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2, requests, check=False)
    done = cli(
        "handoff", tmp_path / "big.onnx", "--to", "hf", "--like", folder / "hf", "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)["hugging_face"]
    assert {field: tuple(values) for field, values in report["config"].items()} == config
    assert report["compensations"] == compensations
    inputs = FAMILIES[zoo_name.split(".")[0]].inputs
    want, got = logits(loaded(folder / "hf"), inputs), logits(loaded(tmp_path / "out"), inputs)
    np.testing.assert_allclose(got, tiled(want, got.shape), atol=2e-5 * np.abs(want).max())
    back = read_trained(tmp_path / "out")
    stored = loading.load(tmp_path / "big.onnx").graph.initializers
    for initializer, array in back.items():
        np.testing.assert_allclose(array(), stored[initializer].const_value.numpy(), rtol=3e-7)


REFUSED = {
    "positions by heads (ALiBi)": (
        "bloom.distinct",
        {},
        "derives numbers from its sizes that are no repetition of the source's: what pow makes in transformer "
        "(0.003906 becomes 1.526e-05); try the size of a head instead of the number of heads: "
        "--set hidden=2 --set head_dim=2 --set ffn=2",
    ),
    "rotary angles by head size": (
        "llama.distinct",
        {"heads": 1, "head_dim": 2, "hidden": 1},
        "of the source's: model.rotary_emb.inv_freq (0.001 becomes 0.0003162); try the number of heads instead of the "
        "size of a head: --set heads=2",
    ),
    "no field for it": (
        "bert.distinct",
        {"hidden": 1, "ffn": 1},
        "BertConfig cannot say these sizes: with none of its settings has encoder.layer.0.attention.self.query.weight "
        "the shape [96, 48] (nearest: [48, 48])",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_growth_that_no_configuration_can_describe_is_refused(
    name: str, exported: Exported, tmp_path: Path, cli: Command
) -> None:
    zoo_name, requests, text = REFUSED[name]
    folder = exported(zoo_name)
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2, requests, check=False)
    done = cli("handoff", tmp_path / "big.onnx", "--to", "hf", "--like", folder / "hf", "-o", tmp_path / "out")
    assert done.code == 3 and text in done.error, done.stderr
    assert names_in(tmp_path) == {"big.onnx"}


# -- the wrong source -------------------------------------------------------------------------------------------


def _rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return act


def _one_weight(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] *= 1.01


def _another_model(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))


def _configured(**fields: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return act


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _half_indexed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


WRONG: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "not there": (shutil.rmtree, 4, "no such folder; --like names the checkpoint"),
    "no configuration": (lambda f: (f / "config.json").unlink(), 4, "no config.json: not a Hugging Face checkpoint"),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), 4, "not readable as JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 4, "there are no weights"),
    "pickles": (_pickled, 3, "its weights are pickles, which are not read (pytorch_model.bin)"),
    "half of the shards": (_half_indexed, 4, "model-00002-of-00002.safetensors that model.safetensors.index.json"),
    "truncated": (_truncated, 4, "its weights cannot be loaded"),
    "one weight": (_rewritten(_one_weight), 4, "1 of the 2688 elements of model.layers.1.mlp.up_proj.weight differ"),
    "another model": (_rewritten(_another_model), 4, "none of its 16 matrices is in the file"),
    "other sizes": (_configured(intermediate_size=57), 4, "weights and configuration do not fit together"),
    "an unknown model": (_configured(model_type="nonesuch"), 4, "does not read config.json"),
    "a size that transformers rejects": (_configured(hidden_size=50), 4, "hidden size (50) is not a multiple"),
    "no class": (_configured(architectures=None), 3, "config.json has no 'architectures'"),
    "an unknown class": (_configured(architectures=["NoneSuch"]), 3, "names no architecture that transformers"),
    "quantised": (_configured(quantization_config={"quant_method": "gptq"}), 3, "its weights are quantised"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_source_is_one_line(name: str, exported: Exported, tmp_path: Path, cli: Command) -> None:
    change, code, text = WRONG[name]
    expand(exported("llama.distinct") / "small.onnx", tmp_path / "big.onnx", 2, check=False)
    shutil.copytree(exported("llama.distinct") / "hf", tmp_path / "hf")
    change(tmp_path / "hf")
    done = cli("handoff", tmp_path / "big.onnx", "--to", "hf", "--like", tmp_path / "hf", "-o", tmp_path / "out")
    assert done.code == code and text in done.error, done.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in done.stderr


def test_a_file_that_was_not_grown_is_said(exported: Exported, tmp_path: Path, cli: Command) -> None:
    folder = exported("llama.distinct")
    done = cli("handoff", folder / "small.onnx", "--to", "hf", "--like", folder / "hf", "-o", tmp_path / "out")
    assert done.code == 2 and "carries no plan" in done.error


# -- training, and the way back -------------------------------------------------------------------------------


def replaced(big: Path, out: Path, arrays: Mapping[str, Callable[[], Array]]) -> Path:
    """The file, with other weights in it."""
    model = loading.load(big)
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(np.ascontiguousarray(array()), name=name, dtype=value.const_value.dtype)
    ir.save(model, out)
    return out


def in_onnx_runtime(path: Path, config: Any, inputs: tuple[str, ...]) -> Array:
    import onnxruntime as ort

    torch.manual_seed(5)
    feeds = {name: zoo.example(name, config).numpy() for name in inputs}
    if "attention_mask" in feeds:
        feeds["attention_mask"][-1, -2:] = 0
    return np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0])


@pytest.mark.parametrize("family", ["llama", "gemma", "opt_350m"])
def test_trained_weights_go_both_ways(family: str, exported: Exported, tmp_path: Path) -> None:
    folder, inputs = exported(f"{family}.distinct"), FAMILIES[family].inputs
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2, check=False)
    (tmp_path / "out").mkdir()
    grow_checkpoint(tmp_path / "big.onnx", folder / "hf", tmp_path / "out")
    model = loaded(tmp_path / "out")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained", max_shard_size="50KB")
    shutil.copy(tmp_path / "out" / HUGGING_FACE, tmp_path / "trained")
    assert len(list((tmp_path / "trained").glob("*.safetensors"))) > 1
    back = replaced(tmp_path / "big.onnx", tmp_path / "trained.onnx", read_trained(tmp_path / "trained"))
    want = logits(model, inputs)
    got = in_onnx_runtime(back, model.config, inputs)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())

    (tmp_path / "again").mkdir()
    with pytest.raises(
        BadRequest, match=r"has been trained .* name the ONNX file that it was grown from with --source"
    ):
        grow_checkpoint(back, folder / "hf", tmp_path / "again")
    report = grow_checkpoint(back, folder / "hf", tmp_path / "again", source=folder / "small.onnx")
    assert report.trained and report.error_to_source is None
    np.testing.assert_allclose(logits(loaded(tmp_path / "again"), inputs), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_checkpoint_trains_on_as_its_source(family: str, exported: Exported, tmp_path: Path) -> None:
    """The factors that are folded into stored tensors (Gemma's embedding) are part of a tensor's settings.

    Gemma stores its gains minus one. Where a factor is folded into a gain, the weight decay pulls to another number.
    """
    decay = 0.0 if family == "gemma" else 0.1
    folder, settings = exported(f"{family}.distinct"), {"lr": 1e-3, "eps": 1e-6, "weight_decay": decay}
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2, strategy=Strategy("symmetric"), check=False)
    (tmp_path / "out").mkdir()
    grow_checkpoint(tmp_path / "big.onnx", folder / "hf", tmp_path / "out")
    ids = torch.randint(3, 31, (12, 2, 9), generator=torch.Generator().manual_seed(1))
    curves = {}
    for kind in ("source", "followed", "one rate for all"):
        model = loaded(folder / "hf" if kind == "source" else tmp_path / "out").eval()
        groups = model.parameters()
        if kind == "followed":
            groups = adamw_groups(model, **settings, folder=tmp_path / "out")
            reasons = set(not_exact(model, tmp_path / "out").values())
            assert reasons == ({"weight decay pulls its stored numbers to another point"} if decay == 0 else set())
        optimizer = torch.optim.AdamW(groups, **settings)
        losses = []
        for batch in ids:
            losses.append(model(input_ids=batch, labels=batch).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        curves[kind] = np.array([float(loss) for loss in losses])
    assert np.abs(curves["followed"] - curves["source"]).max() < 2e-3
    assert np.abs(curves["one rate for all"] - curves["source"]).max() > 1e-2


DEEPER: dict[str, tuple[Any, dict[str, Any], dict[str, tuple[Any, Any]]]] = {
    "llama": ({"layers": 5, "layers_at": [0, 1, 1]}, DOUBLED, {"num_hidden_layers": (2, 5)}),
    "whisper": (
        {"layers": {"encoder": 3, "decoder": 4}},
        {},
        {"encoder_layers": (2, 3), "decoder_layers": (2, 4)},
    ),
    "convnext": ({"layers": {"stack0": 4}}, {}, {"depths.0": (2, 4)}),
}


@pytest.mark.parametrize("family", DEEPER)
def test_deeper_models_go_both_ways(family: str, exported: Exported, tmp_path: Path) -> None:
    folder, inputs = exported(f"{family}.distinct"), FAMILIES[family].inputs
    how, wider, fields = DEEPER[family]
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2 if wider else 1, **how, check=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match=r"more layers than its source .* name the ONNX file .* with --source"):
        grow_checkpoint(tmp_path / "big.onnx", folder / "hf", tmp_path / "out")
    report = grow_checkpoint(tmp_path / "big.onnx", folder / "hf", tmp_path / "out", source=folder / "small.onnx")
    assert report.config.items() >= {**wider, **fields}.items() and bool(wider) == (len(report.config) > len(fields))
    model = loaded(tmp_path / "out")
    want, got = logits(loaded(folder / "hf"), inputs), logits(model, inputs)
    np.testing.assert_allclose(got, tiled(want, got.shape), atol=2e-5 * np.abs(want).max())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    shutil.copy(tmp_path / "out" / HUGGING_FACE, tmp_path / "trained")
    back = replaced(tmp_path / "big.onnx", tmp_path / "trained.onnx", read_trained(tmp_path / "trained"))
    want, got = logits(model, inputs), in_onnx_runtime(back, model.config, inputs)
    np.testing.assert_allclose(got, want, atol=5e-5 * np.abs(want).max())


def test_layers_that_a_configuration_cannot_say_are_refused(tmp_path: Path) -> None:
    """This GPT-2 divides the scores of layer 1 by 2, and those of layer 2 by 3."""
    family = FAMILIES["gpt2"]
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(
        **sizes, **ids, use_cache=False, initializer_range=0.4, scale_attn_by_inverse_layer_idx=True
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    export(model, family.inputs, family.output, tmp_path / "small.onnx")
    for number, at in enumerate([[1], [0]]):
        big, out = tmp_path / f"big{number}.onnx", tmp_path / f"out{number}"
        expand(tmp_path / "small.onnx", big, layers=3, layers_at=at)
        out.mkdir()
        if at == [1]:  # the new layer is the last one, so that the others keep their numbers
            assert grow_checkpoint(big, tmp_path / "hf", out, source=tmp_path / "small.onnx").config == {
                "n_layer": (2, 3)
            }
            continue
        with pytest.raises(Refused, match="a new layer would be of another kind than the one that it is a copy of"):
            grow_checkpoint(big, tmp_path / "hf", out, source=tmp_path / "small.onnx")


def test_tensors_that_the_file_cannot_hold_are_reported(exported: Exported, tmp_path: Path) -> None:
    folder = exported("bert.distinct")
    with_pooler = transformers.BertModel.from_pretrained(folder / "hf", add_pooling_layer=True)
    with_pooler.save_pretrained(tmp_path / "hf")
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2, check=False)
    (tmp_path / "out").mkdir()
    report = grow_checkpoint(tmp_path / "big.onnx", tmp_path / "hf", tmp_path / "out")
    assert sorted(report.repeated) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert report.compensations == {"pooler.dense.weight": "times 0.5"}
    assert read_trained(tmp_path / "out")
    model = loaded(tmp_path / "out")
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] += 0.5
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(BadRequest, match=r"pooler\.dense\.weight was trained, and the ONNX file has no place for it"):
        read_trained(tmp_path / "out")


# -- the checks can fail --------------------------------------------------------------------------------------


def _without_compensation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "measured", lambda *_: {})


def _with_one_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.write_safetensors

    def wrong(entries: dict[str, Any], *rest: Any, **options: Any) -> Any:
        name = "model.layers.1.mlp.down_proj.weight"
        array = np.array(entries[name])
        array[0] *= 1.5
        return write({**entries, name: array}, *rest, **options)

    monkeypatch.setattr(writing, "write_safetensors", wrong)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without_compensation, "the grown checkpoint's output logits differs from its source's"),
        (_with_one_wrong_weight, r"the grown checkpoint is wrong: model\.layers\.1\.mlp\.down_proj\.weight"),
    ],
)
def test_a_wrong_checkpoint_is_noticed(
    harm: Callable[[pytest.MonkeyPatch], None],
    message: str,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = exported("gemma.distinct")
    expand(folder / "small.onnx", tmp_path / "big.onnx", 2, check=False)
    harm(monkeypatch)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelsDiffer, match=message):
        grow_checkpoint(tmp_path / "big.onnx", folder / "hf", tmp_path / "out")


def test_a_sharded_checkpoint_in_half_precision_stays_one(exported: Exported, tmp_path: Path, cli: Command) -> None:
    """Its file is in float32, as most exporters write it. --dtype and --max-shard-size change what is written."""
    folder, inputs = exported("llama.distinct"), FAMILIES["llama"].inputs
    model = loaded(folder / "hf").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    export(loaded(tmp_path / "hf").float(), inputs, "logits", tmp_path / "small.onnx")
    expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 3, check=False)
    want = logits(loaded(tmp_path / "hf"), inputs)
    largest = max(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    options: dict[str, tuple[list[str], str, int]] = {
        "as it was": ([], "bfloat16", largest),
        "wider": (["--dtype", "float32", "--max-shard-size", "0.0001"], "float32", 100_000),
    }
    for name, (words, dtype, bound) in options.items():
        out = tmp_path / name
        done = cli("handoff", tmp_path / "big.onnx", "--to", "hf", "--like", tmp_path / "hf", "-o", out, *words)
        assert done.code == 0, done.stderr
        written = read_weights(out)
        files = [file.stat().st_size for file in out.glob("*.safetensors")]
        widest = max(array.dtype.itemsize * int(np.prod(array.shape)) for array in written.values())
        assert len(files) > 2 and max(files) <= max(bound, widest) + 8192
        assert {str(array.dtype) for array in written.values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        np.testing.assert_allclose(logits(loaded(out), inputs), want, atol=2e-5 * np.abs(want).max())
