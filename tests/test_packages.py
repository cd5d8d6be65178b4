"""The order of the packages says which package may import which. So no imports form a circle between packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hyperclone_onnx
from tests.imported import imported

ROOT = Path(hyperclone_onnx.__file__).parent

ORDER = """
errors progress summaries
algebra
plan
graphs
system
tensors
publishing
rules
reading
layers
transforms
analysis
planning
rewriting
writing
validation
in_memory
expansion
folders
shrinking
diagnosis
forecasting
frameworks
reports
commands
entry
__main__
""".split()
"""The packages in order: a package may import those before it."""

PUBLIC_FACE = "__init__"
"""The file `__init__.py` of the package only knows where its public names are. It imports a name at its first use."""


def package_of(module: str) -> str:
    """The part of the package that a dotted name, or a path, lies in.

    >>> package_of("hyperclone_onnx.plan.maps")
    'plan'
    """
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PUBLIC_FACE


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The imports of our package in a file, with line numbers; also those within functions, and those for types."""
    for module, name, line in imported(path):
        if module == "hyperclone_onnx" and name:
            yield f"hyperclone_onnx.{name}", line
        elif module.startswith("hyperclone_onnx"):
            yield module, line


def own_package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def upward(path: Path, package: str) -> list[str]:
    """The imports in a file that lead to a package later in the order."""
    if package == PUBLIC_FACE:
        return []
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for module, line in imports(path)
        if package_of(module) != package and ORDER.index(package_of(module)) > ORDER.index(package)
    ]


def test_every_package_has_its_place() -> None:
    packages = {own_package(path) for path in ROOT.rglob("*.py")} - {PUBLIC_FACE}
    assert packages == set(ORDER)


def test_no_package_imports_one_that_comes_after_it() -> None:
    assert [text for path in sorted(ROOT.rglob("*.py")) for text in upward(path, own_package(path))] == []


def test_an_import_in_a_function_that_leads_upward_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_packages.ROOT", tmp_path)
    path = tmp_path / "algebra" / "dims.py"
    path.parent.mkdir()
    path.write_text("def late():\n    from hyperclone_onnx.planning.making import make_plan\n")
    assert upward(path, "algebra") == ["algebra/dims.py:2 imports hyperclone_onnx.planning.making"]


def test_every_package_describes_its_input_and_output() -> None:
    for path in ROOT.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert "In: " in text and "Out: " in text, path
