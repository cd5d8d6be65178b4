"""The pages tell the truth about files, names and commands; and the generated pages are up to date."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from docs import generate
from hyperclone_onnx.commands.main import main
from models.dialects import DIALECTS
from tests.conftest import ROOT, Command

PACKAGE = ROOT / "hyperclone_onnx"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARTS = {
    "handoff.md": PACKAGE / "frameworks",
    "absorb.md": PACKAGE / "frameworks",
    "hugging_face.md": PACKAGE / "frameworks" / "hugging_face",
    "optimizer_state.md": PACKAGE / "frameworks" / "optimizer",
}
"""Pages about one part of the package give the names of its files relative to that part."""

ABOUT_THE_CODE = ("CONTRIBUTING.md", "design.md")
"""The folders in these pages belong to the repository. In other pages they may belong to a user."""


@pytest.mark.slow
def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_operators_is_up_to_date() -> None:
    assert (ROOT / "docs" / "operators.md").read_text(encoding="utf-8") == generate.operators_page()


def test_the_page_of_the_zoo_has_some_of_its_graphs(tmp_path: Path) -> None:
    """The test above takes all of them."""
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    names = generate.zoo_names()
    assert text.count("\n| ") == len(names) + 2
    for name in names[::16]:
        row, detail = generate.zoo_entry(name, tmp_path)
        assert f"\n{row}\n" in text and detail in text, name


def test_every_dialect_is_described_and_measured() -> None:
    text = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
    for name, dialect in DIALECTS.items():
        assert f"| {name} | {dialect.made_by} |" in text, name
        assert f"smollm2-135m {name} x2" in text, name
        assert dialect.decoders_only or f"all-minilm-l6-v2 {name} x3" in text, name


# -- files, names and links -------------------------------------------------------------------------------


def code(text: str) -> Iterator[str]:
    """The texts in backticks, outside of code blocks."""
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def missing_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = page.parent / file
        if file and not linked.exists():
            yield f"a link to {target}, which does not exist"
        elif anchor and anchor not in anchors(linked.read_text(encoding="utf-8") if file else text):
            yield f"a link to {target}: no heading there has that anchor"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, in GitHub's form."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_files(page: Path, text: str) -> Iterator[str]:
    """Paths in backticks exist, relative to the repository, to the package, or to the part that the page is about."""
    bases = [ROOT, PACKAGE, PARTS.get(page.name, ROOT)]
    path = r"[\w./-]+(\.py|/)" if page.name in ABOUT_THE_CODE else r"[\w./-]+\.py"
    for name in code(text):
        stem = name.removesuffix("NAME.py")  # a file that the reader should create: its folder must exist
        if re.fullmatch(path, name) and not any((base / stem).exists() for base in bases):
            yield f"the path {name}, which does not exist"


def missing_names(text: str) -> Iterator[str]:
    """Dotted names in backticks that begin with one of our packages, and imports in Python blocks, exist."""
    packages = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    for name in code(text):
        dotted = re.match(r"(?:hyperclone_onnx\.)?([a-z_]+(?:\.\w+)+)", name)
        whole = dotted and dotted[0] == name.partition("(")[0]
        whole = whole and not name.endswith(".py")
        if dotted and whole and dotted[1].partition(".")[0] in packages and not exists(dotted[1]):
            yield f"the name {name}, which does not exist"
    for _, block in re.findall(r"^( *)```python\n(.*?)^\1```", text, flags=re.S | re.M):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hyperclone_onnx":
                module = (node.module or "").removeprefix("hyperclone_onnx").lstrip(".")
                for alias in node.names:
                    if not exists(f"{module}.{alias.name}".lstrip(".")):
                        yield f"the import of {alias.name} from {node.module}, which does not exist"


def exists(dotted: str) -> bool:
    """Whether `plan.edits.Editor` is a module, or a name that a module or class defines. Nothing is imported."""
    parts = dotted.split(".")
    for length in range(len(parts), -1, -1):
        base = PACKAGE.joinpath(*parts[:length])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.exists():
            return binds(ast.parse(file.read_text(encoding="utf-8")).body, parts[length:])
    return False


def binds(body: list[ast.stmt], names: list[str]) -> bool:
    """Whether a module or class defines a name, that one the next name, and so on."""
    if not names:
        return True
    for statement in body:
        match statement:
            case ast.ClassDef(name=name, body=inner) if name == names[0]:
                return binds(inner, names[1:])
            case ast.FunctionDef(name=name) if name == names[0]:
                return len(names) == 1
            case ast.ImportFrom(names=aliases) if any((alias.asname or alias.name) == names[0] for alias in aliases):
                return len(names) == 1
            case ast.If(body=inner) if binds(inner, names):
                return True
            case ast.Assign() | ast.AnnAssign():
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
                    return len(names) == 1
    return False


def unknown_commands(text: str) -> Iterator[str]:
    """In lines `$ hyperclone-onnx ...` of code blocks, the command and its options exist."""
    for line in re.findall(r"^\$ (?:\S*/)?hyperclone-onnx (.*)$", text, flags=re.M):
        for alternative in line.partition("|")[0].split(" # "):
            words = shlex.split(alternative, comments=True)
            if words and words[0] in main.commands:
                options = {option for parameter in main.commands[words[0]].params for option in parameter.opts}
                yield from (
                    f"{words[0]} has no option {word}"
                    for word in words
                    if re.match("--?[a-z]", word) and word.partition("=")[0] not in options
                )
            elif alternative is line and words:
                yield f"there is no command {words[0]}"


def mistakes(page: Path, text: str) -> list[str]:
    return [*missing_links(page, text), *missing_files(page, text), *missing_names(text), *unknown_commands(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_names_and_commands_on_a_page_exist(page: Path) -> None:
    assert mistakes(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("see [design](nowhere.md)", "a link to nowhere.md"),
        ("see [design](#no-such-heading)\n\n# Such", "no heading"),
        ("`plan/recipe.py` has it", "plan/recipe.py"),
        ("`plans/` has it", "plans/"),
        ("`plan.edits.Redactor` does it", "plan.edits.Redactor"),
        ("`planning.sharing.divide(growth)`", "planning.sharing.divide"),
        ("```python\nfrom hyperclone_onnx.plan.maps import Map\n```", "import of Map"),
        ("```console\n$ hyperclone-onnx expand a.onnx --factors 2\n```", "no option --factors"),
        ("```console\n$ hyperclone-onnx grow a.onnx\n```", "no command grow"),
    ],
)
def test_a_name_that_does_not_exist_shows(text: str, mistake: str) -> None:
    (shown,) = mistakes(ROOT / "docs" / "design.md", text)
    assert mistake in shown


def test_every_page_is_in_the_menu_of_the_site() -> None:
    """`make docs-site` refuses a page that the menu in mkdocs.yml does not lead to."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages == set(re.findall(r": (\S+\.md)$", menu, flags=re.M))


# -- what the first screen shows --------------------------------------------------------------------------


def test_the_command_prints_the_result_in_the_readme(cli: Command) -> None:
    """The tables of grown and kept dimensions agree. Figures that depend on the machine are not compared."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^grew .*?^parameters: .*?$", text, flags=re.M | re.S)
    assert shown is not None
    outcome = cli("expand", ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx", "--factor", "2", "--plan-only")
    *printed, planned = [line.rstrip() for line in outcome.stdout.splitlines()]
    assert shown[0].splitlines() == printed and planned.startswith("planned, nothing written")


def test_every_command_is_in_the_table_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Commands")[2].partition("###")[0]
    assert isinstance(main, click.Group)
    assert set(re.findall(r"^\| `([\w-]+)", text, flags=re.M)) == set(main.commands)
