"""The tables of all reports, and lines that may hold a model's names."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from hyperclone_onnx.errors import printable


class Table(RichTable):
    """A table whose cells may hold a model's names: what is unprintable in them is written out."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of texts."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def plain_table(*headings: str) -> Table:
    """A table without lines around its cells."""
    return Table(*headings, box=None, pad_edge=False, header_style="bold")


def print_line(console: Console, text: str) -> None:
    """Print one line as it is, however long: no brackets are taken for markup, and nothing is broken."""
    console.print(text, markup=False, soft_wrap=True)


def counted(name: str, count: int) -> str:
    """A name and how many have it.

    >>> counted("ffn", 1), counted("ffn", 4)
    ('ffn', 'ffn x4')
    """
    return name if count == 1 else f"{name} x{count}"
