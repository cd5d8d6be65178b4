"""Files that are made to harm their reader are refused in one line, quickly, with little memory, and without harm."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, command_line, names_in, normal, perceptron
from onnx import TensorProto, helper, numpy_helper

Model = onnx.ModelProto
Spoil = Callable[[Model], None]

MEMORY = 3 << 30
"""The most address space in bytes; libraries use most of it."""
SECONDS = 60


def bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def refused(cli: Command, folder: Path, code: int, *texts: str, name: str = "model.onnx") -> None:
    before = names_in(folder)
    for arguments in (
        ("inspect", folder / name),
        ("expand", folder / name, "--factor", "2", "-o", folder / "big.onnx", "--no-validate"),
    ):
        outcome = cli(*arguments)
        assert outcome.code == code, outcome.stderr
        assert outcome.stdout == "" and "Traceback" not in outcome.stderr and "defect" not in outcome.stderr
        assert outcome.error.startswith("error: ")
        for text in texts:
            assert text in outcome.error, outcome.error
        assert names_in(folder) == before


# -- external data ----------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder with a model whose weights are in `weights.bin`, beside a folder with a secret file."""
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(perceptron(), folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    return folder


def set_entry(folder: Path, tensor: str, **entries: object) -> None:
    """Change the location that a tensor of `model.onnx` gives for its data."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stored = next(initializer for initializer in model.graph.initializer if initializer.name == tensor)
    kept = {entry.key: entry.value for entry in stored.external_data} | {k: str(v) for k, v in entries.items()}
    del stored.external_data[:]
    for key, value in kept.items():
        stored.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


EXTERNAL = [
    ({"location": "/etc/passwd"}, "outside the model's folder"),
    ({"location": "../secret/weights.bin"}, "outside the model's folder"),
    ({"location": "here/../../secret/weights.bin"}, "outside the model's folder"),
    ({"location": "linked/weights.bin"}, "is a link"),
    ({"location": "link.bin"}, "is a link"),
    ({"location": "inner.bin"}, "is a link"),
    ({"location": "pipe"}, "no regular file"),
    ({"location": "here"}, "no regular file"),
    ({"location": ""}, "no regular file"),
    ({"location": "."}, "no regular file"),
    ({"location": "weights\0.bin"}, "missing"),
    ({"location": "a" * 5000}, "missing"),
    ({"location": "none\x1b[2J\nerror: all is well"}, r"none\x1b[2J"),
    ({"offset": -4}, ""),
    ({"offset": 2**63}, ""),
    ({"offset": 2**80}, ""),
    ({"offset": "four"}, ""),
    ({"offset": 1 << 40}, "too short"),
    ({"length": 1 << 62}, "too short"),
    ({"length": -1}, ""),
    ({"length": 4}, "its shape needs"),
]


@pytest.mark.parametrize(("entries", "text"), EXTERNAL, ids=[str(e)[:40] for e, _ in EXTERNAL])
def test_external_data(cli: Command, split: Path, entries: dict[str, object], text: str) -> None:
    (split / "here").mkdir()
    (split / "linked").symlink_to(split.parent / "secret")
    (split / "link.bin").symlink_to(split.parent / "secret" / "weights.bin")
    (split / "inner.bin").symlink_to(split / "weights.bin")
    os.mkfifo(split / "pipe")
    set_entry(split, "up.1", **entries)
    refused(cli, split, 4, text)


def test_two_tensors_that_are_one(cli: Command, split: Path) -> None:
    """Two tensors with exactly the same bytes do not count as overlapping: tied tensors may be stored so."""
    model = onnx.load(split / "model.onnx", load_external_data=False)
    place = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    set_entry(split, "up.1", **place["up.0"])
    assert cli("inspect", split / "model.onnx").code == 0


# -- special files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/null", "/proc/self/mem", "socket folder", "huge"])
def test_special_files(cli_process: Command, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.onnx"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 42)
    else:
        path = Path(kind)
    outcome = cli_process("expand", path, "--factor", "2", "-o", tmp_path / "big.onnx", preexec_fn=bounded)
    assert outcome.code == 4 and outcome.stdout == "" and outcome.error.startswith("error: ")


@pytest.mark.parametrize("kind", ["fifo", "/dev/null", "/dev/full"])
def test_an_output_that_is_no_file(cli: Command, tmp_path: Path, kind: str) -> None:
    """No file may replace a device: other programs need /dev/null."""
    onnx.save(perceptron(), tmp_path / "model.onnx")
    out = tmp_path / "pipe" if kind == "fifo" else Path(kind)
    if kind == "fifo":
        os.mkfifo(out)
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", out)
    assert outcome.code == 2 and "no regular file" in outcome.error
    assert not out.is_file()


# -- graphs -----------------------------------------------------------------------------------------------


def negative_size(model: Model) -> None:
    model.graph.initializer[0].dims[0] = -31


def sizes_beyond(model: Model) -> None:
    model.graph.initializer[0].dims[:] = [2**40, 2**40]


def size_contradicts(model: Model) -> None:
    model.graph.initializer[0].dims[0] += 1


def huge_claim(model: Model) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**31, 2**31]
    tensor.float_data.append(1.0)


def twice_stored(model: Model) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def twice_made(model: Model) -> None:
    model.graph.node.append(model.graph.node[1])


def twice_an_input(model: Model) -> None:
    model.graph.input.append(model.graph.input[0])


def made_and_stored(model: Model) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "u0"))


def cycle(model: Model) -> None:
    model.graph.node[1].input[0] = "h2"


def own_cycle(model: Model) -> None:
    model.graph.node[3].input[0] = model.graph.node[3].output[0]


def dangling(model: Model) -> None:
    model.graph.node[2].input[0] = "nothing\n\x1b]0;owned\x07"


def dangling_output(model: Model) -> None:
    model.graph.output[0].name = "nothing"


def body(name: str, reads: str, makes: str) -> onnx.GraphProto:
    info = helper.make_tensor_value_info(makes, TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Relu", [reads], [makes])], name, [], [info])


def branch(model: Model, then: onnx.GraphProto) -> None:
    flag = numpy_helper.from_array(np.array(True), "flag")
    model.graph.initializer.append(flag)
    node = helper.make_node("If", ["flag"], ["branched"], then_branch=then, else_branch=body("e", "h2", "other"))
    model.graph.node.append(node)


def dangling_in_a_body(model: Model) -> None:
    branch(model, body("t", "nothing", "inner"))


def cycle_through_a_body(model: Model) -> None:
    branch(model, body("t", "branched", "inner"))


def deep(model: Model) -> None:
    inner = body("innermost", "h2", "v0")
    for depth in range(1, 25):
        info = helper.make_tensor_value_info(f"v{depth}", TensorProto.FLOAT, None)
        node = helper.make_node(
            "If", ["flag"], [f"v{depth}"], then_branch=inner, else_branch=body(f"e{depth}", "h2", f"o{depth}")
        )
        inner = helper.make_graph([node], f"g{depth}", [], [info])
    branch(model, inner)


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    """x -> the calls, one after the other."""
    nodes = [
        helper.make_node(op_type, [f"v{i}"], [f"v{i + 1}"], domain="" if op_type == "Relu" else "own")
        for i, op_type in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["v0"], [f"v{len(calls)}"], nodes, opsets)


def call(model: Model, name: str) -> None:
    model.opset_import.append(helper.make_opsetid("own", 1))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = name, "own"


def calls_itself(model: Model) -> None:
    model.functions.extend([function("a", ["b"]), function("b", ["a"])])
    call(model, "a")


def unfolds(model: Model) -> None:
    """Forty functions, each of which calls the next one twice: 2^40 nodes."""
    model.functions.extend(function(f"f{i}", [f"f{i + 1}"] * 2) for i in range(40))
    model.functions.append(function("f40", ["Relu"]))
    call(model, "f0")


def sparse(model: Model) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def sparse_constant(model: Model) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    sparse = helper.make_sparse_tensor(values, indices, [1 << 40])
    model.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))


def without_a_name(model: Model) -> None:
    model.graph.initializer[0].name = ""


def bad_perm(model: Model) -> None:
    model.graph.node[1].op_type = "Transpose"
    del model.graph.node[1].input[1:]
    model.graph.node[1].attribute.append(helper.make_attribute("perm", [0, 7, 7, 7, -1]))


def unknown_type(model: Model) -> None:
    model.graph.initializer[0].data_type = 177


def untyped(model: Model) -> None:
    model.graph.initializer[0].data_type = 0


def attribute_of_nothing(model: Model) -> None:
    model.graph.node[1].attribute.add()


def attribute_without_a_tensor(model: Model) -> None:
    model.graph.node[1].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)


SPOILT: list[tuple[Spoil, int, str]] = [
    (negative_size, 4, "impossible shape"),
    (sizes_beyond, 4, "impossible shape"),
    (size_contradicts, 4, "more or fewer bytes"),
    (huge_claim, 4, "more or fewer bytes"),
    (twice_stored, 4, "stored tensors"),
    (twice_made, 4, "more than once"),
    (twice_an_input, 4, "two inputs"),
    (made_and_stored, 4, "more than once"),
    (cycle, 4, "cycle"),
    (own_cycle, 4, "cycle"),
    (dangling, 4, r"nothing\n\x1b]0;owned\x07"),
    (dangling_output, 4, "is not defined"),
    (dangling_in_a_body, 4, "is not defined"),
    (cycle_through_a_body, 4, "cycle"),
    (calls_itself, 4, "calls itself"),
    (unfolds, 4, "unfold into"),
    (sparse, 3, "sparse"),
    (sparse_constant, 3, "sparse"),
    (without_a_name, 4, "no name"),
    (bad_perm, 3, "Transpose"),
    (unknown_type, 4, "malformed"),
    (untyped, 4, "no type"),
    (attribute_of_nothing, 4, "no name, type or value"),
    (attribute_without_a_tensor, 4, "no name, type or value"),
]


@pytest.mark.parametrize(("spoil", "code", "text"), SPOILT, ids=[spoil.__name__ for spoil, *_ in SPOILT])
def test_graphs_that_mean_nothing(cli: Command, tmp_path: Path, spoil: Spoil, code: int, text: str) -> None:
    model = perceptron()
    spoil(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    refused(cli, tmp_path, code, text)


def test_nesting_that_is_deep_but_right(cli: Command, tmp_path: Path) -> None:
    """As deep as a protobuf can be read."""
    model = perceptron()
    deep(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code == 0, outcome.error


def varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def nested(depth: int) -> bytes:
    """Nested bodies: a graph's node (1), its attribute (5), its graph (6)."""
    data = b""
    for _ in range(depth):
        data = message(1, message(5, message(6, data)))
    return data


OPSET = message(8, bytes([16, 20]))
BOMBS: dict[str, Callable[[], Iterator[bytes]]] = {
    "a thousand bodies": lambda: iter([message(7, nested(1000)), OPSET]),
    "many nodes": lambda: iter([message(7, message(1, b"") * 40_000_000), OPSET]),
    "many sizes": lambda: iter([message(7, message(5, b"\x08\x01" * 30_000_000)), OPSET]),
    "many opsets": lambda: iter([message(7, message(1, b"")), message(8, b"") * 60_000_000]),
    "many metadata": lambda: iter([message(7, message(1, b"")), message(14, b"") * 60_000_000, OPSET]),
    "a string of 2 GB": lambda: iter([varint(7 << 3 | 2), varint(2**31 - 1), b"abc"]),
    "a string of 2^60": lambda: iter([varint(7 << 3 | 2), varint(2**60), b"abc"]),
    "a name that is no text": lambda: iter([message(7, message(2, b"\xff\xfe\x80")), OPSET]),
}


LARGE = ("many sizes", "many opsets", "many metadata")
"""`make test` reads one large file of this kind, `make test-long` all."""


@pytest.mark.parametrize(
    "bomb", [pytest.param(bomb, marks=pytest.mark.slow if bomb in LARGE else []) for bomb in BOMBS]
)
def test_protobuf_bombs(tmp_path: Path, bomb: str) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        for part in BOMBS[bomb]():
            file.write(part)
    arguments = command_line("inspect", tmp_path / "model.onnx")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, preexec_fn=bounded, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == ""


# -- graphs that need more memory than there is -----------------------------------------------------------

BODIES = {
    "ConstantOfShape": "v = ConstantOfShape (big)",
    "Expand": "v = Expand (one, big)",
    "Range": "v = Range (zero, huge, step)",
    "Tile": "v = Tile (vector, big)",
    "OneHot": "v = OneHot (zeros, huge, pair)",
    "EyeLike": "w = ConstantOfShape (big2) v = EyeLike (w)",
    "Split": "v, v2 = Split (vector, big2)",
    "Slice": "v = Slice (vector, zeros, big)",
    "Pad": "v = Pad (vector, big2)",
    "squares": "s0 = Mul (big, big) "
    + " ".join(f"s{i + 1} = Mul (s{i}, s{i})" for i in range(40))
    + " v = Identity (s40)",
    "polynomials": "p0 = Shape (ids) "
    + " ".join(f"q{i} = Add (p{i}, ones2) p{i + 1} = Mul (q{i}, q{i})" for i in range(40))
    + " v = Identity (p40)",
    "maxima": "m0 = Shape (ids) "
    + " ".join(f"n{i} = Add (m{i}, ones2) m{i + 1} = Max (n{i}, turned)" for i in range(1)).replace("turned", "n0")
    + " "
    + " ".join(f"n{i} = Div (m{i}, big2) m{i + 1} = Sub (n{i}, m{i})" for i in range(1, 40))
    + " v = Identity (m40)",
    "rounds": "r0 = Shape (ids) "
    + " ".join(f"d{i} = Div (r{i}, threes) r{i + 1} = Mul (d{i}, r{i})" for i in range(40))
    + " v = Identity (r40)",
}


QUICK = ("ConstantOfShape", "Range", "Split", "squares", "maxima")


@pytest.mark.parametrize(
    "bomb", [pytest.param(bomb, marks=[] if bomb in QUICK else pytest.mark.slow) for bomb in BODIES]
)
def test_graphs_that_ask_for_terabytes(tmp_path: Path, bomb: str) -> None:
    """The analysis does not compute the large tensors that a graph would compute when it runs."""
    stored = {
        "big": np.array([1 << 40], np.int64),
        "big2": np.array([1 << 40, 1 << 40], np.int64),
        "one": np.ones(1, np.int64),
        "ones2": np.ones(2, np.int64),
        "threes": np.full(2, 3, np.int64),
        "zero": np.array(0, np.int64),
        "zeros": np.zeros(1, np.int64),
        "step": np.array(1, np.int64),
        "huge": np.array(1 << 40, np.int64),
        "pair": np.array([0, 1], np.int64),
        "vector": np.arange(4, dtype=np.int64),
        "embedding": normal(1, {"e": (31, 12)})["e"],
        **normal(2, {"gain": (12,), "up": (12, 20), "down": (20, 12), "head": (12, 31)}),
    }
    graph = (
        f"g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits, int64[k] v) {{ {BODIES[bomb]} "
        "h = Gather (embedding, ids) n = LayerNormalization (h, gain) u = MatMul (n, up) r = Relu (u) "
        "d = MatMul (r, down) y = Add (h, d) m = LayerNormalization (y, gain) logits = MatMul (m, head) }"
    )
    onnx.save(build_model(graph, stored), tmp_path / "model.onnx")
    arguments = ("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    done = subprocess.run(
        command_line(*arguments), capture_output=True, text=True, timeout=SECONDS, preexec_fn=bounded, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (0, 3) and "Traceback" not in done.stderr and "defect" not in last, last
    assert (tmp_path / "big.onnx").exists() == (done.returncode == 0)


@pytest.mark.parametrize("kind", ["Relu", "Identity", "Add", "Transpose", "Reshape"])
def test_long_chains(cli: Command, tmp_path: Path, kind: str) -> None:
    """More nodes in a row than Python's limit of recursion do not lead to deep recursion."""
    model = perceptron()
    extra = {"Add": ["bias"], "Reshape": ["as_it_is"]}.get(kind, [])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(12, np.float32), "bias"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 12]), "as_it_is"))
    attributes = {"perm": [1, 0, 2]} if kind == "Transpose" else {}
    chain = [
        helper.make_node(kind, [before, *extra], [after], **attributes)
        for before, after in itertools.pairwise(
            ["h2", *(f"c{i}" for i in range(sys.getrecursionlimit() + 199)), "chained"]
        )
    ]
    at = next(i for i, node in enumerate(model.graph.node) if "h2" in node.output) + 1
    for node in model.graph.node[at:]:
        node.input[:] = ["chained" if name == "h2" else name for name in node.input]
    for node in reversed(chain):
        model.graph.node.insert(at, node)
    onnx.save(model, tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--no-validate")
    assert outcome.code == 0, outcome.error


# -- names ------------------------------------------------------------------------------------------------

NASTY = "x\n\x1b[2J\x1b]0;owned\x07\r../../etc/passwd\x9b31m\u202e"


def test_names_cannot_steer_a_terminal(cli: Command, tmp_path: Path) -> None:
    model = perceptron()
    renamed = {}
    for tensor in model.graph.initializer:
        renamed[tensor.name] = tensor.name = f"{tensor.name}{NASTY}"
    renamed |= {"ids": f"ids{NASTY}", "logits": f"logits{NASTY}"}
    model.graph.input[0].name, model.graph.output[0].name = renamed["ids"], renamed["logits"]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = NASTY
    model.producer_name = NASTY
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{number}{NASTY}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    onnx.save(model, tmp_path / "model.onnx")
    out = tmp_path / "big.onnx"
    for arguments in (
        ("inspect", tmp_path / "model.onnx"),
        ("expand", tmp_path / "model.onnx", "--factor", "2", "-o", out, "--device", "cpu"),
        ("validate", tmp_path / "model.onnx", out),
        ("expand", tmp_path / "model.onnx", "--set", "vocab=2", "-o", out),
        ("expand", tmp_path / "model.onnx", "--set", f"{NASTY}=2", "-o", out),
        ("handoff", tmp_path / "model.onnx", "--list"),
        ("inspect", tmp_path / f"{NASTY.replace('/', '')}.onnx"),
    ):
        outcome = cli(*arguments)
        assert "Traceback" not in outcome.stderr
        for text in (outcome.stdout, outcome.stderr):
            assert not set(text) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}, arguments
    assert names_in(tmp_path) == {"model.onnx", "big.onnx"}


# -- numbers that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["symmetric", "noisy-symmetric", "noisy-diagonal"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(cli: Command, tmp_path: Path, value: float, strategy: str) -> None:
    """They grow as they are, and the report says so."""
    model = perceptron()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "up.0")
    array = numpy_helper.to_array(tensor).copy()
    array[3, 4] = value
    tensor.CopyFrom(numpy_helper.from_array(array, "up.0"))
    onnx.save(model, tmp_path / "model.onnx")
    arguments = ("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx")
    outcome = cli(*arguments, "--strategy", strategy, "--no-validate")
    assert outcome.code == 0, outcome.error
    grown = next(tensor for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer if tensor.name == "up.0")
    spoilt = ~np.isfinite(numpy_helper.to_array(grown))
    where = np.tile(~np.isfinite(array), (2, 2))
    assert spoilt.any() and not (spoilt & ~where).any(), "what was a number is one still"
    outcome = cli(*arguments, "--strategy", strategy, "--device", "cpu")
    assert "up.0 (1 elements)" in outcome.stdout + outcome.stderr and "not a number" in outcome.stdout + outcome.stderr
    # If no output is finite there is nothing to compare, and the message says so.
    assert outcome.code == 0 or (outcome.code == 3 and "--no-validate" in outcome.error)


def test_the_report_names_weights_that_are_no_numbers(cli: Command, tmp_path: Path) -> None:
    model = perceptron()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "bias.0")
    array = numpy_helper.to_array(tensor).copy()
    array[4] = -np.inf  # a unit whose output is always 0, because a Relu follows
    tensor.CopyFrom(numpy_helper.from_array(array, "bias.0"))
    onnx.save(model, tmp_path / "model.onnx")
    outcome = cli("expand", tmp_path / "model.onnx", "--factor", "2", "-o", tmp_path / "big.onnx", "--device", "cpu")
    assert outcome.code == 0, outcome.error
    assert "infinite or not a number grow as they are: bias.0 (1 elements)" in outcome.stdout


def test_a_name_that_is_no_text(cli: Command, tmp_path: Path) -> None:
    """Protobuf returns such a name as bytes, which cannot be looked up, sorted or printed like text."""
    onnx.save(perceptron(), tmp_path / "model.onnx")
    data = (tmp_path / "model.onnx").read_bytes()
    assert data.count(b"MatMul") > 1
    (tmp_path / "model.onnx").write_bytes(data.replace(b"MatMul", b"Mat\x8bul", 1))
    refused(cli, tmp_path, 4, "no UTF-8 text")
