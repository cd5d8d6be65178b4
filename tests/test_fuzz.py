"""Short runs of the fuzzers (`make fuzz` runs them longer), and a test for each kind of error that they have shown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, normal, perceptron

pytest.importorskip("resource")

from fuzz.mutate import BAD, run_case
from fuzz.mutations import MUTATIONS, mutate
from fuzz.oracle import compare, run_source
from fuzz.seeds import write_beginnings
from models import zoo_store

FAMILIES = [
    "llama.distinct",
    "bert.fused",
    "gpt2.distinct",
    "llama_opset23.built",
    "convnext.torchscript",
    "mamba.built",
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    folder = tmp_path_factory.mktemp("seeds")
    zoo = sorted(zoo_store.write(folder, FAMILIES))
    beginnings = write_beginnings(zoo, folder / "beginnings")
    assert len(beginnings) >= len(FAMILIES)
    return beginnings, zoo


def test_changed_graphs_are_refused_or_right(seeds: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    for number in range(80):
        end, why = run_case(number, seeds, tmp_path)
        assert end not in BAD, f"case {number}: {why}"
        ends[end] += 1
    assert ends["equal"] > 20, ends


def test_the_oracle_finds_a_wrong_model(cli: Command, tmp_path: Path) -> None:
    onnx.save(perceptron(), tmp_path / "small.onnx")
    assert cli("expand", tmp_path / "small.onnx", "--factor", "2", "-o", tmp_path / "big.onnx").code == 0
    ran = run_source(tmp_path / "small.onnx", 0)
    assert compare(tmp_path / "big.onnx", ran) == ""
    big = onnx.load(tmp_path / "big.onnx")
    tensor = next(tensor for tensor in big.graph.initializer if tensor.name == "down.1")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.02), tensor.name))
    onnx.save(big, tmp_path / "big.onnx")
    assert "relative error" in compare(tmp_path / "big.onnx", ran)


def test_every_change_changes_something(seeds: tuple[list[Path], list[Path]]) -> None:
    """Each mutation of the table changes at least one of the graphs."""
    for change in MUTATIONS:
        changed = False
        for number, seed in enumerate((*seeds[0], *seeds[1], *seeds[0])):
            model = onnx.load(seed)
            before = model.SerializeToString(deterministic=True)
            rng = np.random.default_rng(number)
            if change(model, rng) and model.SerializeToString(deterministic=True) != before:
                changed = True
                break
        assert changed, change.__name__
    assert mutate(onnx.load(seeds[0][0]), np.random.default_rng(0))


# -- errors that fuzzing has shown ------------------------------------------------------------------------


def test_outputs_that_nothing_reads_stay(cli: Command, tmp_path: Path) -> None:
    """ONNX Runtime's Attention accepts a past only if it returns a present, whether that is read or not."""
    weights = normal(1, {"e": (31, 12), "gain": (12,), "q": (12, 12), "k": (12, 12), "v": (12, 12), "o": (12, 31)})
    cache = "float[batch, 3, past, 4]"
    graph = (
        f"g (int64[batch, s] ids, {cache} past_key, {cache} past_value) => (float[batch, s, 31] logits) {{ "
        "h = Gather (e, ids) n = LayerNormalization (h, gain) a = MatMul (n, q) b = MatMul (n, k) c = MatMul (n, v) "
        "y, new_key, new_value = Attention <q_num_heads = 3, kv_num_heads = 3> (a, b, c, , past_key, past_value) "
        "logits = MatMul (y, o) }"
    )
    onnx.save(build_model(graph, weights, opset=23), tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--device", "cpu")
    assert outcome.code == 0, outcome.error
    assert compare(tmp_path / "big.onnx", run_source(tmp_path / "model.onnx", 0)) == ""


def test_a_stored_output_of_another_type_than_declared(cli: Command, tmp_path: Path) -> None:
    """ONNX Runtime uses a Constant's own type. The Identity that replaces the Constant must have this type too."""
    model = perceptron()
    number = onnx.numpy_helper.from_array(np.array([1, 2]), "value")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["number"], value=number))
    model.graph.output.append(onnx.helper.make_tensor_value_info("number", onnx.TensorProto.FLOAT, [2]))
    onnx.save(model, tmp_path / "model.onnx")
    cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert compare(tmp_path / "big.onnx", run_source(tmp_path / "model.onnx", 0)) == ""


def test_a_declared_rank_that_is_not_so(cli: Command, tmp_path: Path) -> None:
    model = perceptron()
    model.graph.output.append(onnx.helper.make_tensor_value_info("h1", onnx.TensorProto.FLOAT, ["n", 12]))
    onnx.save(model, tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code in (0, 3, 4) and "defect" not in outcome.error


def test_a_graph_that_ends_the_process_of_onnx_s_inference(cli: Command, tmp_path: Path) -> None:
    """A Split whose number of outputs is not the declared one makes onnx abort. The command survives and says so."""
    model = perceptron()
    split = onnx.helper.make_node("Split", ["h2"], ["s0", "s1", "s2", "s3"], axis=-1, num_outputs=2)
    model.graph.node.append(split)
    model.graph.output.append(onnx.ValueInfoProto(name="s0"))
    onnx.save(model, tmp_path / "model.onnx")
    outcome = cli("inspect", tmp_path / "model.onnx")
    assert outcome.code in (0, 3, 4) and "Traceback" not in outcome.stderr and "defect" not in outcome.error


@pytest.mark.parametrize("size", [0, -1, 2**50])
def test_declared_sizes_that_cannot_be(cli: Command, tmp_path: Path, size: int) -> None:
    """A size of -1 once made the analysis endless, and a size of 2^50 made it request as much memory."""
    weights = normal(2, {"gain": (12,), "up": (12, 20), "down": (20, 12)}) | {"as": np.array([0, 3, -1], np.int64)}
    graph = (
        "g (float[n, 3, 4] x) => (float[n, 12] y) { r = Reshape (x, as) f = Flatten (r) "
        "h = LayerNormalization (f, gain) u = MatMul (h, up) a = Relu (u) y = MatMul (a, down) }"
    )
    model = build_model(graph, weights)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size
    onnx.save(model, tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code in (0, 3, 4) and "defect" not in outcome.error and "memory" not in outcome.error


def test_a_split_of_another_number_of_outputs_than_it_says(cli: Command, tmp_path: Path) -> None:
    """ONNX Runtime ends the process that loads it."""
    model = onnx.shape_inference.infer_shapes(perceptron())
    model.graph.node.append(onnx.helper.make_node("Split", ["h2"], ["s0", "s1"], "cut", axis=-1, num_outputs=1))
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, ["batch", "sequence", 6]) for n in ("s0", "s1"))
    onnx.save(model, tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code == 3 and "Split 'cut' does not fit the specification" in outcome.error


def test_a_declared_shape_of_other_elements(cli: Command, tmp_path: Path) -> None:
    """The file declares 3 heads, but the shape takes the batch size from elsewhere, which leaves 3 / batch heads."""
    weights = normal(4, {"e": (31, 12), "p": (9, 12), "gain": (12,), "wq": (12, 12), "wo": (4, 31)})
    weights |= {"some": np.array([-1, 4]), "three": np.array([3]), "one": np.array([1]), "zero": np.array([0])}
    graph = (
        "g (int64[1, sequence] ids, int64[batch, sequence] mask) => (float[batch, sequence, n, 31] logits) "
        "<float[batch, sequence, 3, 4] heads> { "
        "h = Gather (e, ids) n = LayerNormalization (h, gain) q = MatMul (n, wq) s = Shape (mask) "
        "to = Concat <axis = 0> (s, some) heads = Reshape (q, to) sizes = Shape (heads) "
        "few = Slice (sizes, zero, three) last = Slice (to, three) again = Concat <axis = 0> (few, last) "
        "same = Reshape (heads, again) "
        "logits = MatMul (same, wo) }"
    )
    onnx.save(build_model(graph, weights), tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code == 3 and "(at Reshape " in outcome.error, outcome.error


@pytest.mark.parametrize("gate", ["decay", "beta"])
def test_a_gate_of_unknown_width(gate: str, cli: Command, tmp_path: Path) -> None:
    """Where a slice ends is computed, so the analysis does not know if the length is 1 or the number of heads."""
    weights = normal(5, {"e": (31, 12), "gain": (12,), "wq": (12, 12), "wk": (12, 12), "wv": (12, 12), "wa": (12, 3)})
    weights |= normal(6, {"wb": (12, 3), "wo": (12, 31)})
    weights |= {"zero": np.array([0]), "three": np.array([3]), "last": np.array([-1])}
    other = {"decay": "beta", "beta": "decay"}[gate]
    graph = (
        "g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) { "
        "h = Gather (e, ids) n = LayerNormalization (h, gain) q = MatMul (n, wq) k = MatMul (n, wk) v = MatMul (n, wv) "
        f"a = MatMul (n, wa) b = MatMul (n, wb) {gate}0 = Sigmoid (a) {other} = Sigmoid (b) "
        "m = ReduceMax <keepdims = 0> (ids) nothing = Mul (m, zero) end = Add (nothing, three) "
        f"{gate} = Slice ({gate}0, zero, end, last) y, state = com.microsoft.LinearAttention "
        "<q_num_heads = 3, kv_num_heads = 3, update_rule = 'gated_delta'> (q, k, v, , decay, beta) "
        "logits = MatMul (y, wo) }"
    ).replace("'", '"')
    model = build_model(graph, weights)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "model.onnx")
    run_source(tmp_path / "model.onnx", 0)
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code == 3 and "LinearAttention" in outcome.error and "the last axis of a gate" in outcome.error
