"""AdamW's state in files: a trainer's files are read, grown, and written in the form that the next trainer reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, names_in, perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from training import SETTINGS, batches, train  # noqa: E402

from hyperclone_onnx import SourceMap, Strategy, analyse, expand  # noqa: E402
from hyperclone_onnx.errors import BadModel, BadRequest  # noqa: E402
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import from_torch, read_safetensors  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.growing import write_optimizer  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.moments import GrownMoments, Moments, grow_moments  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.resume import resume_torch  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Zoo = Callable[[str], Path]

KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trained:
    """A small model after some steps, its grown model, and its optimizer state, grown by `grow_moments`."""

    small: Path
    big: Path
    model: Any
    optimizer: Any
    grown: Mapping[str, GrownMoments]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    onnx.save(perceptron(tied=True), folder / "small.onnx")
    model = load(folder / "small.onnx")
    optimizer = torch.optim.AdamW(model.named_parameters(), **SETTINGS)
    for ids in batches(31, 5):
        train(model, optimizer, ids)
    plan = expand(folder / "small.onnx", folder / "big.onnx", 2, strategy=Strategy("symmetric"), check=False).plan
    moments = {
        model.initializers[name]: Moments(*(from_torch(optimizer.state[parameter][kind]) for kind in KINDS), 5)
        for name, parameter in model.named_parameters()
    }
    return Trained(folder / "small.onnx", folder / "big.onnx", model, optimizer, grow_moments(plan, moments))


def flat(trained: Trained, key: str, initializers: bool = False) -> dict[str, Any]:
    """The state as a flat dict; `key` makes a key from kind and name."""
    state = {}
    for name, parameter in trained.model.named_parameters():
        name = trained.model.initializers[name] if initializers else name
        for kind in KINDS:
            state[key.format(kind=kind, name=name)] = trained.optimizer.state[parameter][kind]
    return state


def as_torch_file(trained: Trained, folder: Path) -> Path:
    torch.save(trained.optimizer.state_dict(), folder / "state.pt")
    return folder / "state.pt"


def as_training_checkpoint(trained: Trained, folder: Path) -> Path:
    data = {"model": trained.model.state_dict(), "optimizer": trained.optimizer.state_dict(), "epoch": 3}
    torch.save(data, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def as_named_state(trained: Trained, folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.save(get_optimizer_state_dict(trained.model, trained.optimizer), folder / "state.pt")
    return folder / "state.pt"


def as_flat_named_state(trained: Trained, folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    torch.save(get_optimizer_state_dict(trained.model, trained.optimizer, options=options), folder / "state.pt")
    return folder / "state.pt"


def as_distributed_checkpoint(trained: Trained, folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(trained.model, trained.optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def as_safetensors(trained: Trained, folder: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({**flat(trained, "{kind}.{name}"), "step": torch.tensor(5.0)}, folder / "state.safetensors")
    return folder / "state.safetensors"


def as_safetensors_by_initializer(trained: Trained, folder: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {**flat(trained, "{name}.{kind}", initializers=True), "step": torch.tensor(5)}
    safetensors.save_file(state, folder / "state.safetensors")
    return folder / "state.safetensors"


def as_optax(trained: Trained, folder: Path) -> Path:
    """Adam's moments in optax's form, in an Orbax checkpoint beside the parameters."""
    ocp, optax, jax = (pytest.importorskip(name) for name in ("orbax.checkpoint", "optax", "jax"))
    from hyperclone_onnx.frameworks.compiling.naming import nested

    def tree(kind: str) -> Any:
        return nested(
            {
                name: jax.numpy.asarray(
                    (parameter.detach() if kind == "" else trained.optimizer.state[parameter][kind]).numpy()
                )
                for name, parameter in trained.model.named_parameters()
            }
        )

    adam = optax.ScaleByAdamState(count=jax.numpy.asarray(5), mu=tree("exp_avg"), nu=tree("exp_avg_sq"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = (adam, optax.EmptyState(), optax.ScaleByScheduleState(count=jax.numpy.asarray(5)))
        checkpointer.save(folder / "orbax", {"params": tree(""), "opt_state": state})
    return folder / "orbax"


SAVED = [
    as_torch_file,
    as_training_checkpoint,
    as_named_state,
    as_flat_named_state,
    as_distributed_checkpoint,
    as_safetensors,
    as_safetensors_by_initializer,
    as_optax,
]


@pytest.mark.parametrize("save", SAVED, ids=lambda save: save.__name__)
def test_every_kind_of_state(save: Callable[[Trained, Path], Path], trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = write_optimizer(trained.big, save(trained, tmp_path), tmp_path / "out", "safetensors")
    assert result.exact and result.steps == 5 and result.tensors == len(trained.grown)
    written = read_safetensors(tmp_path / "out" / "optimizer.safetensors")
    model = load(trained.big)
    assert len(written) == 2 * len(trained.grown) + 1 and float(written["step"].read()) == 5
    for path, initializer in model.initializers.items():
        assert np.array_equal(written[f"exp_avg.{path}"].read(), trained.grown[initializer].first.numpy())
        assert np.array_equal(written[f"exp_avg_sq.{path}"].read(), trained.grown[initializer].second.numpy())


def test_torch_loads_it_as_its_own(trained: Trained, tmp_path: Path, cli: Command) -> None:
    state = as_torch_file(trained, tmp_path)
    done = cli("handoff", trained.big, "--to", "pytorch", "--optimizer", state, "-o", tmp_path / "o")
    assert done.code == 0, done.error
    model = load(trained.big)
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.load_state_dict(torch.load(tmp_path / "o" / "optimizer.pt", weights_only=True))
    for path, parameter in model.named_parameters():
        moments, state = trained.grown[model.initializers[path]], optimizer.state[parameter]
        assert np.array_equal(state["exp_avg"].numpy(), moments.first.numpy()) and float(state["step"]) == 5
        assert np.array_equal(state["exp_avg_sq"].numpy(), moments.second.numpy())
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]  # the settings of the source are kept
    train(model, optimizer, next(batches(31, 1)))


def test_sharded_parameters_take_their_parts(trained: Trained, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    write_optimizer(trained.big, as_torch_file(trained, tmp_path), tmp_path, "pytorch")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = load(trained.big, shard=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.named_parameters())
        resume_torch(optimizer, tmp_path / "optimizer.pt")
        for path, parameter in model.named_parameters():
            first = optimizer.state[parameter]["exp_avg"]
            assert isinstance(first, DTensor) and first.placements == parameter.placements
            assert np.array_equal(first.full_tensor().numpy(), trained.grown[model.initializers[path]].first.numpy())
        train(model, optimizer, next(batches(31, 1)))
    finally:
        dist.destroy_process_group()


def test_groups_stay_apart(trained: Trained, tmp_path: Path) -> None:
    named = dict(trained.model.named_parameters())
    plain = [name for name, parameter in named.items() if parameter.ndim == 1]
    groups = [
        {"params": [(name, parameter) for name, parameter in named.items() if name not in plain], "weight_decay": 0.1},
        {"params": [(name, named[name]) for name in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    train(trained.model, optimizer, next(batches(31, 1)))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    write_optimizer(trained.big, tmp_path / "state.pt", tmp_path, "pytorch", freeze=["down.0"])
    written = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in written["param_groups"]] == [0.1, 0.0]
    assert set(written["param_groups"][1]["param_names"]) == set(plain)
    assert len(written["state"]) == len(named) - 1  # a frozen parameter is in a group, and has no state


def test_optax_takes_it(trained: Trained, tmp_path: Path) -> None:
    jax, optax = (pytest.importorskip(name) for name in ("jax", "optax"))
    from hyperclone_onnx.frameworks.jax import load as load_function
    from hyperclone_onnx.frameworks.optimizer.resume import resume_optax

    write_optimizer(trained.big, as_torch_file(trained, tmp_path), tmp_path, "jax")
    _, params = load_function(trained.big)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    state = resume_optax(optimizer.init(params), params, tmp_path / "optimizer.safetensors")
    adam = state[1][0]
    assert isinstance(adam, optax.ScaleByAdamState) and int(adam.count) == 5
    assert jax.tree.structure(adam.mu) == jax.tree.structure(params)
    some = next(name for name in trained.grown if name.startswith("up"))
    leaf = adam.nu
    for part in some.split("."):
        leaf = leaf[part]
    assert np.array_equal(np.asarray(leaf), trained.grown[some].second.numpy())
    with pytest.raises(BadRequest, match="to put the moments into"):
        resume_optax(optax.sgd(1e-3).init(params), params, tmp_path / "optimizer.safetensors")


def numbered(trained: Trained, folder: Path) -> Path:
    state = torch.optim.AdamW(trained.model.parameters()).state_dict()
    torch.save({"optimizer": state}, folder / "state.pt")
    return folder / "state.pt"


def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Trained, Path], Path]:
    def save(trained: Trained, folder: Path) -> Path:
        state = copy.deepcopy(trained.optimizer.state_dict())
        change(state)
        torch.save(state, folder / "state.pt")
        return folder / "state.pt"

    return save


def content(name: str, data: bytes) -> Callable[[Trained, Path], Path]:
    def save(_: Trained, folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return save


def of_sgd(trained: Trained, folder: Path) -> Path:
    model = copy.deepcopy(trained.model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-3, momentum=0.9)
    train(model, optimizer, next(batches(31, 1)))
    torch.save(optimizer.state_dict(), folder / "state.pt")
    return folder / "state.pt"


def halved(state: dict[str, Any]) -> None:
    for moments in state["state"].values():
        moments["exp_avg"] = moments["exp_avg"][:1]


def renamed(state: dict[str, Any]) -> None:
    state["param_groups"][0]["param_names"] = [f"layer.{i}" for i in state["param_groups"][0]["params"]]


def weights_alone(trained: Trained, folder: Path) -> Path:
    torch.save(trained.model.state_dict(), folder / "state.pt")
    return folder / "state.pt"


WRONG: dict[str, tuple[Callable[[Trained, Path], Path], type[Exception], str]] = {
    "numbered tensors": (numbered, BadRequest, "its tensors are numbered, not named: make the optimizer"),
    "another optimizer": (of_sgd, BadRequest, "not the state of AdamW: of 'embedding' it holds momentum_buffer"),
    "another shape": (changed(halved), BadRequest, r"the moments of '.*' have the shape \(1.*, the source's"),
    "other names": (changed(renamed), BadRequest, "holds no tensor of this model: 8 tensors, such as 'layer.0', where"),
    "one is missing": (
        changed(lambda state: state["state"].pop(2)),
        BadRequest,
        "no moments of '.*', which is trained: see --freeze",
    ),
    "no steps yet": (
        changed(lambda state: state["state"].clear()),
        BadRequest,
        "no state of AdamW",
    ),
    "amsgrad": (
        changed(lambda state: state["param_groups"][0].update(amsgrad=True)),
        BadRequest,
        "amsgrad keeps a maximum",
    ),
    "weights alone": (weights_alone, BadRequest, "no state of AdamW .* it holds 'embedding'"),
    "noise": (content("state.pt", b"\xff" * 40), BadModel, "not a torch file of tensors alone, or truncated"),
    "a pickle that would run code": (
        content("state.pt", b"cbuiltins\nprint\n(S'run'\ntR."),
        BadModel,
        "not a torch file of tensors alone",
    ),
    "no file": (lambda trained, folder: folder / "state.pt", BadModel, "no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_does_not_fit_writes_nothing(
    case: str, trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, error, message = WRONG[case]
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message) as raised:
        write_optimizer(trained.big, make(trained, tmp_path), tmp_path / "out", "pytorch")
    assert "\n" not in str(raised.value) and not names_in(tmp_path / "out") and "run" not in capfd.readouterr().out


def test_a_file_that_was_not_grown_has_no_plan(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="carries no plan of its growth"):
        write_optimizer(trained.small, as_torch_file(trained, tmp_path), tmp_path, "pytorch")


def test_constants_that_growth_added_have_no_moments(zoo: Zoo, tmp_path: Path) -> None:
    """Heads with unequally repeated widths need a vector of divisors, which is no tensor of the source."""
    path, big = zoo("gpt2.distinct"), tmp_path / "big.onnx"
    maps = {
        dimension.name: SourceMap(dimension.size, index=(*range(dimension.size), 0, 0, 1))
        for dimension in analyse(path).named
        if dimension.role == "head_dim" and dimension.dim.growable
    }
    expand(path, big, 1, maps=maps, strategy=Strategy("symmetric"), check=False)
    small = load(path)
    optimizer = torch.optim.AdamW(small.named_parameters())
    train(small, optimizer, next(batches(95, 1)))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    result = write_optimizer(big, tmp_path / "state.pt", tmp_path, "pytorch")
    assert result.tensors == len(list(small.parameters()))
    model = load(big)
    following = torch.optim.AdamW(model.named_parameters())
    following.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, following, next(batches(95, 1)))
