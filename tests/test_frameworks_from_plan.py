"""`handoff SMALL --plan PLAN`: one process or several write a checkpoint of a model that exists nowhere as a file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, names_in

from hyperclone_onnx import expand
from tests.conftest import ROOT

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("array_api_compat", "torch", "jax"):
    pytest.importorskip(_needed)

Zoo = Callable[[str], Path]
PARTS = ("--max-shard-size", "0.00002")
"""Parts of 20 kB, so that small models have many."""

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")


@pytest.fixture
def small(zoo: Zoo, tmp_path: Path) -> Path:
    """A small model. Beside it lie its plan and the grown model."""
    expand(zoo("llama.distinct"), tmp_path / "big.onnx", 2, check=False, plan_out=tmp_path / "plan.json")
    return zoo("llama.distinct")


def environment(**variables: Any) -> dict[str, str]:
    names = {name: str(value) for name, value in variables.items()}
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **names}


def launch(count: int, small: Path, out: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [*LAUNCHER, count, "--master-port", port, "-m", "hyperclone_onnx", "handoff", small]
    words = ("--plan", out.parent / "plan.json", "-o", out, *words)
    return subprocess.run(
        [str(word) for word in (*command, *words)], capture_output=True, text=True, env=environment(), timeout=300
    )


def tensors(folder: Path) -> dict[str, Any]:
    from hyperclone_onnx.frameworks.checkpoints import read_weights

    return {name.removeprefix("model."): read() for name, read in read_weights(folder).items()}


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and np.array_equal(ours[name], array), name


@pytest.mark.parametrize("target", ["pytorch", "jax"])
def test_one_process_writes_what_the_grown_file_gives(target: str, small: Path, tmp_path: Path, cli: Command) -> None:
    words = ("--plan", tmp_path / "plan.json", "--to", target, "-o", tmp_path / "out", *PARTS)
    done = cli("handoff", small, *words)
    assert done.code == 0, done.stderr
    assert "validated: in" in done.stdout and "plan='" in done.stdout
    assert cli("handoff", tmp_path / "big.onnx", "--to", target, "-o", tmp_path / "whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert names_in(tmp_path) == {"plan.json", "big.onnx", "out", "whole"}
    files = names_in(tmp_path / "out" / "checkpoint")
    assert target == "jax" or len(files) > 8
    assert names_in(tmp_path / "out") == names_in(tmp_path / "whole")


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("pytorch", 2),
        pytest.param("jax", 2, marks=pytest.mark.slow_frameworks),
        pytest.param("pytorch", 4, marks=pytest.mark.slow_frameworks),
        pytest.param("jax", 4, marks=pytest.mark.slow_frameworks),
    ],
)
def test_processes_write_one_checkpoint_together(
    target: str, count: int, small: Path, tmp_path: Path, cli: Command
) -> None:
    done = launch(count, small, tmp_path / "out", "--to", target, *PARTS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"written by {count} processes" in done.stdout and "validated: in" in done.stdout
    assert cli("handoff", tmp_path / "big.onnx", "--to", target, "-o", tmp_path / "whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert names_in(tmp_path) == {"plan.json", "big.onnx", "out", "whole"}


KILLED = """
import os, signal, sys
from hyperclone_onnx.commands.main import main
from hyperclone_onnx.frameworks.exports import pytorch_parts

write, written = pytorch_parts.write_part, []

def write_part(tensors, part, folder):
    if len(written) == 3 and os.environ["RANK"] == "1":
        folder.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(folder)
    write(tensors, part, folder)

pytorch_parts.write_part = write_part
main()
"""


def test_a_run_goes_on_where_a_killed_one_stopped(small: Path, tmp_path: Path, cli: Command) -> None:
    words = (small, "--plan", tmp_path / "plan.json", "--to", "pytorch", "-o", tmp_path / "out", *PARTS)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    command = [sys.executable, "-c", KILLED, "handoff", *map(str, words)]
    workers = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(RANK=rank, **place))
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, -signal.SIGKILL]
    assert errors[0].splitlines()[-1].startswith("error: another process of this run has ended")
    assert "Traceback" not in errors[0]
    assert not (tmp_path / "out").exists()
    done = cli("handoff", *words)
    assert done.code == 0, done.stderr
    assert "parts of an earlier run that was not finished are used again: " in done.stdout
    assert cli("handoff", tmp_path / "big.onnx", "--to", "pytorch", "-o", tmp_path / "whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / ".out.parts").exists()


def test_parts_of_another_plan_are_not_used(small: Path, tmp_path: Path, cli: Command) -> None:
    from hyperclone_onnx.frameworks.exports.parts import begin

    begin(tmp_path / ".out.parts", "another plan")
    (tmp_path / ".out.parts" / "00000").mkdir()
    words = ("--plan", tmp_path / "plan.json", "--to", "pytorch", "-o", tmp_path / "out", "--no-validate")
    done = cli("handoff", small, *words)
    assert done.code == 0, done.stderr
    assert "its parts were removed" in done.stdout


def test_a_wrong_checkpoint_is_not_published(
    small: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperclone_onnx.frameworks.exports import pytorch_parts

    def halved(tensor: Any, windows: Any, read: Any = pytorch_parts.read_slice) -> Any:
        return read(tensor, windows) / 2

    monkeypatch.setattr(pytorch_parts, "read_slice", halved)
    done = cli("handoff", small, "--plan", tmp_path / "plan.json", "--to", "pytorch", "-o", tmp_path / "out")
    assert done.code == 1 and "does not compute what" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_one_line(small: Path, tmp_path: Path, cli: Command) -> None:
    rows = {
        "for safetensors grow the file first": ("--to", "safetensors"),
        "with it there is no --optimizer": ("--to", "pytorch", "--optimizer", tmp_path / "state"),
        "another model": ("--to", "pytorch", "--plan", tmp_path / "other.json"),
    }
    other = plan_of_another_model()
    (tmp_path / "other.json").write_text(other)
    for text, words in rows.items():
        done = cli("handoff", small, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", *words)
        assert done.code == 2 and text in done.stderr, (text, done.stderr)
    assert names_in(tmp_path) == {"plan.json", "big.onnx", "other.json"}


def plan_of_another_model() -> str:
    from hyperclone_onnx import analyse, plan_expansion

    return plan_expansion(analyse(ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx"), 2).dumps()
