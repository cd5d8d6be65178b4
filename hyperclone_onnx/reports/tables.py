"""Tables and lines that all reports use. Both may contain names from a model."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from hyperclone_onnx.errors import printable


class Table(RichTable):
    """A table whose cells may contain names from a model. Unprintable characters in them are escaped."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row. Cells that are texts are escaped; `options` are those of rich."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def plain_table(*headings: str) -> Table:
    """A table without lines around its cells."""
    return Table(*headings, box=None, pad_edge=False, header_style="bold")


def print_line(console: Console, text: str) -> None:
    """Print a text: brackets are not read as markup. A terminal wraps a long line at words; a file gets it whole."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def counted(name: str, count: int) -> str:
    """A name, with its count where there are several.

    >>> counted("ffn", 1), counted("ffn", 4)
    ('ffn', 'ffn x4')
    """
    return name if count == 1 else f"{name} x{count}"
