"""A model of several files grows as one: each file grows by itself, and the grown files fit together."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Command, build_model, names_in, normal, perceptron

from hyperclone_onnx import BadRequest, Refused, expand
from hyperclone_onnx.expansion.expanding import plan_file
from hyperclone_onnx.folders import check_fit, layers_by_model
from hyperclone_onnx.planning.configuration import NotSaid, grown_configuration

Zoo = Callable[[str], Path]


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture
def parts(zoo: Zoo, tmp_path: Path) -> Path:
    """T5 in the form in which its exporter writes it: an encoder, a decoder, and their other files."""
    folder = tmp_path / "t5"
    (folder / "onnx").mkdir(parents=True)
    for part in ("encoder", "decoder"):
        (folder / "onnx" / f"{part}_model.onnx").write_bytes(zoo(f"t5_{part}.torchscript").read_bytes())
    (folder / "config.json").write_text('{"d_model": 48}')
    (folder / "model.safetensors").write_bytes(b"the small model's weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    return folder


def run_both(folder: Path) -> np.ndarray:
    """The decoder's outputs, computed from the encoder's."""
    rng = np.random.default_rng(3)
    encoder, decoder = (session(folder / "onnx" / f"{part}_model.onnx") for part in ("encoder", "decoder"))
    ids = rng.integers(3, 95, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    outputs = dict(zip([o.name for o in encoder.get_outputs()], encoder.run(None, feeds), strict=True))
    feeds = {
        "input_ids": rng.integers(3, 95, (2, 4)),
        "encoder_attention_mask": np.ones_like(ids),
        "encoder_hidden_states": outputs["last_hidden_state"],
    }
    names = {value.name for value in decoder.get_inputs()}
    return np.asarray(decoder.run(["logits"], {k: v for k, v in feeds.items() if k in names})[0])


def test_an_encoder_and_its_decoder(cli: Command, parts: Path, tmp_path: Path) -> None:
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu", "--json")
    assert done.code == 0, done.error
    report = json.loads(done.stdout)
    assert sorted(report["models"]) == ["onnx/decoder_model.onnx", "onnx/encoder_model.onnx"]
    assert report["copied"] == ["tokenizer.json"]
    assert sorted(report["left_out"]) == ["config.json", "model.safetensors"]
    assert names_in(tmp_path / "big") == {"tokenizer.json", "onnx"}
    assert names_in(tmp_path) == {"t5", "big"}
    small, big = run_both(parts), run_both(tmp_path / "big")
    np.testing.assert_allclose(big, small, atol=1e-5 * float(np.abs(small).max()))


def test_layers_are_spread_over_the_files(cli: Command, parts: Path, tmp_path: Path) -> None:
    done = cli("expand", parts, "--layers", "3", "-o", tmp_path / "no", "--device", "cpu")
    assert done.code == 2 and "Say how many layers each has: --layers decoder=3,encoder=3" in done.error
    assert names_in(tmp_path) == {"t5"}
    words = ("--layers", "encoder=3,decoder=4", "--set", "ffn=2", "-o", tmp_path / "big", "--device", "cpu", "--json")
    done = cli("expand", parts, *words)
    assert done.code == 0, done.error
    models = json.loads(done.stdout)["models"]
    assert {name: model["layers"] for name, model in models.items()} == {
        "onnx/decoder_model.onnx": {"layers": [2, 4]},
        "onnx/encoder_model.onnx": {"layers": [2, 3]},
    }
    small, big = run_both(parts), run_both(tmp_path / "big")
    np.testing.assert_allclose(big, small, atol=1e-5 * float(np.abs(small).max()))
    done = cli("expand", parts, "--layers", "middle=3", "-o", tmp_path / "no")
    assert done.code == 2 and "has a stack of layers 'middle'. They have" in done.error


def test_the_later_steps_of_a_decoder_are_the_decoder_too(parts: Path, zoo: Zoo) -> None:
    """Their file reads the cache that the decoder makes, and nothing else of the encoder."""
    (parts / "onnx" / "decoder_with_past_model.onnx").write_bytes(zoo("t5_decoder.cached").read_bytes())
    models = [Path("onnx") / f"{part}_model.onnx" for part in ("encoder", "decoder", "decoder_with_past")]
    encoder, *decoders = models
    layers = layers_by_model(parts, models, {"encoder": 3, "decoder": 4})
    assert layers == {encoder: {"layers": 3}, **{model: {"layers": 4} for model in decoders}}
    assert layers_by_model(parts, models, {"encoder": 3}) == {encoder: {"layers": 3}}
    assert layers_by_model(parts, models[::2], {"layers": 4}) == {model: {"layers": 4} for model in models[::2]}


def test_a_cache_of_other_layers_is_noticed(parts: Path, zoo: Zoo, tmp_path: Path) -> None:
    small, big = parts / "onnx", tmp_path / "big"
    models = [Path("decoder_model.onnx"), Path("decoder_with_past_model.onnx")]
    (small / models[1]).write_bytes(zoo("t5_decoder.cached").read_bytes())
    big.mkdir()
    for model in models:
        expand(small / model, big / model, layers=3, check=False)
    check_fit(small, big, models)
    (big / models[1]).write_bytes((small / models[1]).read_bytes())
    with pytest.raises(Refused, match=r"share a cache, and would have caches of different layers"):
        check_fit(small, big, models)


def test_a_model_whose_layers_are_not_found_shares_no_cache_with_a_deeper_one(zoo: Zoo, tmp_path: Path) -> None:
    for name, graph in (("decoder.onnx", "t5_decoder.cached"), ("merged.onnx", "t5_merged.cached")):
        (tmp_path / name).write_bytes(zoo(graph).read_bytes())
    models = [Path("decoder.onnx"), Path("merged.onnx")]
    assert layers_by_model(tmp_path, models[:1], 3) == {models[0]: {"layers": 3}}
    with pytest.raises(BadRequest, match=r"merged.onnx: no layers .* shares a cache .* --exclude merged.onnx"):
        layers_by_model(tmp_path, models, 3)


def test_the_report_in_words(cli: Command, parts: Path, tmp_path: Path) -> None:
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate")
    assert done.code == 0, done.error
    assert "onnx/encoder_model.onnx" in done.stdout
    assert "copied as they are: tokenizer.json" in done.stdout
    assert "left out: config.json: it describes the small model" in done.stdout
    assert "left out: model.safetensors: it holds the small model's weights" in done.stdout
    assert f"2 models grown, fitting together, but not validated: {tmp_path / 'big'}" in done.stdout.replace("\n", "")


def test_files_about_the_small_model_stay_where_nothing_grows(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    onnx.save(build_model("g (float[n] x) => (float[n] y) { y = Relu (x) }", {}), folder / "detail.onnx")
    for name in ("config.json", "genai_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--json")
    assert done.code == 0 and json.loads(done.stdout)["left_out"] == {}, done.error
    assert names_in(tmp_path / "big") == names_in(folder)


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "bos_token_id": 48,
}
"""The configuration of the zoo's Llama, but for the width of its feed-forward layers."""

CONFIGS: dict[str, tuple[dict[str, object], list[str], dict[str, tuple[int, int]] | str]] = {
    "all widths": (
        {},
        ["--factor", "2"],
        {"hidden_size": (48, 96), "num_attention_heads": (6, 12), "num_key_value_heads": (2, 4), "FFN": (1, 2)},
    ),
    "heads that follow": (
        {"head_dim": None},
        ["--factor", "2"],
        {"hidden_size": (48, 96), "num_attention_heads": (6, 12), "num_key_value_heads": (2, 4), "FFN": (1, 2)},
    ),
    "ffn alone": ({}, ["--set", "ffn=2"], {"FFN": (1, 2)}),
    "a multiple of the width": (
        {"FFN": None},
        ["--factor", "2"],
        {"hidden_size": (48, 96), "num_attention_heads": (6, 12), "num_key_value_heads": (2, 4)},
    ),
    "the interface kept": ({}, ["--factor", "2", "--interface", "keep"], {}),
    "a width that is said nowhere": (
        {"FFN": None},
        ["--set", "ffn=2"],
        "ffn .* becomes .*, and no field of it says so",
    ),
    "heads that do not follow": (
        {"head_dim": None},
        ["--set", "hidden=2"],
        "head_dim stays 8, and no field of it says so",
    ),
    "no sizes": ({"num_attention_heads": None}, ["--factor", "2"], "heads 6 becomes 12, and no field of it says so"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_grows_or_is_left_out(name: str, zoo: Zoo, cli: Command, tmp_path: Path) -> None:
    other, words, want = CONFIGS[name]
    folder = tmp_path / "llama"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(zoo("llama.cached").read_bytes())
    ffn = next(size.before for size in plan_file(zoo("llama.cached"), 2).sizes if size.role == "ffn")
    fields = {**LLAMA_CONFIG, "FFN": ffn, **other}
    fields["intermediate_size"] = fields.pop("FFN")
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    done = cli("expand", folder, "-o", tmp_path / "big", "--no-validate", "--json", *words)
    assert done.code == 0, done.error
    report = json.loads(done.stdout)
    if isinstance(want, str):
        assert re.search(want, report["left_out"]["config.json"])
        assert not (tmp_path / "big" / "config.json").exists()
        return
    changed = {("intermediate_size" if key == "FFN" else key): pair for key, pair in want.items()}
    changed |= {"intermediate_size": (ffn, 2 * ffn)} if "FFN" in want else {}
    assert {key: tuple(pair) for key, pair in report["changed"]["config.json"].items()} == changed
    grown = json.loads((tmp_path / "big" / "config.json").read_text())
    assert grown == {**fields, **{key: after for key, (_, after) in changed.items()}}


T5_CONFIG = {
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 56,
    "num_heads": 6,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 101,
}
"""The configuration of the zoo's T5, as far as it says sizes."""

T5_GROWN: dict[str, tuple[list[str], dict[str, int]]] = {
    "all widths": (["--factor", "2"], {"d_model": 96, "d_ff": 112, "num_heads": 12}),
    "layers": (["--layers", "encoder=3,decoder=3"], {"num_layers": 3, "num_decoder_layers": 3}),
}


@pytest.mark.parametrize("name", T5_GROWN)
def test_the_configuration_of_an_encoder_and_its_decoder_grows(
    name: str, parts: Path, cli: Command, tmp_path: Path
) -> None:
    words, changed = T5_GROWN[name]
    (parts / "config.json").write_text(json.dumps(T5_CONFIG))
    done = cli("expand", parts, "-o", tmp_path / "big", "--no-validate", "--json", *words)
    assert done.code == 0, done.error
    assert "config.json" not in json.loads(done.stdout)["left_out"]
    assert json.loads((tmp_path / "big" / "config.json").read_text()) == {**T5_CONFIG, **changed}


def test_without_its_encoder_nothing_says_what_a_width_of_a_decoder_is(
    parts: Path, cli: Command, tmp_path: Path
) -> None:
    (parts / "config.json").write_text(json.dumps(T5_CONFIG))
    (parts / "onnx" / "encoder_model.onnx").unlink()
    done = cli("expand", parts, "-o", tmp_path / "big", "--no-validate", "--json", "--factor", "2")
    assert done.code == 0, done.error
    why = json.loads(done.stdout)["left_out"]["config.json"]
    assert "width 48 becomes 96, and no field of it says so" in why


def test_one_field_cannot_say_two_sizes() -> None:
    with pytest.raises(NotSaid, match="hidden 48 becomes 96 and 48, and one field says both"):
        grown_configuration({"hidden_size": 48}, [("hidden", 48, 96), ("hidden", 48, 48)])
    fields = {"text_config": {"hidden_size": 48}, "vision_config": {"hidden_size": 32}}
    grown = grown_configuration(fields, [("hidden", 48, 96)])
    assert grown.changed == {"text_config.hidden_size": (48, 96)}


GENAI = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_size": 8, "num_hidden_layers": 2}
GENAI_GROWN: dict[str, tuple[dict[str, int], list[str], dict[str, int]]] = {
    "all widths": (GENAI, ["--factor", "2"], {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}),
    "ffn alone": (GENAI, ["--set", "ffn=2"], {}),
    "layers": (GENAI, ["--layers", "3"], {"num_hidden_layers": 3}),
    "the interface kept": (GENAI, ["--factor", "2", "--interface", "keep"], {}),
}


@pytest.mark.parametrize("name", GENAI_GROWN)
def test_the_configuration_of_onnx_runtime_genai_grows(name: str, zoo: Zoo, cli: Command, tmp_path: Path) -> None:
    decoder, words, changed = GENAI_GROWN[name]
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(zoo("llama.cached").read_bytes())
    fields = {"model": {"decoder": {**decoder, "filename": "model.onnx"}, "vocab_size": 96}, "search": {"top_k": 48}}
    (folder / "genai_config.json").write_text(json.dumps(fields))
    done = cli("expand", folder, "-o", tmp_path / "big", "--no-validate", "--json", *words)
    assert done.code == 0, done.error
    report = json.loads(done.stdout)
    assert {key: after for key, (_, after) in report["changed"]["genai_config.json"].items()} == changed
    fields["model"]["decoder"].update(changed)
    assert json.loads((tmp_path / "big" / "genai_config.json").read_text()) == fields


def pair(tmp_path: Path, width: str) -> Path:
    """Two models, of which one reads the output of the other, along a width that one of them cannot grow."""
    folder = tmp_path / "pair"
    folder.mkdir()
    maker = perceptron(layers=1)
    maker.graph.output[0].name = "encoder_hidden_states"
    maker.graph.node[-1].output[0] = "encoder_hidden_states"
    onnx.save(maker, folder / "encoder.onnx")
    weights = normal(4, {"gain": (31,), "up": (31, 20), "down": (20, 31)})
    reader = build_model(
        f"""g (float[batch, sequence, 31] encoder_hidden_states) => (float[batch, sequence, 31] out) {{
            n = LayerNormalization (encoder_hidden_states, gain)
            u = MatMul (n, up)
            r = Relu (u)
            {width}
        }}""",
        weights,
    )
    onnx.save(reader, folder / "decoder.onnx")
    return folder


def test_files_that_would_no_longer_fit_are_refused(cli: Command, tmp_path: Path) -> None:
    """The logits of one model keep their size, but the other model would read them with twice the size."""
    folder = pair(tmp_path, "out = MatMul (r, down)")
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu")
    assert (done.code, done.stdout) == (3, "")
    assert "decoder.onnx would have 62 and encoder.onnx 31 along axis 2 of encoder_hidden_states" in done.error
    assert "no longer fit together" in done.error
    assert names_in(tmp_path) == {"pair"}


def test_a_model_in_which_nothing_grows_is_copied(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    folder.mkdir()
    onnx.save(perceptron(), folder / "model.onnx")
    onnx.save(build_model("g (float[n] x) => (float[n] y) { y = Relu (x) }", {}), folder / "detail.onnx")
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu")
    assert done.code == 0, done.error
    assert "copied, for nothing in them can grow: detail.onnx" in done.stdout
    assert (tmp_path / "big" / "detail.onnx").read_bytes() == (folder / "detail.onnx").read_bytes()


def test_external_data_is_no_other_file(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(
        perceptron(), folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu", "--json")
    assert done.code == 0, done.error
    assert json.loads(done.stdout)["copied"] == []
    assert names_in(tmp_path / "big") == {"model.onnx", "model.onnx.data"}


def test_a_role_of_some_files_only(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    onnx.save(perceptron(), folder / "a.onnx")
    weights = {"up": np.ones((4, 5), np.float32), "down": np.ones((5, 4), np.float32)}
    onnx.save(
        build_model(
            "g (float[n, 4] x) => (float[n, 4] y) { u = MatMul (x, up) r = Relu (u) y = MatMul (r, down) }", weights
        ),
        folder / "b.onnx",
    )
    done = cli("expand", folder, "--set", "ffn=2", "--set", "hidden=1", "-o", tmp_path / "big", "--device", "cpu")
    assert done.code == 0, done.error
    done = cli("expand", folder, "--set", "fnn=2", "-o", tmp_path / "other")
    assert done.code == 2 and "no model in" in done.error and "'fnn'" in done.error
    done = cli("expand", folder, "--set", "ffn.0=2", "-o", tmp_path / "other")
    assert done.code == 2 and "numbered dimensions are one file's own" in done.error


def test_a_file_that_is_refused_is_named_and_can_be_left_out(cli: Command, parts: Path, tmp_path: Path) -> None:
    weights = normal(0, {"table": (31, 12), "gain": (12,), "head": (12, 31)})
    body = "h = Gather (table, ids) n = LayerNormalization (h, gain) s = LogSoftmax <axis = -1> (n)"
    body += " y = MatMul (s, head)"
    onnx.save(build_model(f"g (int64[b, s] ids) => (float[b, s, 31] y) {{ {body} }}", weights), parts / "odd.onnx")
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate")
    assert done.code == 3
    assert done.error.startswith("error: odd.onnx: hidden") and done.error.endswith("--exclude odd.onnx")
    assert names_in(tmp_path) == {"t5"}
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate", "--exclude", "odd.onnx")
    assert done.code == 0, done.error
    assert "odd.onnx" not in names_in(tmp_path / "big")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(cli: Command, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (parts / "notes.txt").symlink_to(tmp_path / "secret")
    (parts / "inside.json").symlink_to(parts / "tokenizer.json")
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate")
    assert done.code == 2 and "notes.txt: a link that leads out of the folder" in done.error
    assert names_in(tmp_path) == {"t5", "secret"}
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate", "--exclude", "notes.txt")
    assert done.code == 0 and names_in(tmp_path / "big") == {"tokenizer.json", "inside.json", "onnx"}


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("config.json pytorch_model.bin", "its weights are pickles, which are not read (pytorch_model.bin)"),
        ("config.json", "there are no weights: config.json is there, and no model.safetensors"),
        ("config.json model.gguf", "in a format that is not read (model.gguf)"),
        ("model.safetensors", "has model.safetensors and no config.json"),
        ("adapter_config.json adapter_model.safetensors", "a PEFT adapter, and no model: merge it"),
        ("tokenizer.json", "and no Hugging Face model (config.json and model.safetensors)"),
    ],
)
def test_a_folder_without_a_model_says_what_it_has(cli: Command, tmp_path: Path, names: str, error: str) -> None:
    source = tmp_path / "there"
    source.mkdir()
    for name in names.split():
        (source / name).write_text("{}")
    done = cli("expand", source, "--factor", "2", "-o", tmp_path / "big")
    assert done.code == 4 and error in done.error
    assert names_in(tmp_path) == {"there"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["t5", "-o", "t5/big"], "lies in the source folder"),
        (["t5", "-o", "there"], "exists already"),
        (["t5", "-o", "no/big"], "does not exist"),
        (["there/empty", "-o", "big"], "no .onnx file in this folder"),
        (["t5", "-o", "big", "--plan-out", "plan.json"], "--plan-out is for one model"),
        (["t5/onnx/encoder_model.onnx", "-o", "big.onnx", "--exclude", "a"], "MODEL is a file"),
    ],
)
def test_wrong_folders(
    cli: Command, parts: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(parts.parent)
    Path("there/empty").mkdir(parents=True)
    done = cli("expand", *arguments, "--factor", "2")
    assert done.code in (2, 4) and error in done.stderr
    assert names_in(Path()) == {"t5", "there"}


def test_a_folder_within_that_cannot_be_read_is_told(
    cli: Command, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report does not omit what the folder contains."""
    scan = os.scandir

    def forbidden(path: str) -> object:
        if str(path).endswith("onnx"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate")
    assert (done.code, done.error) == (4, f"error: {parts}/onnx: cannot be read (Permission denied)")
    monkeypatch.undo()
    assert names_in(tmp_path) == {"t5"}


@pytest.mark.parametrize("target", ["onnx", "nowhere"])
def test_a_link_to_a_folder_or_to_nothing_is_told(target: str, cli: Command, parts: Path, tmp_path: Path) -> None:
    (parts / "latest").symlink_to(parts / target)
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate")
    assert done.code == 2 and "latest: a link to a folder, or to nothing" in done.error
    assert names_in(tmp_path) == {"t5"}
    done = cli("expand", parts, "--factor", "2", "-o", tmp_path / "big", "--no-validate", "--exclude", "latest")
    assert done.code == 0 and names_in(tmp_path / "big") == {"tokenizer.json", "onnx"}


# -- external data ----------------------------------------------------------------------------------------


def save_split(model: onnx.ModelProto, path: Path, location: str) -> None:
    """A model with its weights in another file, which may be in a subfolder."""
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)


def fixed() -> onnx.ModelProto:
    """A model with a weight in which nothing can grow: a table that only goes to an output."""
    return build_model("g (int64[n] ids) => (float[n, 5] y) { y = Gather (table, ids) }", normal(5, {"table": (7, 5)}))


def run_fixed(path: Path) -> np.ndarray:
    return np.asarray(session(path).run(None, {"ids": np.arange(7)})[0])


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("grown_first", [True, False])
@pytest.mark.parametrize("location", ["fixed.bin", "weights/fixed.bin"])
def test_a_model_that_is_copied_takes_its_own_data_along_and_no_other_s(
    cli: Command, tmp_path: Path, grown_first: bool, location: str
) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    grown, copied = ("a.onnx", "b.onnx") if grown_first else ("b.onnx", "a.onnx")
    save_split(perceptron(), folder / grown, "grown.bin")
    save_split(fixed(), folder / copied, location)
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu", "--json")
    assert done.code == 0, done.error
    report = json.loads(done.stdout)
    assert (report["unchanged"], list(report["models"]), report["copied"]) == ([copied], [grown], [])
    assert files_in(tmp_path / "big") == {grown, f"{grown}.data", copied, location}
    np.testing.assert_array_equal(run_fixed(tmp_path / "big" / copied), run_fixed(folder / copied))


@pytest.mark.parametrize("grown_first", [True, False])
def test_a_model_that_is_copied_keeps_data_that_is_named_as_another_s(
    cli: Command, tmp_path: Path, grown_first: bool
) -> None:
    """The grown model would give its own data this name, and therefore takes another one."""
    folder = tmp_path / "two"
    folder.mkdir()
    grown, copied = ("a.onnx", "b.onnx") if grown_first else ("b.onnx", "a.onnx")
    save_split(perceptron(), folder / grown, "weights.bin")
    save_split(fixed(), folder / copied, f"{grown}.data")
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu")
    assert done.code == 0, done.error
    assert files_in(tmp_path / "big") == {grown, f"{grown}.1.data", copied, f"{grown}.data"}
    np.testing.assert_array_equal(run_fixed(tmp_path / "big" / copied), run_fixed(folder / copied))
    assert cli("validate", folder / grown, tmp_path / "big" / grown, "--device", "cpu").code == 0


def test_two_models_share_one_data_file(cli: Command, tmp_path: Path) -> None:
    """One model grows and no longer needs the file. The other model is copied and still needs it."""
    folder = tmp_path / "two"
    folder.mkdir()
    save_split(perceptron(), folder / "a.onnx", "a.onnx.data")
    other = onnx.load(folder / "a.onnx", load_external_data=False)
    table = next(tensor for tensor in other.graph.initializer if tensor.name == "embedding")
    del other.graph.initializer[:], other.graph.node[1:]
    other.graph.initializer.append(table)
    other.graph.node[0].output[0] = "logits"
    other.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 12
    (folder / "b.onnx").write_bytes(other.SerializeToString())
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu")
    assert done.code == 0, done.error
    assert files_in(tmp_path / "big") == {"a.onnx", "a.onnx.1.data", "b.onnx", "a.onnx.data"}
    feeds = {"ids": np.arange(6).reshape(2, 3)}
    before, after = (session(place / "b.onnx").run(None, feeds)[0] for place in (folder, tmp_path / "big"))
    np.testing.assert_array_equal(before, after)


def test_other_files_keep_their_names(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_split(perceptron(), folder / "model.onnx", "weights.bin")
    (folder / "model.onnx.data").write_text("notes on the data")
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--device", "cpu")
    assert done.code == 0, done.error
    assert files_in(tmp_path / "big") == {"model.onnx", "model.onnx.1.data", "model.onnx.data"}
    assert (tmp_path / "big" / "model.onnx.data").read_text() == "notes on the data"


def test_the_data_of_a_model_that_is_left_out_is_left_out(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a", "b"):
        save_split(perceptron(), folder / f"{name}.onnx", f"{name}.bin")
    (folder / "c.onnx").write_text("no model")
    done = cli("expand", folder, "--factor", "2", "-o", tmp_path / "big", "--exclude", "[bc].onnx", "--device", "cpu")
    assert done.code == 0, done.error
    assert files_in(tmp_path / "big") == {"a.onnx", "a.onnx.data"}
