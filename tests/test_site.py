"""The site: its pages are where its menu says, and what its quick starts and notebooks tell people to run does run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import ROOT, Command

DOCS = ROOT / "docs"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

# Each page, the marker of the tests that run it, and the files that it makes.
PAGES = [
    pytest.param("start/onnx.md", "big.onnx wide.onnx any.onnx deep.onnx model.html", marks=pytest.mark.slow),
    pytest.param("reports.md", "model.html big.html equal.html clones.html", marks=pytest.mark.slow),
    pytest.param("start/torch.md", "big.onnx trained.onnx trained.html", marks=pytest.mark.frameworks),
    pytest.param("start/jax.md", "big.onnx trained.onnx trained.html", marks=pytest.mark.frameworks),
    pytest.param("start/hugging_face.md", "big/config.json big.html", marks=pytest.mark.frameworks),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that a reader has."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx", "model.onnx")
    return tmp_path


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The language and the text of each block of code."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.S | re.M)


def run(text: str, cli: Command) -> None:
    """Run the blocks of a page one after the other, as a reader in a checkout would. Packages are not installed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, block in blocks(text):
        if language == "python":
            exec(compile(block, "snippet", "exec"), names)
        for line in re.findall(r"^\$ (.*)$", block, flags=re.M) if language == "console" else ():
            command, *words = shlex.split(line, comments=True)
            if command == "pip":
                assert words.pop(0) == "install"
                # The package is on no index: a name in the place of the checkout's "." could not be installed.
                assert not any(word.startswith("hyperclone") for word in words), line
                assert set(re.findall(r"\.\[(\w+)\]", line)) <= set(EXTRAS), line
            elif command == "cp":
                source, target = words
                shutil.copy(ROOT / source, target)
            else:
                assert command == "hyperclone-onnx", line
                outcome = cli(*words)
                assert outcome.code == 0, f"{line}\n{outcome.stderr}"


@pytest.mark.parametrize(("page", "files"), PAGES)
@pytest.mark.filterwarnings("ignore")
def test_a_reader_can_run_a_page_from_top_to_bottom(
    page: str, files: str, place: Path, cli: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run((DOCS / page).read_text(encoding="utf-8"), cli)
    assert all((place / name).exists() for name in files.split())
    for difference in re.findall(r"largest difference: (\S+)", capsys.readouterr().out):
        assert float(difference) < 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ hyperclone-onnx inspect none.onnx\n```\n",
        "```console\n$ pip install '.[none]'\n```\n",
        "```console\n$ pip install 'hyperclone-onnx[hf]'\n```\n",
        "```console\n$ cp models/none.onnx model.onnx\n```\n",
        "```console\n$ hyperclone inspect model.onnx\n```\n",
        "```python\nfrom hyperclone_onnx import expandd\n```\n",
    ],
)
def test_a_snippet_that_does_not_run_shows(text: str, place: Path, cli: Command) -> None:
    with pytest.raises((AssertionError, ImportError, FileNotFoundError)):
        run(text, cli)


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_notebook_runs(name: str, place: Path) -> None:
    notebook = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert (place / "trained.onnx").exists()


# -- the menu ---------------------------------------------------------------------------------------------


def pages_of(entry: Any) -> Iterator[str]:
    """The files that a part of the menu names."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry if isinstance(entry, list) else entry.values():
            yield from pages_of(part)


def test_the_menu_leads_to_pages_that_exist() -> None:
    pages = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(pages) == len(set(pages))
    assert [page for page in pages if not (DOCS / page).is_file()] == []


def test_the_site_loads_nothing_from_a_network() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert all((DOCS / name).is_file() for name in settings.get("extra_css", ()))
    assert "extra_javascript" not in settings


def numbers(picture: ElementTree.Element, left: float, right: float) -> Callable[[float, float], list[float]]:
    """A function that gives the numbers in the picture between two heights, from left to right."""
    texts = [element for element in picture.iter() if element.tag.endswith("text") and element.get("x")]

    def between(top: float, bottom: float) -> list[float]:
        return [
            float((element.text or "").replace("\N{MINUS SIGN}", "-"))
            for element in sorted(texts, key=lambda element: float(element.get("x", "0")))
            if left < float(element.get("x", "0")) < right and top < float(element.get("y", "0")) < bottom
        ]

    return between


def test_the_picture_of_cloning_is_true() -> None:
    """In each row of the grown weight, the clones of a number add up to it."""
    picture = ElementTree.fromstring((DOCS / "cloning.svg").read_text(encoding="utf-8"))
    source, grown = numbers(picture, 20, 160), numbers(picture, 20, 310)
    weight = [source(90, 136), source(140, 186)]
    rows = [grown(290, 336), grown(340, 386), grown(400, 446), grown(450, 496)]
    assert len(weight[0]) == len(weight[1]) == 2 and all(len(row) == 4 for row in rows)
    for number, row in enumerate(rows):
        assert [row[0] + row[2], row[1] + row[3]] == pytest.approx(weight[number % 2])
