"""A diagnosis before training predicts what training does: which clones part, and which never do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from hyperclone_onnx import Strategy, expand  # noqa: E402
from hyperclone_onnx.diagnosis import Diagnosis, diagnose  # noqa: E402
from hyperclone_onnx.diagnosis.verdict import weight_tolerance  # noqa: E402
from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.5),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 3e-3, eps=1e-6, weight_decay=0.1),
}


def steps(path: Path, optimizer: str, count: int, out: Path) -> Path:
    """Train for a few steps on random tokens, in the precision of the model, and write a file."""
    model = load(path)
    update = OPTIMIZERS[optimizer](model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(0, 31, (4, 9), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        update.zero_grad()
        loss.backward()
        update.step()
    absorb(path, model.state_dict(), out, check=False)
    return out


def distances(diagnosis: Diagnosis) -> dict[str, float]:
    """The largest distance of the activations that have clones of a dimension, for each dimension."""
    largest: dict[str, float] = {}
    for value in diagnosis.values:
        for dim in value.dims:
            largest[dim] = max(largest.get(dim, 0.0), value.distance or 0.0)
    return largest


CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("symmetric", False, {"factor": 2}),
    ("symmetric", True, {"factor": 3}),
    ("diagonal", False, {"factor": 2}),
    ("diagonal", True, {"factor": 2}),
    ("diagonal", True, {"factor": 3}),
    ("diagonal", True, {"requests": {"ffn": 2}}),
    ("symmetric", True, {"requests": {"ffn": 2}}),
    ("noisy-symmetric", False, {"factor": 2}),
    ("noisy-diagonal", True, {"factor": 2}),
]


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize(("strategy", "tied", "growth"), CASES, ids=str)
def test_tied_clones_stay_tied_and_all_others_part(
    tmp_path: Path, strategy: Any, tied: bool, growth: dict[str, Any], optimizer: str
) -> None:
    """In float64, where rounding cannot part clones within a few steps."""
    onnx.save(perceptron(tied=tied, dtype="double"), tmp_path / "small.onnx")
    big = tmp_path / "big.onnx"
    expand(tmp_path / "small.onnx", big, strategy=Strategy(strategy), check=False, **growth)
    before = diagnose(big, ranks=False)
    after = diagnose(steps(big, optimizer, 5, tmp_path / "trained.onnx"), ranks=False)
    by_dim = distances(after)
    assert set(by_dim) == set(distances(before)) and by_dim
    for dim, distance in by_dim.items():
        assert distance < 1e-11 if dim in before.tied else distance > 1e-7, dim
    if before.stuck:
        assert all(tensor.forward is None or tensor.forward < 1e-11 for tensor in after.tensors)
    else:
        assert not after.stuck and {layer.verdict for layer in after.layers} & {"parting", "parted"}


@pytest.fixture(params=[1, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """With this number of PyTorch threads. 7 threads share 24 columns of a matrix unequally."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("strategy", ["symmetric", "noisy-symmetric"])
@pytest.mark.usefixtures("threads")
def test_a_trained_model_in_single_precision(tmp_path: Path, strategy: Any) -> None:
    onnx.save(perceptron(), tmp_path / "small.onnx")
    big = tmp_path / "big.onnx"
    expand(tmp_path / "small.onnx", big, 2, strategy=Strategy(strategy), check=False)
    trained = steps(big, "AdamW", 20, tmp_path / "trained.onnx")
    stored = (
        [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer] for path in (big, trained)
    )
    changed = [not np.array_equal(one, other) for one, other in zip(*stored, strict=True)]
    assert sum(changed) > 5, "nothing was trained"
    diagnosis = diagnose(trained, tmp_path / "small.onnx")
    if strategy == "symmetric":
        # The threads of a matrix product share its columns. At the end of a share, another kernel may sum the terms in
        # another order. So clones in different columns are equal up to rounding, but not bit by bit.
        rounding = weight_tolerance(ir.DataType.FLOAT, 2)
        assert diagnosis.stuck and max(diagnosis.activations, diagnosis.weights) < rounding
    else:
        assert (
            not diagnosis.stuck and diagnosis.activations > 0.01 and diagnosis.conclusion.startswith("the clones part")
        )
