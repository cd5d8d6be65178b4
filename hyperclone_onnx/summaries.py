"""Short forms of reports, for the Python prompt and for notebooks. The command prints more (see `reports`)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

MOST_ROWS = 40
"""The most rows of a table in a notebook."""


@dataclass(frozen=True)
class Summary:
    """What a report says in one line, and the table that a notebook shows below it."""

    line: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()


class Summarised:
    """The base of a report that has a short form. The report says it in `summary`."""

    def summary(self) -> Summary:
        """The short form of this report."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary().line}>"

    def _repr_html_(self) -> str:
        """The short form for a notebook. Names from a model are escaped."""
        summary = self.summary()
        title = f"<b>{type(self).__name__}</b>: {html.escape(summary.line)}"
        if not summary.rows:
            return f"<div>{title}</div>"
        rows = [_row("td", row) for row in summary.rows[:MOST_ROWS]]
        left = len(summary.rows) - MOST_ROWS
        more = f"<div>and {left} more rows</div>" if left > 0 else ""
        return f"<div>{title}<table>{_row('th', summary.headings)}{''.join(rows)}</table>{more}</div>"


def _row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
