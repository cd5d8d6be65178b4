"""Frameworks are imported when they are used, and a clear message says if one is missing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "jax", "onnxruntime", "array_api_compat", "transformers")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_package_imports_no_framework() -> None:
    code = (
        f"import sys, hyperclone_onnx, hyperclone_onnx.commands.main; print([n for n in {HEAVY} if n in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_missing_framework_names_its_extra(framework: str) -> None:
    code = (
        f"import sys; sys.modules['{framework}'] = None\n"
        f"try:\n    import hyperclone_onnx.frameworks.{framework}\n"
        "except ImportError as problem:\n    print(type(problem).__name__, problem)"
    )
    done = python(code)
    assert done.stdout.startswith("MissingExtra"), done.stderr
    assert f"pip install 'hyperclone-onnx[{framework}]'" in done.stdout


@pytest.mark.parametrize("missing", ["torch", "transformers", "safetensors"])
def test_the_handoff_to_hugging_face_names_its_extra(missing: str) -> None:
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "try:\n    from hyperclone_onnx.frameworks.hugging_face import grow_checkpoint\n"
        "except ImportError as problem:\n    print(type(problem).__name__, problem)"
    )
    done = python(code)
    assert done.stdout.startswith("MissingExtra"), done.stderr
    assert "pip install 'hyperclone-onnx[hf]'" in done.stdout


def test_trained_weights_of_a_hugging_face_folder_are_read_without_a_framework() -> None:
    code = (
        "import sys; from hyperclone_onnx.frameworks.hugging_face import read_trained\n"
        f"print([n for n in {HEAVY} if n in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("handoff MODEL --list", "torch"),
        ("handoff MODEL --to pytorch -o OUT", "torch"),
        ("handoff MODEL --to jax -o OUT", "jax"),
        ("handoff MODEL --to safetensors -o OUT", "torch"),
        ("handoff MODEL --to hf --like OUT -o OUT", "hf"),
        ("absorb MODEL MODEL -o OUT", "torch"),
    ],
)
def test_each_command_names_the_extra_that_it_misses(command: str, extra: str, small: Path, tmp_path: Path) -> None:
    arguments = [{"MODEL": str(small), "OUT": str(tmp_path / "out")}.get(word, word) for word in command.split()]
    missing = ("torch", "jax", "array_api_compat", "transformers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.argv = ['hyperclone-onnx', *{arguments!r}]\n"
        "from hyperclone_onnx.commands.main import main; main()"
    )
    done = python(code)
    assert done.returncode == 2 and f"pip install 'hyperclone-onnx[{extra}]'" in done.stderr.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["expand CHECKPOINT --factor 2 -o OUT", "export CHECKPOINT -o OUT"])
def test_a_checkpoint_without_the_extra_gets_the_two_commands(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    given = [{"CHECKPOINT": str(folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in command.split()]
    code = (
        f"import sys; sys.modules['transformers'] = None; sys.argv = ['hyperclone-onnx', *{given!r}]\n"
        "from hyperclone_onnx.commands.main import main; main()"
    )
    done = python(code)
    repeated = f"pip install 'hyperclone-onnx[hf]' && hyperclone-onnx {shlex.join(given)}"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(repeated), done.stderr
    assert not (tmp_path / "out").exists()
