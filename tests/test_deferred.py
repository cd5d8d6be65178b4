"""Modules that dependencies import but no command uses are not loaded, and become available when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
from conftest import ROOT, perceptron

STATE = "import sys; loaded = 'sympy.core' in sys.modules; print(loaded)"


def python(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


def test_a_command_does_not_load_it(tmp_path: Path) -> None:
    onnx.save(perceptron(), tmp_path / "small.onnx")
    code = f"""
import atexit, sys
def tell():
    {STATE}
from hyperclone_onnx.entry import main
sys.argv = ["hyperclone-onnx", "expand", "{tmp_path}/small.onnx", "--factor", "2", "-o", "{tmp_path}/big.onnx"]
try:
    main()
finally:
    tell()
"""
    assert python(code)[-1] == "False"


def test_a_deferred_module_is_there_when_it_is_used() -> None:
    code = f"""
from hyperclone_onnx.system.lazy_modules import defer
defer()
import onnx_ir
{STATE}
half = onnx_ir.SymbolicDim("batch") // 2
{STATE}
import sympy, sympy.abc
print(half == onnx_ir.SymbolicDim(str(half)), sympy.simplify(sympy.abc.x - sympy.abc.x))
"""
    assert python(code) == ["False", "True", "True", "0"]
