"""`validate` must notice changed tensors, changed graphs, and values that are not finite."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, names_in, normal, perceptron
from onnx import numpy_helper

from hyperclone_onnx import BadRequest, Plan, Strategy, expand, validate_files
from hyperclone_onnx.plan.edits import ScaleInput
from hyperclone_onnx.plan.plans import METADATA_KEY
from hyperclone_onnx.plan.strategies import STRATEGIES
from hyperclone_onnx.planning import making as planning
from hyperclone_onnx.planning import sharing
from hyperclone_onnx.validation import judging, running
from hyperclone_onnx.validation import validating as validation
from hyperclone_onnx.validation.outputs import OutputReport
from hyperclone_onnx.validation.sessions import Runner, providers
from hyperclone_onnx.validation.tensor_check import TensorReport
from hyperclone_onnx.validation.tolerance import DOUBLE_TOLERANCE

Array = np.ndarray[Any, Any]


@pytest.fixture
def pair(small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A small model, and the model grown from it."""
    big = tmp_path / "big.onnx"
    expand(small, big, 2, device="cpu")
    return small, big


def edit(path: Path, name: str, change: Callable[[Array], Array]) -> None:
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, path)


def set_plan(path: Path, text: str | None) -> None:
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if text is not None:
        model.metadata_props.add(key=METADATA_KEY, value=text)
    onnx.save(model, path)


# -- tensors ----------------------------------------------------------------------------------------------


def one_percent(array: Array) -> Array:
    middle = np.argsort(np.abs(array), axis=None)[array.size // 2]
    array.flat[middle] *= 1.01
    return array


def swapped(array: Array) -> Array:
    assert not np.array_equal(array[0], array[1])
    array[[0, 1]] = array[[1, 0]]
    return array


# One tensor of each kind: shared rows, shared columns, copied rows, copied vectors.
CHANGES: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "a shared weight by 1%": ("up.0", one_percent),
    "another by 1%": ("down.1", one_percent),
    "a copied weight by 1%": ("embedding", one_percent),
    "the head by 1%": ("head", one_percent),
    "a bias by 1%": ("bias.1", one_percent),
    "a gain by 1%": ("gain", one_percent),
    "swapped rows": ("up.1", swapped),
    "swapped words": ("embedding", swapped),
    "swapped biases": ("bias.0", swapped),
    "another scale": ("down.0", lambda array: array * np.float32(1.001)),
    "zeros": ("head", np.zeros_like),
    "not a number": ("up.0", lambda array: np.where(array == array.max(), np.float32(np.nan), array)),
    "another type": ("gain", lambda array: array.astype(np.float64)),
    "another shape": ("bias.0", lambda array: array[:-1]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_tensor_is_named(case: str, cli: Command, pair: tuple[Path, Path]) -> None:
    assert cli("validate", *pair, "--device", "cpu").code == 0
    name, change = CHANGES[case]
    edit(pair[1], name, change)
    done = cli("validate", *pair, "--device", "cpu")
    # ONNX Runtime may be unable to load a model in which a tensor has another type or shape.
    assert done.code == 1 or (case.startswith("another ") and done.code == 3)
    assert done.code == 3 or f"DIFFERS: tensor {name}: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", [np.float16])
@pytest.mark.parametrize("percent", [0.1, 1, 5])
def test_a_changed_weight_of_half_precision(dtype: Any, percent: float, tmp_path: Path) -> None:
    source, big = tmp_path / "half.onnx", tmp_path / "big.onnx"
    model = perceptron(hidden=32, ffn=48)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, source)
    result = expand(source, big, 2, device="cpu").validation
    assert result is not None and result.outputs[0].max_relative < 1e-2

    def change(array: Array) -> Array:
        array.flat[np.abs(array).argmax()] *= dtype(1 + percent / 100)
        return array

    edit(big, "up.0", change)
    assert not validate_files(source, big, "cpu").equal


# -- outputs ----------------------------------------------------------------------------------------------


def test_without_a_plan_only_outputs_are_compared(cli: Command, pair: tuple[Path, Path]) -> None:
    set_plan(pair[1], None)
    done = cli("validate", *pair, "--device", "cpu")
    assert done.code == 0 and "carries no plan" in done.stdout
    edit(pair[1], "down.0", lambda array: array * np.float32(1.01))
    done = cli("validate", *pair, "--device", "cpu")
    assert done.code == 1 and "DIFFERS: output logits: relative error" in done.stdout


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 99}'])
def test_a_plan_that_cannot_be_read(text: str, cli: Command, pair: tuple[Path, Path]) -> None:
    set_plan(pair[1], text)
    done = cli("validate", *pair)
    assert done.code == 4 and "plan" in done.error and "Traceback" not in done.stderr


def test_a_plan_of_another_model(cli: Command, pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(perceptron(layers=3), other)
    assert cli("validate", other, pair[1], "--device", "cpu").code in (1, 4)
    deeper = tmp_path / "deeper.onnx"
    expand(other, deeper, 2, device="cpu")
    done = cli("validate", pair[0], deeper, "--device", "cpu")
    assert done.code in (1, 4) and "Traceback" not in done.stderr


def test_two_unlike_models(cli: Command, pair: tuple[Path, Path], tmp_path: Path) -> None:
    unlike = tmp_path / "unlike.onnx"
    onnx.save(perceptron(vocab=37), unlike)
    assert cli("validate", pair[0], unlike, "--device", "cpu").code == 1
    assert cli("validate", pair[0], pair[0], "--device", "cpu").code == 0


@dataclass(frozen=True)
class Ends:
    """Endings of two graphs that are equal up to `t`, and whether they may count as equal."""

    label: str
    small: str
    big: str
    equal: bool


ENDS = [
    Ends(
        "infinity-in-the-same-places",
        "y = Add (t, some_inf)",
        "y = Add (t, some_inf)",
        True,
    ),
    Ends("infinity-and-its-opposite", "y = Add (t, some_inf)", "y = Sub (t, some_inf)", False),
    Ends("infinity-and-no-number", "y = Add (t, some_inf)", "y = Add (t, some_nan)", False),
    Ends("tiny-outputs", "y = Mul (t, tiny)", "n = Neg (t)\ny = Mul (n, tiny)", False),
    Ends("one-in-a-thousand", "y = Identity (t)", "y = Mul (t, near)", False),
    Ends("no-such-shape", "y = Identity (t)", "y = Transpose (t)", False),
]


@pytest.mark.parametrize(
    "ends",
    [pytest.param(e, id=e.label) for e in ENDS],
)
def test_outputs_are_compared(ends: Ends, tmp_path: Path) -> None:
    some = np.array([0, 1, 0, 0, 0, 0], dtype=np.float32)
    weights = {
        "w": np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32),
        "some_inf": np.where(some, np.float32(np.inf), some),
        "some_nan": np.where(some, np.float32(np.nan), some),
        "nan": np.full(6, np.nan, dtype=np.float32),
        "tiny": np.full(6, 1e-30, dtype=np.float32),
        "near": np.full(6, 1.001, dtype=np.float32),
    }
    for name, end in (("small", ends.small), ("big", ends.big)):
        text = f"g (float[batch, 6] x) => (float[rows, columns] y) {{ t = MatMul (x, w)\n {end} }}"
        onnx.save(build_model(text, weights), tmp_path / f"{name}.onnx")
    result = validate_files(tmp_path / "small.onnx", tmp_path / "big.onnx", "cpu")
    assert result.equal == ends.equal and bool(result.problems) != ends.equal


def test_where_no_output_is_a_number_nothing_is_compared(small: Path, tmp_path: Path, cli: Command) -> None:
    """That is no difference: it is refused, by name of the weights that are to blame where there are any."""
    text = "g (float[batch, 6] x) => (float[batch, 6] y) { t = MatMul (x, w)\n y = Add (t, b) }"
    weights = {"w": np.eye(6, dtype=np.float32), "b": np.full(6, np.nan, dtype=np.float32)}
    onnx.save(build_model(text, weights), tmp_path / "nan.onnx")
    done = cli("validate", tmp_path / "nan.onnx", tmp_path / "nan.onnx", "--device", "cpu")
    assert (done.code, done.stdout) == (3, "")
    assert "no output is a number" in done.error and "the weights of b (6 elements)" in done.error
    text = text.replace("y = Add (t, b)", "z = Sub (t, t)\n l = Log (z)\n o = Sub (l, l)\n y = Mul (o, t)")
    onnx.save(build_model(text, {"w": weights["w"]}), tmp_path / "undefined.onnx")
    done = cli("validate", tmp_path / "undefined.onnx", tmp_path / "undefined.onnx", "--device", "cpu")
    assert done.code == 3 and "no output is a number" in done.error and "weights" not in done.error
    assert "--inputs" in done.error


def test_logits_of_words_that_cannot_come(tmp_path: Path) -> None:
    model, mask = perceptron(), np.zeros(31, dtype=np.float32)
    mask[3] = -np.inf
    model.graph.node[-1].output[0] = "free"
    model.graph.node.append(onnx.helper.make_node("Add", ["free", "mask"], ["logits"]))
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    onnx.save(model, tmp_path / "small.onnx")
    result = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, device="cpu").validation
    assert result is not None and result.equal
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["equal"]
    assert result.outputs[0].kl_divergence is not None and result.outputs[0].kl_divergence < 1e-9


# -- tolerance and devices --------------------------------------------------------------------------------


def test_the_tolerance_and_its_reason(pair: tuple[Path, Path]) -> None:
    result = validate_files(*pair, "cpu")
    assert result.tensors is not None and result.tensors.checked >= 9 and result.tensors.residue < 1e-6
    assert result.outputs[0].max_relative <= result.tolerance < 1e-4
    for word in ("float eps 1.2e-07", "sqrt(", "residue"):
        assert word in result.tolerance_reason


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
EXACT_CUDA = (CUDA, {"use_tf32": "0"})


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("auto", [CPU], [CPU]),
        ("auto", [CUDA, CPU], [EXACT_CUDA, CPU]),
        ("auto", ["TensorrtExecutionProvider", CUDA, CPU], [EXACT_CUDA, CPU]),
        ("cpu", [CUDA, CPU], [CPU]),
        ("cuda", [CUDA, CPU], [EXACT_CUDA, CPU]),
    ],
)
def test_providers(device: Any, available: list[str], expected: list[Any]) -> None:
    assert providers(device, available) == expected


def test_cuda_that_this_runtime_has_not() -> None:
    with pytest.raises(BadRequest, match=r"hyperclone-onnx\[cuda\].*--device cpu"):
        providers("cuda", [CPU])


def test_cuda_that_does_not_start(cli: Command, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    done = cli("validate", *pair, "--device", "cuda")
    assert done.code == 2 and "--device cpu" in done.error and done.stdout == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2.distinct", "llama.distinct"])
def test_on_cuda(name: str, zoo: Callable[[str], Path], cli: Command, tmp_path: Path) -> None:
    big = tmp_path / "big.onnx"
    done = cli("expand", zoo(name), "--factor", "2", "-o", big, "--device", "cuda", "--json")
    assert done.code == 0 and json.loads(done.stdout)["validation"]["provider"] == CUDA
    # Products that are rounded to 10 bits would have a thousand times this error.
    assert max(output["max_relative"] for output in json.loads(done.stdout)["validation"]["outputs"]) < 1e-5
    assert cli("validate", zoo(name), big, "--device", "cuda").code == 0


# -- a model with a scale of its own ----------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, Path]:
    """A model with one table, and the model grown from it: a scalar divides before the second use of the table."""
    source, big = tmp_path / "tied.onnx", tmp_path / "grown.onnx"
    onnx.save(perceptron(tied=True), source)
    expand(source, big, 2, device="cpu")
    return source, big


def the_scale(model: onnx.ModelProto) -> onnx.TensorProto:
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale"))
    return scale


def change_the_scale(model: onnx.ModelProto) -> None:
    scale = the_scale(model)
    scale.CopyFrom(numpy_helper.from_array(np.float32(1.0001) * numpy_helper.to_array(scale), scale.name))


def drop_the_scale(model: onnx.ModelProto) -> None:
    """Remove the one inserted node that divides."""
    node = next(node for node in model.graph.node if the_scale(model).name in node.input)
    model.graph.node.remove(node)
    for other in model.graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = node.input[0]


def drop_a_layer(model: onnx.ModelProto) -> None:
    """Let the last norm read the residual stream from before the last layer."""
    next(node for node in model.graph.node if node.output[0] == "last").input[0] = "h1"


def rename_the_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    next(node for node in model.graph.node if node.output[0] == "logits").output[0] = "scores"


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("spoil", [change_the_scale, drop_the_scale, drop_a_layer, rename_the_output])
def test_a_changed_graph_is_noticed(
    spoil: Callable[[onnx.ModelProto], None], with_plan: bool, cli: Command, tied: tuple[Path, Path]
) -> None:
    """All tensors are right. Only the outputs show the error."""
    model = onnx.load(tied[1])
    spoil(model)
    onnx.save(model, tied[1])
    if not with_plan:
        set_plan(tied[1], None)
    done = cli("validate", *tied, "--device", "cpu", "--json")
    data = json.loads(done.stdout)
    assert (done.code, data["equal"]) == (1, False)
    assert all(problem.startswith("output logits") for problem in data["problems"]), data["problems"]
    assert bool(data["notes"]) != with_plan


def test_weight_that_moves_between_repeats_is_no_error(cli: Command, pair: tuple[Path, Path]) -> None:
    """Any shares that add up are right, because the check compares the sum, and not the plan's noise."""

    def move(array: Array) -> Array:
        array[0, 0] += 0.25
        array[12, 0] -= 0.25
        return array

    edit(pair[1], "up.0", move)
    assert cli("validate", *pair, "--device", "cpu").code == 0


def test_a_tensor_in_no_recipe_must_be_the_source_s_own(
    zoo: Callable[[str], Path], cli: Command, tmp_path: Path
) -> None:
    source, big = zoo("gpt2.distinct"), tmp_path / "big.onnx"
    plan = expand(source, big, 2, check=False).plan
    stored = {tensor.name for tensor in onnx.load(source).graph.initializer}
    name = next(
        tensor.name
        for tensor in onnx.load(big).graph.initializer
        if tensor.name in stored and tensor.name not in plan.tensors and tensor.data_type == onnx.TensorProto.FLOAT
    )
    edit(big, name, lambda array: np.asarray(array + np.float32(0.5)))
    done = cli("validate", source, big, "--device", "cpu")
    assert done.code == 1
    assert f"DIFFERS: tensor {name}: it should be the source's own and differs" in done.stdout


def test_a_tensor_that_the_plan_names_and_the_model_has_not(cli: Command, pair: tuple[Path, Path]) -> None:
    model = onnx.load(pair[1])
    next(tensor for tensor in model.graph.initializer if tensor.name == "up.0").name = "up.renamed"
    node = next(node for node in model.graph.node if "up.0" in node.input)
    node.input[list(node.input).index("up.0")] = "up.renamed"
    onnx.save(model, pair[1])
    done = cli("validate", *pair, "--device", "cpu")
    assert (done.code, done.stdout) == (4, "")
    assert "no tensor 'up.0', which the plan names" in done.error


def test_another_seed_draws_other_inputs(cli: Command, pair: tuple[Path, Path]) -> None:
    def outputs(seed: str) -> Any:
        return json.loads(cli("validate", *pair, "--device", "cpu", "--json", "--seed", seed).stdout)["outputs"]

    assert outputs("1") == outputs("1") != outputs("2")


def test_a_source_that_does_not_run_is_refused(cli: Command, tmp_path: Path) -> None:
    """A model that cannot run cannot be compared, and is not published."""
    model = perceptron()
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Twist", "my.domain"
    model.opset_import.append(onnx.helper.make_opsetid("my.domain", 1))
    onnx.save(model, tmp_path / "model.onnx")
    done = cli("expand", tmp_path / "model.onnx", "--factor", "2", "--set", "hidden=1", "-o", tmp_path / "big.onnx")
    assert (done.code, done.stdout) == (3, "")
    assert names_in(tmp_path) == {"model.onnx"}


# -- types and noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind", "eps"), [("float", "f4", "1.2e-07"), ("float16", "f2", "9.8e-04"), ("double", "f8", "2.2e-16")]
)
@pytest.mark.parametrize("factor", [2, 3])
def test_the_tolerance_is_the_type_s_and_is_printed(
    dtype: str, kind: str, eps: str, factor: int, cli: Command, tmp_path: Path
) -> None:
    source, big = tmp_path / "model.onnx", tmp_path / "big.onnx"
    onnx.save(perceptron(dtype=dtype, tied=True), source)
    arguments = ("expand", source, "--factor", str(factor), "-o", big, "--device", "cpu", "--precision", "float64")
    done = cli(*arguments, "--json")
    assert done.code == 0, done.error
    data = json.loads(done.stdout)["validation"]
    reason = data["tolerance_reason"]
    assert re.search(rf"{dtype} eps {eps} x sqrt\(\d+ summands\) \+ \d+ x residue \d\.\de[-+]\d+", reason)
    assert 8 < data["tolerance"] / np.finfo(kind).eps < 1000
    assert all(output["max_relative"] <= data["tolerance"] for output in data["outputs"])
    assert all(0 < output["max_relative"] <= DOUBLE_TOLERANCE for output in data["double"])
    assert names_in(tmp_path) == {"model.onnx", "big.onnx"}
    assert f"tolerance {data['tolerance']:.1e} = {reason}" in cli("validate", source, big, "--device", "cpu").stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("snr_db", [0.0, 20.0, 60.0])
def test_noise_of_any_usual_strength(strategy: Any, snr_db: float, tied: tuple[Path, Path]) -> None:
    result = expand(*tied, 3, strategy=Strategy(strategy, snr_db), device="cpu", precision="float64").validation
    assert result is not None and result.equal


@pytest.mark.parametrize("strategy", ["noisy-symmetric", "noisy-diagonal"])
def test_noise_that_drowns_the_weights_is_no_strategy(strategy: Any) -> None:
    with pytest.raises(ValueError, match="between -10 and 200"):
        Strategy(strategy, -20.0)


def blur_the_scales(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Make every division that a plan inserts slightly wrong."""

    def make_plan(*arguments: Any, **options: Any) -> Plan:
        plan = planning.make_plan(*arguments, **options)
        edits = tuple(
            replace(edit, power=edit.power * times) if isinstance(edit, ScaleInput) else edit for edit in plan.edits
        )
        assert edits != plan.edits
        return replace(plan, edits=edits)

    monkeypatch.setattr("hyperclone_onnx.expansion.request.make_plan", make_plan)


@pytest.mark.parametrize(
    ("times", "precision", "message"),
    [
        (1.001, "stored", r"output logits in float32: relative error \d\.\de-04 > \d\.\de-06"),
        (1.0001, "float64", r"output logits in float64: relative error \d\.\de-05 > 1.0e-12"),
    ],
)
def test_wider_types_show_errors_that_half_precision_hides(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, precision: str, message: str
) -> None:
    """A division with an error of 1 / 1,000 is within rounding in float16, but not in float32."""
    blur_the_scales(monkeypatch, times)
    onnx.save(perceptron(dtype="float16", tied=True), tmp_path / "model.onnx")
    arguments = ("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--device", "cpu")
    done = cli(*arguments, "--precision", precision, "--strategy", "symmetric")
    assert (done.code, done.stdout) == (1, "")
    assert re.search(message, done.error)
    assert "output logits:" not in done.error, "float16 itself shows nothing"
    assert names_in(tmp_path) == {"model.onnx"}


def integer_model(path: Path) -> None:
    """A perceptron with a residual stream, whose weights are codes and whose activations are rounded to 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.save(perceptron(hidden=32, ffn=48, layers=3), path)
    quantize_dynamic(path, path, weight_type=QuantType.QInt8)


def test_steps_of_rounded_activations_are_no_difference(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of a last bit moves a code by a whole step. Without the rounding, no difference remains."""
    model = tmp_path / "model.onnx"
    integer_model(model)
    compare, calls = running.compare, itertools.count()

    def with_a_step(name: str, want: Any, got: Any, **options: Any) -> OutputReport:
        return compare(name, want, got * (1.02 if next(calls) == 0 else 1.0), **options)

    monkeypatch.setattr(running, "compare", with_a_step)
    monkeypatch.setattr(judging, "measurable", lambda _: False)
    done = cli("expand", model, "--factor", "2", "-o", tmp_path / "big.onnx", "--device", "cpu", "--json")
    assert done.code == 0, done.error
    report = json.loads(done.stdout)["validation"]
    assert report["outputs"][0]["max_relative"] > 0.01 > 1e-5 > report["wide"][0]["max_relative"]
    assert any("rounded to few bits" in note for note in report["notes"])


def test_a_wrong_scale_is_found_among_rounded_activations(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of 1 / 100, which is one step of 8 bits, shows without the rounding."""
    model = tmp_path / "model.onnx"
    integer_model(model)
    monkeypatch.setattr(sharing._Divider, "_rescale", off_by_a_percent(sharing._Divider._rescale))
    monkeypatch.setattr(validation, "check_tensors", lambda *_, **__: TensorReport())
    done = cli("expand", model, "--factor", "2", "-o", tmp_path / "big.onnx", "--device", "cpu")
    assert done.code == 1
    assert re.search(r"output logits in float32: relative error", done.error)


def off_by_a_percent(rescale: Any) -> Any:
    def rescaled(self: Any, use: Any, scale: float) -> None:
        rescale(self, use, scale * 1.01)

    return rescaled


# -- sessions that start ----------------------------------------------------------------------------------


class Session:
    """A session of ONNX Runtime that starts with those of the requested providers that work."""

    working: tuple[str, ...] = ()
    asked: tuple[Any, ...] = ()

    def __init__(self, path: str, options: Any, providers: list[Any], **_: Any) -> None:
        Session.asked = tuple(providers)
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        self.started = [name for name in names if name in self.working]

    def get_providers(self) -> list[str]:
        return self.started

    def get_inputs(self) -> list[Any]:
        return []

    get_outputs = get_overridable_initializers = get_inputs


@pytest.mark.parametrize(
    ("device", "available", "working", "ran"),
    [
        ("auto", [CUDA, CPU], (CUDA, CPU), CUDA),
        ("auto", [CUDA, CPU], (CPU,), CPU),
        ("auto", [CPU], (CPU,), CPU),
        ("cpu", [CUDA, CPU], (CUDA, CPU), CPU),
        ("cuda", [CUDA, CPU], (CUDA, CPU), CUDA),
        ("cuda", [CUDA, CPU], (CPU,), None),
        ("cuda", [CPU], (CPU,), None),
    ],
)
def test_the_provider_that_started_is_reported(
    device: Any,
    available: list[str],
    working: tuple[str, ...],
    ran: str | None,
    cli: Command,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(Session, "working", working)
    if ran is not None:
        assert Runner(pair[0], device).provider == ran
        assert (EXACT_CUDA in Session.asked) == (device != "cpu" and CUDA in available)
        return
    out = pair[1].with_name("other.onnx")
    for arguments in (("validate", *pair), ("expand", pair[0], "--factor", "2", "-o", out)):
        done = cli(*arguments, "--device", device)
        assert (done.code, done.stdout) == (2, "")
        assert re.search(r"--device cuda: .*install 'hyperclone-onnx\[cuda\]'.*--device cpu", done.error)
    assert names_in(out.parent) == {pair[1].name}


def test_running_statistics_start_from_the_stored_ones_in_each_run(tmp_path: Path) -> None:
    """ONNX Runtime writes them over the stored tensors, where the grown graph adds nodes behind them."""
    body = """
        h = MatMul (x, up)
        n, m, v = BatchNormalization <training_mode = 1> (h, gain, bias, mean, var)
        y = MatMul (n, down)
    """
    weights = normal(0, {"up": (6, 12), "gain": (12,), "bias": (12,), "mean": (12,), "down": (12, 5)})
    weights["var"] = np.ones(12, dtype=np.float32)
    model = build_model(f"g (float[batch, 6] x) => (float[batch, 5] y, float[12] m, float[12] v) {{ {body} }}", weights)
    onnx.save(model, tmp_path / "small.onnx")
    result = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, keep_interface=True, device="cpu")
    assert result.validation is not None and result.validation.equal
