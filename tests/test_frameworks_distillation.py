"""A student beside its teacher: what is compared, and the loss in PyTorch and JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command

from hyperclone_onnx import BadRequest, Experts, expand, shrink
from hyperclone_onnx.frameworks.pairing import Pairing, pair

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from hyperclone_onnx.frameworks.jax import load as load_jax  # noqa: E402
from hyperclone_onnx.frameworks.jax import load_teacher as load_teacher_jax  # noqa: E402
from hyperclone_onnx.frameworks.torch import load, load_teacher  # noqa: E402

Zoo = Callable[[str], Path]
Array = np.ndarray[Any, Any]


def feeds_of(path: Path) -> dict[str, Array]:
    names = [value.name for value in onnx.load(path).graph.input]
    ids = np.random.default_rng(5).integers(0, 60, (2, 7))
    ones = np.ones_like(ids)
    return {name: ids if "input_ids" in name else ones if "mask" in name else 0 * ids for name in names}


def loss_of(student: Path, teacher: Path, hidden: float) -> float:
    large = load_teacher(teacher, student=student)
    assert large.pairing.hidden and not large.pairing.notes
    feeds = {name: torch.as_tensor(array) for name, array in feeds_of(student).items()}
    model = load(student, values=large.values)
    return float(large.loss(model(**feeds), large(**feeds), hidden=hidden))


GROWTHS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tiled": ("llama", {"factor": 2}),
    "unequal copies, stretched": ("llama", {"factor": 1.5}),
    "unequal copies, means beside them": ("gpt2", {"factor": 1.5}),
    "more layers": ("gpt2", {"factor": 2, "layers": 4}),
    "norms behind the sums": ("bert", {"factor": 2}),
    "experts": ("llama", {"factor": 2, "experts": Experts(4, 2)}),
}


@pytest.mark.parametrize("case", GROWTHS)
def test_a_model_and_what_it_grew_into_are_no_distance_apart(case: str, zoo: Zoo, tmp_path: Path) -> None:
    """Each hidden value of the one is found in the other: any wrong pair of values or channels would show."""
    family, how = GROWTHS[case]
    small, big = zoo(f"{family}.distinct"), tmp_path / "big.onnx"
    expand(small, big, check=False, **how)
    for student, teacher in ((small, big), (big, small)):
        assert abs(loss_of(student, teacher, hidden=1.0)) < 1e-5


def student_of(zoo: Zoo, folder: Path, **how: Any) -> tuple[Path, Path]:
    shrink(zoo("llama.distinct"), folder / "small.onnx", check=False, **(how or {"factor": 0.5}))
    return folder / "small.onnx", zoo("llama.distinct")


def test_a_selected_model_has_the_channels_of_its_teacher(zoo: Zoo, tmp_path: Path) -> None:
    """Its embedding holds the channels that were kept, so that what its first layer reads is exactly theirs."""
    small, big = student_of(zoo, tmp_path)
    teacher = load_teacher(big, student=small)
    feeds = {name: torch.as_tensor(array) for name, array in feeds_of(small).items()}
    outputs, targets = load(small, values=teacher.values)(**feeds), teacher(**feeds)
    first = teacher.pairing.hidden[0]
    assert first.channels is not None and first.channels.of == "teacher"
    wanted = targets[first.teacher][..., list(first.channels.index)]
    torch.testing.assert_close(outputs[first.student], wanted, rtol=0, atol=0)
    assert loss_of(small, big, hidden=1.0) > loss_of(small, big, hidden=0.0) > 0.0


def test_layers_that_are_left_out_are_counted(zoo: Zoo, tmp_path: Path) -> None:
    """The last layer that stays reads what the same layer reads in the teacher, whose numbers are other ones."""
    big = tmp_path / "big.onnx"
    expand(zoo("llama.distinct"), big, layers=4, check=False)
    all_four = [one.teacher for one in pair(big, big).hidden]
    assert not all_four  # a model is no teacher of itself by any plan
    shrink(big, tmp_path / "small.onnx", select={"layers": [0, 3]}, check=False)
    found = pair(tmp_path / "small.onnx", big)
    grown = pair(zoo("llama.distinct"), big)
    assert len(found.hidden) == 3 and found.hidden[-1].teacher == grown.hidden[-1].teacher
    assert found.hidden[1].student != found.hidden[1].teacher  # layer 1 of the student is layer 3 of the teacher


def flat(tree: Any) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(entry.key) for entry in path): np.asarray(array) for path, array in leaves}


def test_torch_and_jax_agree_on_the_loss_and_its_gradients(zoo: Zoo, tmp_path: Path) -> None:
    small, big = student_of(zoo, tmp_path)
    feeds = feeds_of(small)
    tensors = {name: torch.as_tensor(array) for name, array in feeds.items()}
    mask = np.ones((2, 7), np.int64)
    mask[1, 4:] = 0
    how = {"temperature": 3.0, "hidden": 0.5}
    teacher = load_teacher(big, student=small)
    student = load(small, values=teacher.values)
    loss = teacher.loss(student(**tensors), teacher(**tensors), mask=torch.as_tensor(mask), **how)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    other = load_teacher_jax(big, student=small)
    apply, params = load_jax(small, values=other.values)
    targets = other(**feeds)

    @jax.jit
    def value_and_gradients(params: Any, targets: Any) -> Any:
        return jax.value_and_grad(lambda p: other.loss(apply(p, **feeds), targets, mask=mask, **how))(params)

    value, gradients = value_and_gradients(params, targets)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    found = flat(gradients)
    for name, parameter in student.named_parameters():
        wanted = parameter.grad.numpy()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_positions_without_weight_do_not_count(zoo: Zoo, tmp_path: Path) -> None:
    small, big = student_of(zoo, tmp_path)
    teacher = load_teacher(big, student=small)
    feeds = {name: torch.as_tensor(array) for name, array in feeds_of(small).items()}
    outputs, targets = load(small, values=teacher.values)(**feeds), teacher(**feeds)
    mask = torch.ones(2, 7)
    mask[:, 5:] = 0.0
    cut = ({name: value[:, :5] for name, value in side.items()} for side in (outputs, targets))
    masked, wanted = teacher.loss(outputs, targets, hidden=1.0, mask=mask), teacher.loss(*cut, hidden=1.0)
    torch.testing.assert_close(masked, wanted)
    with pytest.raises(BadRequest, match="the mask has the shape"):
        teacher.loss(outputs, targets, mask=mask.T)


def test_the_manifest_says_where_the_teacher_is(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    small, big = student_of(zoo, tmp_path)
    folder = tmp_path / "start"
    result = cli("handoff", small, "--to", "safetensors", "--teacher", big, "-o", folder)
    assert result.code == 0 and "are compared" in result.stdout
    teacher = load_teacher(student=folder)
    assert teacher.pairing == pair(small, big) == Pairing.from_json(teacher.pairing.to_json())
    assert cli("handoff", small, "--to", "safetensors", "-o", tmp_path / "without").code == 0
    with pytest.raises(BadRequest, match="names no teacher"):
        load_teacher(student=tmp_path / "without")


def test_what_is_no_teacher_is_refused(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    small, other = zoo("llama.distinct"), zoo("bert.distinct")
    result = cli("handoff", small, "--to", "safetensors", "--teacher", other, "-o", tmp_path / "out")
    assert result.code == 2 and "is no teacher of" in result.stderr and not (tmp_path / "out").exists()
    student, big = student_of(zoo, tmp_path)
    teacher = load_teacher(big, student=student)
    with pytest.raises(BadRequest, match=r"values=teacher\.values"):
        plain = load(student)
        feeds = {name: torch.as_tensor(array) for name, array in feeds_of(student).items()}
        teacher.loss(plain(**feeds), teacher(**feeds), hidden=1.0)
    with pytest.raises(BadRequest, match="computes no value 'nothing'"):
        load(student, values=["nothing"])
