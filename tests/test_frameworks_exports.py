"""`handoff --to` writes a folder that the trainer's own loader can read; it is complete, or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, names_in

from hyperclone_onnx import BadModel, expand
from hyperclone_onnx.frameworks.checkpoints.manifest import Manifest
from hyperclone_onnx.planning.training_recipe import RECIPE

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("array_api_compat", "torch", "jax", "safetensors", "orbax.checkpoint"):
    pytest.importorskip(_needed)

Zoo = Callable[[str], Path]
Array = np.ndarray[Any, Any]


@pytest.fixture(params=["llama", "gpt2"])
def big(request: pytest.FixtureRequest, zoo: Zoo, tmp_path: Path) -> Path:
    expand(zoo(f"{request.param}.distinct"), tmp_path / "big.onnx", 2, check=False)
    return tmp_path / "big.onnx"


def read_pytorch(folder: Path, big: Path) -> dict[str, Array]:
    import torch
    import torch.distributed.checkpoint as dcp

    from hyperclone_onnx.frameworks.torch import load

    model = load(big)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder / "checkpoint")
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def read_jax(folder: Path, big: Path) -> dict[str, Array]:
    import jax
    import orbax.checkpoint as ocp

    from hyperclone_onnx.frameworks.jax import load

    params = jax.tree.map(jax.numpy.zeros_like, load(big)[1])
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((folder / "checkpoint").resolve(), params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def read_safetensors(folder: Path, big: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    arrays: dict[str, Array] = {}
    placed = json.loads(index.read_text())["weight_map"]
    for file in sorted(set(placed.values())):
        part = load_file(folder / file)
        assert {name for name, where in placed.items() if where == file} == set(part)
        arrays |= part
    return arrays


READERS = {"pytorch": read_pytorch, "jax": read_jax, "safetensors": read_safetensors}


@pytest.mark.parametrize("target", READERS)
def test_the_trainers_own_loader_reads_it(target: str, big: Path, tmp_path: Path, cli: Command) -> None:
    done = cli("handoff", big, "--to", target, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "validated: in PyTorch it computes the same as" in done.stdout
    manifest = Manifest.read(tmp_path / "out")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(big).graph.initializer}
    arrays = READERS[target](tmp_path / "out", big)
    assert set(arrays) == {entry.path for entry in manifest.tensors}
    for entry in manifest.tensors:
        assert np.array_equal(arrays[entry.path], stored[entry.initializer]), entry.path
    assert manifest.growth is not None and manifest.growth["dims"]["hidden"]["to"] == 96
    assert manifest.training == RECIPE.to_json()
    assert all(line in done.stdout for line in RECIPE.lines())
    growths = {entry.fan_in_growth for entry in manifest.tensors if len(entry.shape) == 2}
    assert growths == {1.0, 2.0}
    assert names_in(tmp_path) == {"big.onnx", "out"}


def test_safetensors_in_several_files(big: Path, tmp_path: Path, cli: Command) -> None:
    done = cli("handoff", big, "--to", "safetensors", "-o", tmp_path / "out", "--max-shard-size", "0.0001", "--json")
    report = json.loads(done.stdout)
    assert done.code == 0 and report["validated_by"] == "PyTorch"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert len(read_safetensors(tmp_path / "out", big)) == report["tensors"]


def test_a_checkpoint_that_is_not_the_models_is_noticed(
    big: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check compares the written files, not the intended content."""
    from hyperclone_onnx.frameworks.exports import pytorch

    honest = pytorch.read_whole
    monkeypatch.setattr(pytorch, "read_whole", lambda tensor: honest(tensor) * 1.01)
    done = cli("handoff", big, "--to", "pytorch", "-o", tmp_path / "out")
    assert done.code == 1 and "disagree" in done.error
    assert names_in(tmp_path) == {"big.onnx"}


@pytest.mark.parametrize("target", READERS)
def test_the_optimizers_state_grows_beside_the_weights(target: str, zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    import torch

    from hyperclone_onnx.frameworks.torch import load

    source = zoo("llama.distinct")
    expand(source, tmp_path / "big.onnx", 2, check=False)
    model = load(source)
    optimizer = torch.optim.AdamW(model.named_parameters())
    ids = torch.arange(14).reshape(2, 7)
    for _ in range(3):
        model(ids, torch.ones_like(ids)).logsumexp(-1).sum().backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    big, out = tmp_path / "big.onnx", tmp_path / "out"
    done = cli("handoff", big, "--to", target, "-o", out, "--optimizer", tmp_path / "state.pt")
    assert done.code == 0, done.stderr
    file = out / ("optimizer.pt" if target == "pytorch" else "optimizer.safetensors")
    assert (
        Manifest.read(out).optimizer == file.name and f"{file.name}: moments of 21 tensors after 3 steps" in done.stdout
    )
    grown = load(big)
    if target == "pytorch":
        again = torch.optim.AdamW(grown.named_parameters())
        again.load_state_dict(torch.load(file))
    else:
        from hyperclone_onnx.frameworks.optimizer.resume import resume_torch

        again = torch.optim.AdamW(grown.named_parameters())
        resume_torch(again, file)
    small = optimizer.state[model.model.norm.weight]["exp_avg"]
    assert torch.allclose(again.state[grown.model.norm.weight]["exp_avg"], small.repeat(2) / 2)


def test_a_file_is_compiled_once(small: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hyperclone_onnx.frameworks import compiled_model
    from hyperclone_onnx.frameworks.torch import load

    big, plain, compiled = tmp_path / "big.onnx", compiled_model._compile, []
    expand(small, big, 2, check=False)
    model = load(small)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.arange(6).reshape(2, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    monkeypatch.setattr(
        compiled_model, "_compile", lambda model, *others: compiled.append(model) or plain(model, *others)
    )
    arguments = ("handoff", big, "--to", "pytorch", "-o", tmp_path / "out", "--no-validate")
    done = cli(*arguments, "--optimizer", tmp_path / "state.pt", "--freeze", "gain")
    assert done.code == 0, done.stderr
    assert compiled == [big]


WRONG: dict[str, tuple[list[str], int, str]] = {
    "nothing to do": ([], 2, "say what to do: --list, or --to TARGET -o FOLDER"),
    "two things to do": (["--list", "--to", "jax", "-o", "OUT"], 2, "say what to do"),
    "no folder": (["--to", "jax"], 2, "name the folder to make: -o FOLDER"),
    "hf without its source": (["--to", "hf", "-o", "OUT"], 2, "--like names the checkpoint that --to hf grows"),
    "a source without hf": (["--to", "jax", "-o", "OUT", "--like", "x"], 2, "give both or neither"),
    "a glob of nothing": (["--to", "jax", "-o", "OUT", "--freeze", "nothing.*"], 2, "matches no floating tensor"),
    "a target that is none": (["--to", "tensorflow", "-o", "OUT"], 2, "is not one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_commands_write_nothing(case: str, zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    options, code, message = WRONG[case]
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in options]
    done = cli("handoff", zoo("llama.distinct"), *arguments)
    assert (done.code, names_in(tmp_path)) == (code, set()) and message in done.stderr


def test_a_folder_that_has_something_is_left_alone(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    done = cli("handoff", zoo("llama.distinct"), "--to", "safetensors", "-o", tmp_path / "out")
    assert done.code == 2 and "exists already" in done.error and names_in(tmp_path / "out") == {"mine"}


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "tensors": [{}]}'])
def test_a_bad_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadModel, match=r"manifest.json: "):
        Manifest.read(tmp_path)
