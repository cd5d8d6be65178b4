"""Measured tables in the pages of docs/, each between markers of its own."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def put(page: str, name: str, text: str) -> None:
    """Put text between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a page, or behind all else.

    Args:
        page: a file of docs/.
        name: of the markers.
        text: what is to stand there.
    """
    path = DOCS / page
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, rest = rest.partition(end)
    block = f"{begin}\n{text.strip()}\n{end}"
    path.write_text(f"{head.rstrip()}\n\n{block}\n\n{rest.strip()}".rstrip() + "\n", encoding="utf-8")
