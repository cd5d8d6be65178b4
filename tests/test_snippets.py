"""The Python snippets of the README and of the pages are whole: mypy accepts each of them in its strict mode."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ROOT

INTERNAL = "design.md"
"""The snippets of this page are cut from our own code."""

PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != INTERNAL)]

OF_THE_READER = """
from typing import Any

input_ids: Any
mask: Any
labels: Any
first_batches: Any
mesh: Any
model: Any
world_size: int


def loss_of(output: Any) -> Any: ...


def parallelize(module: Any) -> Any: ...
"""
"""Names in the snippets that a reader has: the data, the devices, a loss."""


def snippets(page: Path) -> list[str]:
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [textwrap.dedent(block) for _, block in blocks]


def check(folder: Path, texts: dict[str, str]) -> str:
    """What mypy says of some snippets, each in a module of its own."""
    (folder / "of_the_reader.py").write_text(OF_THE_READER)
    names = re.findall(r"^(?:def )?(\w+)[:(]", OF_THE_READER, flags=re.M)
    for module, text in texts.items():
        own = {"model"} if re.search(r"^model = ", text, flags=re.M) else set()
        used = [name for name in names if name not in own and re.search(rf"\b{name}\b(?! = )", text)]
        head = "".join(f"from of_the_reader import {name}\n" for name in used if f"\n{name} = " not in f"\n{text}")
        (folder / f"{module}.py").write_text(head + text)
    cache = ROOT / ".mypy_cache" if (ROOT / ".mypy_cache").is_dir() else folder / "cache"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--cache-dir", str(cache), *(f"{module}.py" for module in texts)],
        cwd=folder,
        env={"MYPYPATH": f"{folder}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mypy_accepts_every_snippet(tmp_path: Path) -> None:
    texts = {f"{page.stem}_{number}": snippet for page in PAGES for number, snippet in enumerate(snippets(page))}
    texts["wrong"] = 'from hyperclone_onnx import expand\n\nexpand("model.onnx", faktor=2).modell\n'
    lines = check(tmp_path, texts).splitlines()
    assert [line for line in lines if ": error: " in line and not line.startswith("wrong.py")] == []
    assert any(line.startswith("wrong.py") and "faktor" in line for line in lines)
