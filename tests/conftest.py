"""What the tests share: models to grow, and functions that run the command in this process or in a new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
# Pytest adds only the folder of this file to the path; `models` is a folder beside it.
sys.path.insert(0, str(ROOT))

from hyperclone_onnx.system.signals import STOPPING  # noqa: E402
from models import zoo_store  # noqa: E402

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcome:
    """How one run of the command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The last line on stderr, which is the error if there is one."""
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""


Command = Callable[..., Outcome]


@pytest.fixture
def cli() -> Iterator[Command]:
    """Runs `hyperclone-onnx ARGUMENTS...` in this process."""
    from hyperclone_onnx.commands.main import main

    def run(*arguments: str | os.PathLike[str]) -> Outcome:
        result = CliRunner().invoke(main, [os.fspath(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    before = {number: signal.getsignal(number) for number in STOPPING}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def command_line(*arguments: str | os.PathLike[str]) -> list[str]:
    """The command, to be run in a new process."""
    return [sys.executable, "-m", "hyperclone_onnx", *(os.fspath(argument) for argument in arguments)]


LAUNCHER = """
import os, signal, sys
for name, action in (pair.split("=") for pair in sys.argv[1].split(",")):
    signal.signal(getattr(signal, name), getattr(signal, action))
os.execv(sys.argv[2], sys.argv[2:])
"""


def with_signals(command: Sequence[str | os.PathLike[str]], **actions: str) -> list[str]:
    """A command that starts with the default actions of the signals that stop it, or with other `actions`.

    Background jobs of a shell ignore SIGINT, and `nohup` makes a command ignore SIGHUP. Without these default actions,
    the command would inherit this from the tests.
    """
    known = {number.name: "SIG_DFL" for number in STOPPING} | actions
    encoded = ",".join(f"{name}={action}" for name, action in known.items())
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, encoded, *map(os.fspath, command)]


@pytest.fixture
def hearing_signals() -> Iterator[None]:
    """For a test that sends itself a signal: this process gets Python's own handlers, however it was started."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def cli_process() -> Command:
    """Runs `hyperclone-onnx ARGUMENTS...` in a new process, for behaviour that shows only there."""

    def run(*arguments: str | os.PathLike[str], **options: Any) -> Outcome:
        done = subprocess.run(
            command_line(*arguments), capture_output=True, text=True, timeout=120, check=False, **options
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(autouse=True)
def _compile_cache_reset() -> Iterator[None]:
    """Let torch.compile forget what a test compiled.

    It counts how often a function was compiled in this process, and gives up after eight times. All models share the
    same forward function, so tests that compile would disturb each other.
    """
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a zoo graph with all its parameters, by `family.variant`. It is written once."""
    folder = tmp_path_factory.mktemp("zoo")

    @cache
    def path_of(name: str) -> Path:
        return zoo_store.write(folder, [name])[0]

    return path_of


@pytest.fixture(scope="session")
def expected(zoo: Callable[[str], Path]) -> Callable[[str], list[tuple[dict[str, Array], list[Array]]]]:
    """Inputs of a zoo graph, and the outputs that it computes from them, by name. It runs once."""
    from zoo_harness import make_feeds, session

    @cache
    def run(name: str) -> list[tuple[dict[str, Array], list[Array]]]:
        source = session(zoo(name))
        return [(feeds, source.run(None, feeds)) for feeds in make_feeds(zoo(name))]

    return run


def build_model(graph: str, weights: Mapping[str, Array], opset: int = 20) -> onnx.ModelProto:
    """A model, from a graph in ONNX's textual syntax and the values of its stored tensors."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{graph}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


NUMPY_TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
"""The names of numpy's types for the types of ONNX's textual syntax."""


def normal(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Normally distributed weights by name, scaled so that the results are of order one."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[0] if len(shape) > 1 else 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def perceptron(
    hidden: int = 12,
    ffn: int = 20,
    vocab: int = 31,
    layers: int = 2,
    *,
    tied: bool = False,
    dtype: str = "float",
) -> onnx.ModelProto:
    """The smallest model with all widths of a transformer except its heads: residual layers between two tables.

    With `tied`, the two tables are one tensor. The grown model then divides by a new scalar before the second use.
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocab, hidden), "gain": (hidden,)}
    if not tied:
        shapes["head"] = (hidden, vocab)
    body = ["h0 = Gather (embedding, ids)"]
    for i in range(layers):
        shapes |= {f"up.{i}": (hidden, ffn), f"bias.{i}": (ffn,), f"down.{i}": (ffn, hidden)}
        body += [
            f"n{i} = LayerNormalization (h{i}, gain)",
            f'u{i} = MatMul (n{i}, "up.{i}")',
            f'b{i} = Add (u{i}, "bias.{i}")',
            f"r{i} = Relu (b{i})",
            f'd{i} = MatMul (r{i}, "down.{i}")',
            f"h{i + 1} = Add (h{i}, d{i})",
        ]
    body += [f"last = LayerNormalization (h{layers}, gain)"]
    body += ["head = Transpose (embedding)"] if tied else []
    body += ["logits = MatMul (last, head)"]
    graph = "\n".join(body)
    weights = {name: array.astype(NUMPY_TYPES[dtype]) for name, array in normal(1, shapes).items()}
    return build_model(
        f"g (int64[batch, sequence] ids) => ({dtype}[batch, sequence, {vocab}] logits) {{\n{graph}\n}}", weights
    )


def with_adapter(rank: int) -> onnx.ModelProto:
    """A model with an adapter: two inputs that have defaults, and whose rank the caller of the model chooses."""
    model = perceptron(layers=1)
    nodes = list(model.graph.node)
    at = next(number for number, node in enumerate(nodes) if node.output[0] == "d0")
    nodes[at].output[0] = "d"
    nodes[at + 1 : at + 1] = [
        onnx.helper.make_node("MatMul", ["n0", "a"], ["na"]),
        onnx.helper.make_node("MatMul", ["na", "b"], ["nab"]),
        onnx.helper.make_node("Add", ["d", "nab"], ["d0"]),
    ]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    declared: dict[str, list[int | str]] = {"a": [12, "r"], "b": ["r", 12]}
    for name, array in normal(5, {"a": (12, rank), "b": (rank, 12)}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, declared[name]))
    return model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small model. Tests must not write to it."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    onnx.save(perceptron(), path)
    return path


def names_in(folder: Path) -> set[str]:
    """The names of all files and folders in a folder, also of hidden ones."""
    return {path.name for path in folder.iterdir()}
