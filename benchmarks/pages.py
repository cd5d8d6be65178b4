"""Puts measured tables into the pages of docs/. A pair of markers with a name encloses each table."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def put(page: str, name: str, text: str) -> None:
    """Put text between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a page, or at its end.

    Args:
        page: the name of a file in docs/.
        name: the name in the markers.
        text: the new text.
    """
    path = DOCS / page
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, rest = rest.partition(end)
    block = f"{begin}\n{text.strip()}\n{end}"
    path.write_text(f"{head.rstrip()}\n\n{block}\n\n{rest.strip()}".rstrip() + "\n", encoding="utf-8")
