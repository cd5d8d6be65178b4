"""Frameworks are loaded when they are asked for, and missed in words."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "jax", "onnxruntime", "array_api_compat")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_package_imports_no_framework() -> None:
    code = f"import sys, hyperclone_onnx, hyperclone_onnx.cli; print([n for n in {HEAVY} if n in sys.modules])"
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
    assert f"pip install hyperclone-onnx[{framework}]" in done.stdout
