"""Trained weights return into an ONNX file, or nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Command, names_in, perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Zoo = Callable[[str], Path]


def write_safetensors(path: Path, tensors: dict[str, Any]) -> Path:
    safetensors.save_file({name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, path)
    return path


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


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
def test_onnx_runtime_runs_the_trained_weights(family: str, zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    source = zoo(f"{family}.distinct")
    model = trained(source)
    file = write_safetensors(tmp_path / "w.safetensors", {n: p.detach() for n, p in model.named_parameters()})
    done = cli("absorb", source, file, "-o", tmp_path / "trained.onnx")
    assert done.code == 0 and done.stdout.rstrip().endswith("0 kept, as PyTorch computes it")
    ids = torch.randint(0, 95, (2, 7))
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids)).numpy()
    assert np.abs(logits(tmp_path / "trained.onnx", ids) - expected).max() < 2e-6 * np.abs(expected).max()
    assert np.abs(logits(source, ids) - expected).max() > 1e-3 * np.abs(expected).max()
    graphs = [onnx.load(path).graph for path in (source, tmp_path / "trained.onnx")]
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]


def test_jax_params_and_part_of_the_weights(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from hyperclone_onnx.frameworks.jax import load as load_function

    _, params = load_function(zoo("llama.distinct"), train=["*"], freeze=["model.norm.weight"])
    result = absorb(zoo("llama.distinct"), {"model": params["model"]}, tmp_path / "trained.onnx")
    assert result.kept == ["val_451"] and "model.norm.weight" in result.replaced


# -- where weights come from ------------------------------------------------------------------------------------


def as_safetensors(model: Any, folder: Path) -> Path:
    return write_safetensors(folder / "weights.safetensors", model.state_dict())


def as_shards(model: Any, folder: Path) -> Path:
    """Two files and an index, in the form of Hugging Face's libraries."""
    state = model.state_dict()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        write_safetensors(folder / file, {name: state[name] for name in state if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def as_npz(model: Any, folder: Path) -> Path:
    np.savez(folder / "weights.npz", **{name: parameter.numpy() for name, parameter in model.state_dict().items()})
    return folder / "weights.npz"


def as_dcp(model: Any, folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def as_dcp_of_a_trainer(model: Any, folder: Path) -> Path:
    """The model under a level of its own, with its optimizer and its progress beside it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.0, weight_decay=0.0)
    ids = torch.zeros((1, 3), dtype=torch.int64)
    model(ids, torch.ones_like(ids)).sum().backward()
    optimizer.step()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer), "step": 7}
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def nested(model: Any) -> dict[str, Any]:
    """The nested dict of parameters that JAX users have."""
    jax = pytest.importorskip("jax")
    tree: dict[str, Any] = {}
    for name, parameter in model.state_dict().items():
        *folders, leaf = name.split(".")
        level = tree
        for part in folders:
            level = level.setdefault(part, {})
        level[leaf] = jax.numpy.asarray(parameter.numpy())
    return tree


def as_orbax(model: Any, folder: Path) -> Path:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", nested(model))
    return folder / "orbax"


def as_orbax_of_a_trainer(model: Any, folder: Path) -> Path:
    ocp = pytest.importorskip("orbax.checkpoint")
    optax = pytest.importorskip("optax")
    params = nested(model)
    with ocp.CheckpointManager(folder / "orbax") as manager:
        state = {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": 7}
        manager.save(7, args=ocp.args.PyTreeSave(state))
    return folder / "orbax"


FORMATS = [as_safetensors, as_shards, as_npz, as_dcp, as_dcp_of_a_trainer, as_orbax, as_orbax_of_a_trainer]


@pytest.mark.parametrize("save", FORMATS, ids=lambda save: save.__name__)
def test_every_kind_of_checkpoint(save: Callable[[Any, Path], Path], zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    source = zoo("llama.distinct")
    model = trained(source)
    path = save(model, tmp_path)
    done = cli("absorb", source, path, "-o", tmp_path / "trained.onnx", "--no-validate", "--json")
    assert done.code == 0, done.error
    report = json.loads(done.stdout)
    assert set(report["replaced"]) == set(model.initializers.values()) and not report["kept"] and not report["casts"]
    written = stored(tmp_path / "trained.onnx")
    for name, parameter in model.named_parameters():
        assert np.array_equal(written[model.initializers[name]], parameter.detach().numpy()), name


def test_bfloat16_weights_are_cast_and_it_is_said(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    model = trained(zoo("llama.distinct"))
    narrow = {name: parameter.bfloat16() for name, parameter in model.state_dict().items()}
    file = write_safetensors(tmp_path / "w.safetensors", narrow)
    done = cli("absorb", zoo("llama.distinct"), file, "-o", tmp_path / "trained.onnx")
    assert done.code == 0 and f"{len(narrow)} cast bfloat16 -> float32" in done.stdout
    ids = torch.randint(0, 95, (2, 7))
    model.load_state_dict(narrow)
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids)).numpy()
    assert np.abs(logits(tmp_path / "trained.onnx", ids) - expected).max() < 2e-6 * np.abs(expected).max()


def test_weights_trained_in_float32_go_into_a_half_precision_file(tmp_path: Path, cli: Command) -> None:
    onnx.save(perceptron(dtype="float16"), tmp_path / "half.onnx")
    state = {name: parameter.float() for name, parameter in trained(tmp_path / "half.onnx").state_dict().items()}
    file = write_safetensors(tmp_path / "w.safetensors", state)
    done = cli("absorb", tmp_path / "half.onnx", file, "-o", tmp_path / "trained.onnx")
    assert done.code == 0 and f"{len(state)} cast float32 -> float16, as PyTorch computes it" in done.stdout
    assert np.array_equal(stored(tmp_path / "trained.onnx")["up.0"], state["up.0"].half().numpy())
    state["up.0"][0, 0] = 1e6  # more than float16 can represent
    done = cli("absorb", tmp_path / "half.onnx", write_safetensors(file, state), "-o", tmp_path / "other.onnx")
    assert done.code == 2 and "'up.0' holds values that are not finite as float16" in done.error
    assert not (tmp_path / "other.onnx").exists()


MANIFESTS: dict[str, tuple[str, list[str]]] = {
    "in the folder": ("hf/trained", []),
    "in the folder around it": ("hf", []),
    "beside the model": ("model", []),
    "named": ("start", ["--manifest", "start"]),
    "named as a file": ("start", ["--manifest", "start/hyperclone_onnx.json"]),
}
"""The folder that holds the manifest, and the options."""


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hugging_face_folder_is_read_by_its_manifest(
    name: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    place, words = MANIFESTS[name]
    new = np.full(48, 2.0, np.float32)
    asked: list[tuple[Path, Path]] = []

    def read_trained(folder: Path, manifest: Path) -> dict[str, Any]:
        asked.append((folder, manifest))
        return {"model.norm.weight": lambda: new}

    reader = types.ModuleType("hugging_face")
    reader.read_trained = read_trained  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hyperclone_onnx.frameworks.hugging_face", reader)
    monkeypatch.chdir(tmp_path)
    for folder in ("hf/trained", "start", "model"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(zoo("llama.distinct"), tmp_path / "model" / "big.onnx")
    (tmp_path / "hf" / "trained" / "config.json").write_text("{}")
    (tmp_path / place / "hyperclone_onnx.json").write_text("{}")
    done = cli("absorb", "model/big.onnx", "hf/trained", "-o", "t.onnx", "--no-validate", "--json", *words)
    assert done.code == 0 and json.loads(done.stdout)["replaced"] == ["model.norm.weight"], done.stderr
    assert [(folder, path.resolve()) for folder, path in asked] == [
        (Path("hf/trained"), tmp_path / place / "hyperclone_onnx.json")
    ]
    assert np.array_equal(stored(tmp_path / "t.onnx")["model.norm.weight"], new)


def test_a_manifest_that_is_not_there_is_one_line(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    done = cli("absorb", zoo("llama.distinct"), tmp_path, "-o", tmp_path / "t.onnx", "--manifest", tmp_path)
    assert done.code == 2 and f"{tmp_path}: no hyperclone_onnx.json there" in done.error
    assert not any(tmp_path.iterdir())


def test_names_that_wrappers_change(zoo: Zoo, tmp_path: Path) -> None:
    state = trained(zoo("llama.distinct")).state_dict()
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod."):
        infix = "layers.0._checkpoint_wrapped_module."
        wrapped = {prefix + name.replace("layers.0.", infix): parameter for name, parameter in state.items()}
        assert not absorb(zoo("llama.distinct"), wrapped, tmp_path / "trained.onnx", check=False).kept


# -- what does not fit ------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def a_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def of_shapes(shapes: dict[str, tuple[int, ...]], value: float = 1.0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        arrays = {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
        return write_safetensors(folder / "w.safetensors", arrays)

    return make


def cut(name: str, save: Callable[[Any, Path], Path], pattern: str) -> Callable[[Path], Path]:
    """A checkpoint whose files are cut short."""

    def make(folder: Path) -> Path:
        layer = torch.nn.Module()
        layer.register_parameter(name, torch.nn.Parameter(torch.ones(48, 101)))
        path = save(layer, folder)
        for file in path.rglob(pattern) if path.is_dir() else [path]:
            if file.is_file():
                file.write_bytes(file.read_bytes()[:-40])
        return path

    return make


def evil_dcp(folder: Path) -> Path:
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    return folder / "dcp"


def another_model(folder: Path) -> Path:
    layer = torch.nn.TransformerEncoderLayer(8, 2)
    return write_safetensors(folder / "w.safetensors", layer.state_dict())


def twice(folder: Path) -> Path:
    arrays = {f"{level}.model.norm.weight": np.ones(48, np.float32) for level in ("ema", "live")}
    return write_safetensors(folder / "w.safetensors", arrays)


def a_hugging_face_folder(folder: Path) -> Path:
    """A checkpoint as a trainer saves it: it does not say which tensor belongs to which initializer."""
    place = folder / "hf"
    place.mkdir()
    (place / "config.json").write_text("{}")
    ones = np.ones((48, 48), np.float32)
    write_safetensors(place / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight.T": ones})
    return place


def steps(folder: Path) -> Path:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.CheckpointManager(folder / "orbax") as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.PyTreeSave({"w": np.ones(3)}))
    return folder / "orbax"


HEAD = "val_451"
WRONG: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "an unknown name": (
        of_shapes({"model.norm.weight": (48,), "model.norm.wait": (48,)}),
        2,
        "no floating tensor of this model; did you mean 'model.norm.weight'",
    ),
    "another shape": (
        of_shapes({"model.norm.weight": (47,)}),
        2,
        "has the shape (47,) in the weights, (48,) in the model",
    ),
    "none at all": (of_shapes({}), 2, "holds no tensor of this model: it is empty"),
    "another model": (another_model, 2, "holds no tensor of this model: 12 tensors, such as 'linear1.bias', where"),
    "the model twice": (twice, 2, "holds the tensors of this model twice, under 'ema' and 'live': save one of them"),
    "not finite": (of_shapes({"model.norm.weight": (48,)}, np.nan), 2, "holds values that are not finite as float"),
    "no file": (lambda folder: folder / "w.safetensors", 4, "no such file or folder"),
    "a pickle": (a_file("w.pt", pickle.dumps(Evil())), 2, "is not read; save the weights with safetensors.torch"),
    "an empty folder": (lambda folder: [(folder / "d").mkdir(), folder / "d"][1], 2, "no checkpoint: it has neither"),  # type: ignore[return-value]
    "nothing": (a_file("w.safetensors", b""), 4, "not a safetensors file, or truncated"),
    "noise": (a_file("w.safetensors", b"\xff" * 40), 4, "not a safetensors file, or truncated"),
    "noise for npz": (a_file("w.npz", b"PK" + b"\xff" * 40), 4, "not a readable .npz file"),
    "a safetensors file cut off": (cut(HEAD, as_safetensors, ""), 4, "truncated, or its header is wrong"),
    "an npz file cut off": (cut(HEAD, as_npz, ""), 4, "not a readable .npz file, or truncated"),
    "a torch checkpoint cut off": (cut(HEAD, as_dcp, "*.distcp"), 4, f"'{HEAD}' cannot be read, or is truncated"),
    "an Orbax checkpoint cut off": (cut(HEAD, as_orbax, "[0-9a-f]*[0-9a-f]"), 4, "not a readable Orbax checkpoint"),
    "metadata that would run code": (evil_dcp, 4, "would call builtins.print, which no checkpoint needs: not read"),
    "a Hugging Face folder alone": (a_hugging_face_folder, 2, "name the folder that `handoff` wrote with --manifest"),
    "several steps": (steps, 2, "it holds the steps 1, 2: name one, such as"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_write_nothing(case: str, zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    make, code, message = WRONG[case]
    weights = make(tmp_path)
    before = names_in(tmp_path)
    done = cli("absorb", zoo("llama.distinct"), weights, "-o", tmp_path / "trained.onnx", "--no-validate")
    assert message in done.error and done.code == code
    assert names_in(tmp_path) == before and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("save", "module", "extra"), [(as_orbax, "orbax", "jax"), (as_dcp, "dcp", "torch")])
def test_a_missing_extra_is_named(
    save: Callable[[Any, Path], Path],
    module: str,
    extra: str,
    zoo: Zoo,
    tmp_path: Path,
    cli: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save(trained(zoo("llama.distinct")), tmp_path)
    missing = {"orbax": "orbax.checkpoint", "dcp": "torch.distributed.checkpoint"}[module]
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"hyperclone_onnx.frameworks.checkpoints.{module}", raising=False)
    done = cli("absorb", zoo("llama.distinct"), path, "-o", tmp_path / "trained.onnx")
    assert done.code == 2 and f"hyperclone-onnx[{extra}]" in done.error
    assert not (tmp_path / "trained.onnx").exists()


def test_a_checkpoint_in_the_place_of_the_output_stays(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    file = write_safetensors(tmp_path / "w.onnx", {"model.norm.weight": np.ones(48, np.float32)}).rename(
        tmp_path / "w.safetensors"
    )
    before = file.read_bytes()
    done = cli("absorb", zoo("llama.distinct"), file, "-o", file)
    assert done.code == 2 and "would overwrite the source" in done.error and file.read_bytes() == before
