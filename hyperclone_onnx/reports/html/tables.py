"""Tables, lists and commands of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperclone_onnx.reports.html.elements import Markup, element

SEARCHED_FROM = 12
"""A table of so many rows has a field to search in it."""


@dataclass(frozen=True)
class Number:
    """A cell that is sorted by a number."""

    text: str
    value: float


Cell = str | Number


def data_table(
    caption: str, headings: Sequence[str], rows: Sequence[Sequence[Cell]], marked: Sequence[int] = ()
) -> Markup:
    """A table that can be sorted and, if it is long, searched. On a narrow screen each row becomes a block.

    Args:
        caption: what the table shows, for people who do not see it.
        headings: of the columns.
        rows: texts, or numbers with their texts.
        marked: the rows that show something wrong.
    """
    numeric = [any(isinstance(row[place], Number) for row in rows) for place in range(len(headings))]
    heads = (
        element("th", heading, scope="col", role="columnheader", class_="number" if is_number else None)
        for heading, is_number in zip(headings, numeric, strict=True)
    )
    body = (
        element(
            "tr",
            *(
                _cell(cell, heading, place == 0, is_number)
                for place, (cell, heading, is_number) in enumerate(zip(row, headings, numeric, strict=True))
            ),
            role="row",
            class_="wrong" if number in marked else None,
        )
        for number, row in enumerate(rows)
    )
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads, role="row"), role="rowgroup"),
        element("tbody", *body, role="rowgroup"),
        role="table",
    )
    searched = len(rows) >= SEARCHED_FROM
    return element("div", _search(caption) if searched else "", table, class_="data")


def _search(caption: str) -> Markup:
    """The field to search in a table. The script shows it: without the script it could do nothing."""
    return element(
        "p",
        element(
            "label", "Search ", element("input", type="search", autocomplete="off", aria_label=f"Search: {caption}")
        ),
        element("output", "", aria_live="polite"),
        class_="search",
        hidden=True,
    )


def _cell(cell: Cell, heading: str, first: bool, numeric: bool) -> Markup:
    text, value = (cell.text, repr(cell.value)) if isinstance(cell, Number) else (cell, None)
    kind = "th" if first else "td"
    return element(
        kind,
        text,
        data_label=heading,
        data_value=value,
        class_="number" if numeric else None,
        scope="row" if first else None,
        role="rowheader" if first else "cell",
    )


def bullets(lines: Sequence[str]) -> Markup:
    """Lines as a list."""
    return element("ul", *(element("li", line) for line in lines), class_="lines")


@dataclass(frozen=True)
class Step:
    """Something to do next: what for, and the lines that do it."""

    purpose: str
    lines: Sequence[str]


def steps(entries: Sequence[Step]) -> Markup:
    """Steps to go on with, each with lines that can be copied."""
    return element(
        "ol",
        *(
            element(
                "li", element("p", entry.purpose), element("pre", element("code", _lines(entry.lines)), tabindex="0")
            )
            for entry in entries
        ),
        class_="steps",
    )


def _lines(lines: Sequence[str]) -> Markup:
    """Lines of code. The line breaks are ours; everything else is escaped."""
    return Markup("\n".join(element("span", line) for line in lines))
