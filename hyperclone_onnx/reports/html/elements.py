"""Makes HTML elements. Texts are escaped here, so that no report can forget it."""

from __future__ import annotations

import html
from collections.abc import Iterable

from hyperclone_onnx.errors import printable


class Markup(str):
    """A text that is HTML already. Every other text is escaped."""

    __slots__ = ()


_ALONE = frozenset({"input", "br"})
"""Elements without an end tag."""


def joined(parts: Iterable[str]) -> Markup:
    """The parts one after the other. Texts are escaped.

    >>> joined(["a < b", element("b", "c")])
    'a &lt; b<b>c</b>'
    """
    return Markup("".join(part if isinstance(part, Markup) else html.escape(printable(part)) for part in parts))


def element(name: str, *children: str, **attributes: str | int | float | bool | None) -> Markup:
    """An element with its children.

    Args:
        name: its name.
        children: texts, which are escaped, and elements.
        attributes: ``class_`` is the attribute ``class``; other underscores become hyphens. An attribute that is None
            or False is left out; True gives an attribute without a value.

    >>> element("td", "<script>", class_="name", data_value='"')
    '<td class="name" data-value="&quot;">&lt;script&gt;</td>'
    """
    texts = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{html.escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{texts}>" if name in _ALONE else f"<{name}{texts}>{joined(children)}</{name}>")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
