"""A model whose norms were written out goes to a trainer and back: the weights of the averages are no parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Command

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from hyperclone_onnx import Refused, expand  # noqa: E402
from hyperclone_onnx.diagnosis import diagnose  # noqa: E402
from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.hugging_face.sources import read_grown  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Zoo = Callable[[str], Path]


@pytest.fixture(scope="module")
def big(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weighted") / "big.onnx"
    report = expand(zoo("bert.distinct"), out, sizes={"hidden": 60, "ffn": 70}, check=False)
    assert len(report.plan.weighed) == 5 and report.to_json()["weighed_norms"] == list(report.plan.weighed)
    return out


def test_the_weights_of_averages_are_buffers_and_come_back_as_they_are(big: Path, tmp_path: Path) -> None:
    model = load(big)
    parameters = dict(model.named_parameters())
    assert parameters and not [name for name in parameters if "average" in name or "epsilon" in name]
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.05 * torch.randn_like(parameter)
    absorb(big, model.state_dict(), tmp_path / "trained.onnx")
    before, after = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for path in (big, tmp_path / "trained.onnx")
    )
    weights = [name for name in before if name.endswith(".average")]
    assert len(weights) == 5 and all(np.array_equal(before[name], after[name]) for name in weights)
    feeds = {value.name: np.random.default_rng(0).integers(0, 2, (2, 7)) for value in ort_session(big).get_inputs()}
    wanted = ort_session(tmp_path / "trained.onnx").run(None, feeds)[0]
    with torch.no_grad():
        got = model(**{name: torch.as_tensor(array) for name, array in feeds.items()})
    got = got[0] if isinstance(got, tuple) else got
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-5 * np.abs(wanted).max())


def ort_session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_hugging_face_configuration_cannot_say_it(big: Path, zoo: Zoo, cli: Command, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"count each channel of the source once \('\w+' first, 5 in all\)"):
        read_grown(big)
    done = cli("expand", zoo("bert.distinct"), "--size", "hidden=60", "-o", tmp_path / "out.onnx", "--no-validate")
    assert done.code == 0 and "5 norms are written out, so that they count each source channel once" in (
        " ".join(done.stdout.split())
    )


def test_diagnosis_sees_the_clones(big: Path, zoo: Zoo) -> None:
    for source in (zoo("bert.distinct"), None):
        result = diagnose(big, source)
        assert not result.stuck and 0 < result.weights < 1
