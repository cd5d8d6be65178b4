"""The page around a report: verdict, key figures, sections, style and script, all in one text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Literal

from hyperclone_onnx.reports.html.elements import Markup, element, joined

Tone = Literal["good", "bad", "note"]
"""good: it is as wanted; bad: it is not; note: nothing was to be decided."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Verdict:
    """The answer that a reader came for."""

    tone: Tone
    headline: str
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    anchor: str
    heading: str
    body: Markup
    lead: str = ""
    """A sentence below the heading: what the section shows."""


@dataclass(frozen=True)
class Page:
    """All that a page shows."""

    command: str
    """The command whose report this is."""
    title: str
    verdict: Verdict
    facts: Sequence[tuple[str, str]]
    """The key figures, with their names."""
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as a text: HTML with its own style and script, and nothing from elsewhere."""
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return Template(_file("page.html")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=joined([f"{page.command}: {page.title}"]),
        style=_file("style.css"),
        script=script,
        body=_body(page),
    )


def _body(page: Page) -> Markup:
    headings = [(section.anchor, section.heading) for section in page.sections]
    links = (element("li", element("a", heading, href=f"#{anchor}")) for anchor, heading in headings)
    return joined(
        [
            element("a", "To the content", class_="skip", href="#content"),
            element(
                "header",
                element("p", f"hyperclone-onnx {page.command}", class_="command"),
                element("h1", page.title),
                _verdict(page.verdict),
                facts(page.facts),
                element("nav", element("ul", *links), aria_label="Sections") if len(headings) > 1 else "",
            ),
            element("main", *map(_section, page.sections), id="content"),
            element("footer", f"Written by hyperclone-onnx {_version()}. This page loads nothing from a network."),
        ]
    )


def _verdict(verdict: Verdict) -> Markup:
    detail = element("p", verdict.detail) if verdict.detail else ""
    sign = {"good": "✓", "bad": "✗", "note": "i"}[verdict.tone]
    return element(
        "div",
        element("span", sign, class_="sign", aria_hidden="true"),
        element("div", element("p", verdict.headline, class_="headline"), detail),
        class_=f"verdict {verdict.tone}",
    )


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Figures with their names, side by side."""
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", text)) for name, text in pairs),
        class_="facts",
    )


def _section(section: Section) -> Markup:
    lead = element("p", section.lead, class_="lead") if section.lead else ""
    return element(
        "section", element("h2", section.heading), lead, section.body, id=section.anchor, aria_label=section.heading
    )


def _version() -> str:
    try:
        return version("hyperclone-onnx")
    except PackageNotFoundError:
        return ""


def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
