"""The pages that `--html` writes: whole, self-contained, true, and safe with every name that a model may have."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import onnx
import pytest
from conftest import Command, perceptron

import hyperclone_onnx
from hyperclone_onnx.errors import printable
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reports.html.diagram import Bar, Layers, diagram
from hyperclone_onnx.reports.html.elements import Markup, element, joined
from hyperclone_onnx.reports.html.page import Page, Section, Verdict, render

HOSTILE = {
    "up.0": "</script><script>alert(1)</script>",
    "down.0": "<img src=x onerror=alert(1)>",
    "up.1": "\" onmouseover='alert(1)' & <b>",
    "down.1": "turn\u202eround\x1b[2J",
    "gain": "${title} $$ %s {0}",
    "logits": "<logits> & \"'",
}
"""New names for tensors of the small model."""

ALONE = {"meta", "input", "br"}


@dataclass
class Parsed(HTMLParser):
    """What a page has: its tags with their attributes, its texts, and whether every element is closed."""

    tags: Counter[str] = field(default_factory=Counter)
    attributes: list[tuple[str, str | None]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    script: str = ""
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def faults(text: str) -> list[str]:
    """What makes a page unsafe or dependent on other files."""
    page = Parsed()
    page.feed(text)
    named = dict(page.attributes)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    links = [value or "" for name, value in page.attributes if name in ("href", "src", "srcset", "action", "data")]
    return [
        *(["an element is not closed"] if page.open else []),
        *(f"{page.tags[tag]} x {tag}" for tag in ("script", "style") if page.tags[tag] != 1),
        *(f"the element {tag}" for tag in ("img", "link", "iframe", "object", "b") if page.tags[tag]),
        *(f"the attribute {name}" for name, _ in page.attributes if name.startswith("on")),
        *(f"a link to {link}" for link in links if not link.startswith("#")),
        *(["the policy does not name the script"] if f"'sha256-{digest}'" not in text else []),
        *(["the policy allows a network"] if "default-src 'none'" not in str(named.get("content")) else []),
        *(["the page loads something"] if re.search(r"url\(|@import|fetch\(|https?:", text) else []),
    ]


def parsed(path: Path) -> Parsed:
    text = path.read_text(encoding="utf-8")
    assert faults(text) == []
    page = Parsed()
    page.feed(text)
    return page


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the hostile names."""
    values = [*model.graph.initializer, *model.graph.output]
    for value in values:
        value.name = HOSTILE.get(value.name, value.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [HOSTILE.get(name, name) for name in names]
    return model


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each command about a model with hostile names, and the files."""
    from click.testing import CliRunner

    from hyperclone_onnx.commands.main import main

    folder = tmp_path_factory.mktemp("pages")
    small, big, wrong = folder / "a<b>&'small.onnx", folder / "big.onnx", folder / "wrong.onnx"
    onnx.save(renamed(perceptron()), small)
    files = {name: folder / f"{name}.html" for name in ("inspect", "expand", "validate", "differs", "diagnose")}

    def run(*arguments: str | Path, code: int = 0) -> None:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output

    run("inspect", small, "--html", files["inspect"])
    run("expand", small, "--factor", "2", "-o", big, "--device", "cpu", "--html", files["expand"])
    run("validate", small, big, "--device", "cpu", "--html", files["validate"])
    run("diagnose", big, "--device", "cpu", "--html", files["diagnose"])
    model = onnx.load(big)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == HOSTILE["up.0"])
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3, 4] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, wrong)
    run("validate", small, wrong, "--device", "cpu", "--html", files["differs"], code=1)
    return {**files, "small": small, "big": big}


COMMANDS = ("inspect", "expand", "validate", "differs", "diagnose")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_is_whole_and_safe_with_hostile_names(pages: dict[str, Path], name: str) -> None:
    page = parsed(pages[name])
    assert page.tags["h1"] == 1 and page.tags["main"] == 1
    if name in ("inspect", "expand", "diagnose"):
        shown = page.texts
        assert all(printable(new) in shown for old, new in HOSTILE.items() if old != "logits")


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("<h1>", "<h1><b>", "the element b"),
        ("<h1>", '<h1 onclick="x">', "the attribute onclick"),
        ("</main>", "<img src=x></main>", "the element img"),
        ('href="#content"', 'href="other.html"', "a link to other.html"),
        ("</style>", "a{background:url(x)}</style>", "the page loads something"),
        ('"use strict"', '"use what"', "the policy does not name the script"),
    ],
)
def test_a_fault_of_a_page_shows(pages: dict[str, Path], before: str, after: str, fault: str) -> None:
    text = pages["expand"].read_text(encoding="utf-8")
    if after.endswith("<b>"):
        after, before = "<h1><b>x</b>", "<h1>"
    if "<img" in after:
        after = "<img src=#></img></main>"
    assert before in text
    assert fault in faults(text.replace(before, after))


def test_the_verdict_comes_first_and_has_the_figures(pages: dict[str, Path]) -> None:
    texts = parsed(pages["expand"]).texts
    (headline,) = [text for text in texts if text.startswith("Equal: relative error")]
    assert re.fullmatch(r"Equal: relative error \d\.\de-\d\d, tolerance \d\.\de-\d\d", headline)
    assert texts.index(headline) < texts.index("Parameters") < texts.index("Layers and sizes")


def test_a_page_names_what_differs(pages: dict[str, Path]) -> None:
    texts = parsed(pages["differs"]).texts
    (headline,) = [text for text in texts if text.startswith("Not equal: ")]
    assert HOSTILE["up.0"] in headline
    assert "Go on" not in texts
    assert any(text.startswith("relative error") for text in texts)  # the result of the output in the table


def test_the_page_of_a_growth_has_every_size_and_every_grown_tensor(pages: dict[str, Path]) -> None:
    plan = Plan.carried_by({prop.key: prop.value for prop in onnx.load(pages["big"]).metadata_props})
    assert plan is not None
    page = parsed(pages["expand"])
    labels = Counter(value for name, value in page.attributes if name == "data-label")
    assert labels["weight is"] == sum(recipe.grows for recipe in plan.tensors.values())
    assert {"12 → 24 (\N{MULTIPLICATION SIGN}2)", "20 → 40 (\N{MULTIPLICATION SIGN}2)"} <= set(page.texts)
    assert any(text.startswith("kept: indexed by values") for text in page.texts)
    assert "12 \N{MULTIPLICATION SIGN} 20" in page.texts and "24 \N{MULTIPLICATION SIGN} 40" in page.texts


def test_the_page_of_a_model_says_what_can_grow(pages: dict[str, Path]) -> None:
    page = parsed(pages["inspect"])
    assert "Can grow: residual stream, feed-forward width" in page.texts
    assert "Keeps its size: vocabulary. The reasons stand beside the sizes." in page.texts
    assert any("expand" in text and "--factor 2" in text for text in page.texts)


def test_a_path_in_a_command_is_quoted_for_the_shell(pages: dict[str, Path]) -> None:
    (line,) = [text for text in parsed(pages["inspect"]).texts if "--factor 2" in text]
    assert "a<b>&'\"'\"'small.onnx'" in line


# -- refused before any work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("inspect small.onnx --html small.onnx", 2, "this would overwrite the source"),
        ("inspect small.onnx --html weights.bin", 2, "this would overwrite the source"),
        ("validate small.onnx big.onnx --html big.onnx", 2, "this would overwrite the source"),
        ("diagnose big.onnx --html big.onnx", 2, "this would overwrite the source"),
        ("diagnose big.onnx --html d.json --json-out d.json", 2, "d.json is written there"),
        ("expand small.onnx --factor 2 -o new.onnx --html new.onnx", 2, "new.onnx is written there"),
        ("expand small.onnx --factor 2 -o new.onnx --html new.onnx.data", 2, "new.onnx is written there"),
        ("expand folder --factor 2 -o new --html folder/notes.txt", 2, "this would overwrite the source"),
        ("expand small.onnx --factor 2 -o new.onnx --html none/page.html", 2, "its folder none does not exist"),
        ("inspect small.onnx --html folder", 2, "a folder; name the file to write"),
        ("expand small.onnx --set vocab=2 -o new.onnx --html new.html", 3, "cannot grow"),
        ("inspect none.onnx --html new.html", 4, "no such file"),
    ],
)
def test_a_page_that_cannot_be_written_or_would_destroy_is_refused(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(perceptron(layers=1), "small.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    hyperclone_onnx.expand("small.onnx", "big.onnx", 2, check=False)
    Path("folder").mkdir()
    onnx.save(perceptron(layers=1), "folder/model.onnx")
    Path("folder/notes.txt").write_text("notes")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outcome = cli(*arguments.split())
    assert outcome.code == code and text in outcome.error, outcome.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_and_a_plan_have_pages(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    onnx.save(perceptron(layers=1), "folder/model.onnx")
    Path("folder/notes.txt").write_text("notes")
    command = ("expand", "folder", "--factor", "2", "-o", "new", "--device", "cpu", "--html", "new.html")
    assert cli(*command).code == 0
    texts = parsed(Path("new.html")).texts
    assert "1 models are equal to their sources and fit together" in texts and "notes.txt: copied as it is" in texts
    assert cli("expand", "folder/model.onnx", "--set", "ffn=3", "--plan-only", "--html", "plan.html").code == 0
    assert "Planned: nothing is written yet" in parsed(Path("plan.html")).texts


# -- the parts --------------------------------------------------------------------------------------------


def test_texts_are_escaped_and_elements_are_not() -> None:
    assert element("p", "<b>", element("i", "x"), title='"') == '<p title="&quot;">&lt;b&gt;<i>x</i></p>'
    assert joined(["<", Markup("<br>")]) == "&lt;<br>"
    assert element("input", hidden=True, value=None, data_value=0) == '<input hidden data-value="0">'


def test_a_bar_is_divided_as_its_size() -> None:
    text = diagram([Bar("ffn", "ffn", 20, 50), Bar("vocab", "vocab", 31, 31, "why")], [], grown=True)
    assert re.findall(r'class="(source|clone|kept)" style="flex:(\d+)"', text) == [
        ("kept", "1"),
        ("source", "20"),
        ("clone", "20"),
        ("clone", "10"),
    ]


def test_new_layers_are_drawn_in_their_places() -> None:
    text = diagram([], [Layers("decoder", 2, 3, frozenset({1}))], grown=True)
    strip = text.partition('class="layers"')[2]
    assert re.findall(r'class="(source|clone)"', strip) == ["source", "clone", "source"]
    assert "decoder: 2 → 3 layers, 1 of them new" in text


def test_a_page_without_sections_is_whole() -> None:
    text = render(Page("inspect", "<m>", Verdict("note", "$nothing"), [], [Section("a", "A", Markup(""))]))
    assert faults(text) == [] and "$nothing" in text and "<m>" not in text
