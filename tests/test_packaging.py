"""What is published fits together: versions, extras, the files of the sdist. Two runtimes in one environment show."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hyperclone_onnx
from hyperclone_onnx.system import runtimes
from tests.conftest import ROOT, Command
from tests.imported import imported

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = ROOT / "hyperclone_onnx"

DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint", "google": "protobuf"}
"""The names of packages whose modules have another name."""

HUGGING_FACE = sorted((PACKAGE / "frameworks" / "hugging_face").glob("*.py"))
SHARED = sorted(path for path in (PACKAGE / "frameworks").rglob("*.py") if path not in HUGGING_FACE)


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["version"] == hyperclone_onnx.__version__ == cited["version"]
    assert cited["license"] == PROJECT["project"]["license"]


# -- extras -----------------------------------------------------------------------------------------------


def named(requirements: list[str]) -> set[str]:
    """The packages in a list of requirements."""
    return {re.split(r"[^\w-]", text)[0].lower() for text in requirements}


def third_party(path: Path) -> set[str]:
    """The packages that a file imports, also within functions."""
    tops = {module.partition(".")[0] for module, _, _ in imported(path)}
    return {DISTRIBUTIONS.get(top, top).replace("_", "-") for top in tops - sys.stdlib_module_names - {PACKAGE.name}}


def given(*extras: str) -> set[str]:
    """What an installation with some extras has."""
    project = PROJECT["project"]
    return named(
        [*project["dependencies"], *(text for name in extras for text in project["optional-dependencies"][name])]
    )


@pytest.mark.parametrize("extra", ["torch", "jax", "hf"])
def test_an_extra_has_what_compiled_models_need(extra: str) -> None:
    """`absorb` and the checks of every target run compiled models."""
    assert "array-api-compat" in given(extra)


def test_the_extra_hf_suffices_for_hugging_face() -> None:
    assert {name for path in HUGGING_FACE for name in third_party(path)} <= given("hf") | {"onnxruntime"}


def test_the_extras_suffice_for_the_package() -> None:
    every = given("torch", "jax", "hf", "plot", "tensorboard") | {
        "onnxruntime",
        "protobuf",
        "optax",
        "sympy",
        "jaxlib",
        "tokenizers",
    }
    assert {name for path in PACKAGE.rglob("*.py") for name in third_party(path)} <= every


def test_a_missing_requirement_would_show(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def late():\n    import accelerate.utils\n")
    assert third_party(tmp_path / "a.py") == {"accelerate"} and "accelerate" not in given("hf")


def test_messages_quote_extras() -> None:
    """Many shells read the brackets as a pattern."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"pip install hyperclone-onnx\[", path.read_text(encoding="utf-8")), path


# -- the sdist --------------------------------------------------------------------------------------------


def test_the_sdist_has_what_the_tests_read() -> None:
    included = set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    assert all((ROOT / name).exists() for name in included)
    read: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r'ROOT / "([\w.-]+)"', text)) | set(re.findall(r"^from (\w+)[. ]", text, flags=re.M))
    own = {name for name in read if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}
    assert own - included - {"tests", ".mypy_cache", "pyproject.toml", "out"} == set()


# -- runtimes ---------------------------------------------------------------------------------------------


def install(folder: Path, name: str, file: str) -> None:
    (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
    (folder / f"{name}-1.0.dist-info" / "RECORD").write_text(f"{file},sha256=,1\n")


def test_two_runtimes_in_one_environment_are_noticed(
    tmp_path: Path, cli: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    install(tmp_path, "onnxruntime_genai", "onnxruntime_genai/__init__.py")
    before = cli("inspect", small)
    install(tmp_path, "onnxruntime_qnn", "onnxruntime/__init__.py")
    install(tmp_path, "onnxruntime_other", "onnxruntime/__init__.py")
    after = cli("inspect", small)
    assert "warning: " not in before.stderr and "onnxruntime-qnn" in after.stderr
    assert after.stderr.count("warning: ") == 1 and (after.code, after.stdout) == (before.code, before.stdout)


def test_one_runtime_is_no_reason_to_warn(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime_gpu", "onnxruntime/__init__.py")
    (tmp_path / "onnxruntime-1.0.dist-info").mkdir()
    assert runtimes.runtimes([str(tmp_path), str(tmp_path)]) == ["onnxruntime-gpu"]
    assert runtimes.warning(["onnxruntime-gpu"]) is None
