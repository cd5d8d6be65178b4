"""A training that grows goes on as if it had not grown, in one process, through several growths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import ROOT

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from training import batches  # noqa: E402

from hyperclone_onnx.errors import BadRequest  # noqa: E402
from hyperclone_onnx.frameworks.continuation import Continuation, composed  # noqa: E402
from hyperclone_onnx.frameworks.stages import Training  # noqa: E402
from hyperclone_onnx.validation.wide import to_double  # noqa: E402

TINY_GPT = ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx"
SETTINGS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1, "no_decay": ["*bias*"]}
EXACT = 1e-12
DATA = list(batches(256, 16))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model in float64."""
    path = tmp_path_factory.mktemp("wide") / "model.onnx"
    ir.save(to_double(ir.load(TINY_GPT)), path)
    return path


def loss_of(training: Training, ids: Any) -> Any:
    logits = training.model(ids[:, :-1], torch.ones_like(ids[:, :-1]))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def step(training: Training, ids: Any, share: float = 1.0) -> float:
    """One step at a share of the peak rate. Returns the loss before it."""
    training.set_rate(SETTINGS["lr"] * share)
    loss = loss_of(training, ids)
    loss.backward()
    training.clip(1.0)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return float(loss)


def test_two_symmetric_growths_change_no_step(wide: Path) -> None:
    """The widths, and later the feed-forward layers alone; with weight decay, clipping and a schedule."""
    one, other = (Training.begin(wide, **SETTINGS) for _ in range(2))
    worst = {}
    requests: dict[int, dict[str, Any]] = {4: {"factor": 2}, 8: {"requests": {"ffn": 3}}}
    for number, ids in enumerate(DATA[:12]):
        if number in requests:
            other = other.grow(strategy="symmetric", **requests[number])
            worst[f"grown {number}"] = abs(float(loss_of(one, ids)) - float(loss_of(other, ids)))
        share = 1.0 - number / 12
        worst[f"step {number}"] = abs(step(one, ids, share) - step(other, ids, share))
    assert max(worst.values()) < EXACT, worst
    assert sum(p.numel() for p in other.model.parameters()) > 4 * sum(p.numel() for p in one.model.parameters())


@pytest.mark.parametrize("request_", [{"strategy": "noisy-diagonal"}, {"layers": 6}, {"sizes": {"ffn": 700}}])
def test_any_growth_starts_at_the_same_loss_and_then_goes_its_own_way(wide: Path, request_: dict[str, Any]) -> None:
    one, other = (Training.begin(wide, **SETTINGS) for _ in range(2))
    for ids in DATA[:3]:
        step(one, ids), step(other, ids)
    other = other.grow(**({"factor": 2} if "strategy" in request_ else {}), **request_)
    assert float(loss_of(one, DATA[3])) == pytest.approx(float(loss_of(other, DATA[3])), abs=1e-9)
    apart = [step(one, ids) - step(other, ids) for ids in DATA[3:8]]
    assert max(map(abs, apart)) > 1e-9


def test_without_the_moments_the_steps_are_others(wide: Path) -> None:
    """The check of equal steps can fail."""
    one, other = (Training.begin(wide, **SETTINGS) for _ in range(2))
    for ids in DATA[:3]:
        step(one, ids), step(other, ids)
    other = other.grow(factor=2, strategy="symmetric")
    other.optimizer.state.clear()
    assert max(abs(step(one, ids) - step(other, ids)) for ids in DATA[3:6]) > 1e-4


def test_the_rate_and_the_steps_are_kept(wide: Path) -> None:
    training = Training.begin(wide, **SETTINGS)
    for ids in DATA[:2]:
        step(training, ids, 0.5)
    grown = training.grow(factor=2, strategy="symmetric", layers=5)
    assert grown.rate == training.rate == pytest.approx(0.5 * SETTINGS["lr"])
    assert {group["lr"] for group in grown.optimizer.param_groups} >= {grown.rate, grown.rate / 2}
    counts = {float(state["step"]) for state in grown.optimizer.state.values()}
    assert counts == {0.0, 2.0}  # new layers have taken no step


def test_a_model_that_has_taken_no_step_grows_too(wide: Path) -> None:
    grown = Training.begin(ir.load(wide), **SETTINGS).grow(factor=2)
    assert not grown.optimizer.state and float(loss_of(grown, DATA[0])) > 0.0


def test_the_trained_model_is_saved_as_onnx(tmp_path: Path) -> None:
    training = Training.begin(TINY_GPT, **SETTINGS)
    step(training, DATA[0])
    training = training.grow(factor=2)
    step(training, DATA[1])
    training.save(tmp_path / "big.onnx")
    ids = DATA[2][:, :-1]
    session = ort.InferenceSession(str(tmp_path / "big.onnx"), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)})
    expected = training.model(ids, torch.ones_like(ids)).detach().numpy()
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_training_that_grew_goes_on_from_a_checkpoint(wide: Path, tmp_path: Path) -> None:
    """Two growths, a checkpoint, and further steps: the same losses as without the checkpoint, bit for bit."""
    training = Training.begin(wide, **SETTINGS)
    step(training, DATA[0])
    training = training.grow(factor=2)
    step(training, DATA[1], 0.5)
    training = training.grow(layers=5)
    step(training, DATA[2], 0.5)
    training.save_checkpoint(tmp_path / "saved")
    resumed = Training.resume(tmp_path / "saved")
    assert resumed.rate == training.rate and resumed.settings == training.settings
    assert [step(resumed, ids, 0.25) for ids in DATA[3:6]] == [step(training, ids, 0.25) for ids in DATA[3:6]]
    again = (one.grow(factor=2, strategy="symmetric") for one in (resumed, training))
    assert len({step(one, DATA[6]) for one in again}) == 1


def test_a_checkpoint_that_lacks_the_state_or_is_another_models_is_refused(wide: Path, tmp_path: Path) -> None:
    training = Training.begin(wide, **SETTINGS)
    training.save_checkpoint(tmp_path / "small")
    training.grow(factor=2, layers=5).save_checkpoint(tmp_path / "big")
    with pytest.raises(BadRequest, match="exists already"):
        training.save_checkpoint(tmp_path / "small")
    shutil.copy(tmp_path / "small" / "training.pt", tmp_path / "big")
    with pytest.raises(BadRequest, match="belong to different models"):
        Training.resume(tmp_path / "big")
    (tmp_path / "small" / "training.pt").unlink()
    with pytest.raises(BadRequest, match="not a checkpoint of Training"):
        Training.resume(tmp_path / "small")
    torch.save({"rate": 1.0}, tmp_path / "small" / "training.pt")
    with pytest.raises(BadRequest, match="not written by"):
        Training.resume(tmp_path / "small")


def test_what_cannot_grow_is_refused_and_the_training_goes_on(wide: Path) -> None:
    training = Training.begin(wide, **SETTINGS)
    with pytest.raises(BadRequest):
        training.grow(requests={"nothing": 2})
    assert step(training, DATA[0]) > 0.0


def test_settings_of_two_growths_multiply() -> None:
    first = Continuation(0.5, 0.25, 2.0, 1, ((4, 4), (8, 8)))
    then = Continuation(0.2, 0.5, 5.0, 2, ((8, 8), (40, 16)), "noise")
    both = composed(first, then)
    assert both == Continuation(0.1, 0.125, 10.0, 2, ((4, 4), (40, 16)), "noise")
    assert both.copies == first.copies * then.copies and both.norm == pytest.approx(first.norm * then.norm)
    assert composed(Continuation(), then) == then and composed(first, Continuation()) == first
