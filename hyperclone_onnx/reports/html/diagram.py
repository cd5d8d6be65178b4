"""The picture of the layers: every size as a bar, with its part from the source and its clones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hyperclone_onnx.reports.html.elements import Markup, element, joined
from hyperclone_onnx.reports.html.wording import TIMES
from hyperclone_onnx.reports.roles import ROLES, in_words

_GROUPS = (
    ("Attention", ("heads", "kv_heads", "group", "head_dim")),
    ("Feed-forward", ("ffn",)),
)
_TABLES = ("vocab", "positions")
_STREAM = "hidden"

MOST_PARTS = 8
"""A bar shows at most so many clones one by one."""

MOST_LAYERS = 400
"""At most so many layers are drawn one by one."""


@dataclass(frozen=True)
class Bar:
    """A size of the model, or several that agree in everything."""

    role: str
    label: str
    """Its name in the model, or the role with the number of sizes."""
    before: int
    after: int
    why: str = ""
    """Why the size stays; empty where it grew, or where it can grow."""


@dataclass(frozen=True)
class Layers:
    """A stack of layers, and the places of the new ones in it."""

    name: str
    before: int
    after: int
    new: frozenset[int] = frozenset()


def diagram(bars: Sequence[Bar], stacks: Sequence[Layers], *, grown: bool) -> Markup:
    """The picture: tables, the stream beside everything, and what is inside the layers.

    Args:
        bars: all sizes.
        stacks: all stacks of layers that are known.
        grown: whether the picture shows a growth, and not one model.
    """
    longest = max((bar.after for bar in bars if bar.role not in _TABLES), default=1)
    streams = [bar for bar in bars if bar.role == _STREAM]
    tables = [bar for bar in bars if bar.role in _TABLES]
    inside = [(name, [bar for bar in bars if bar.role in roles]) for name, roles in _GROUPS]
    told = {_STREAM, *_TABLES, *(role for _, roles in _GROUPS for role in roles)}
    inside.append(("Other widths", [bar for bar in bars if bar.role not in told]))
    groups = [_group(name, sorted(members, key=_order), longest) for name, members in inside if members]
    blocks = [
        _block("Tables, looked up by number", [_group("", tables, longest)]) if tables else "",
        _block("The stream, from the first layer to the last", [_group("", streams, longest)]) if streams else "",
        _block(_layers_text(stacks), [*map(_layer_strip, stacks), *groups]) if groups or stacks else "",
    ]
    return joined(
        [_key(grown), element("div", _rail(streams), element("div", *blocks, class_="blocks"), class_="flow")]
    )


def _order(bar: Bar) -> int:
    return list(ROLES).index(bar.role) if bar.role in ROLES else len(ROLES)


def _key(grown: bool) -> Markup:
    entries = (
        [("source", "from the source"), ("clone", "cloned"), ("kept", "keeps its size")]
        if grown
        else [("source", "can grow"), ("kept", "keeps its size")]
    )
    return element(
        "ul",
        *(element("li", element("i", class_=kind), text) for kind, text in entries),
        class_="key",
        aria_label="Key",
    )


def _block(text: str, groups: Sequence[Markup]) -> Markup:
    return element("div", element("p", text), *groups, class_="block")


def _layers_text(stacks: Sequence[Layers]) -> str:
    if not stacks:
        return "Inside the layers"
    texts = []
    for stack in stacks:
        count = f"{stack.before} → {stack.after}" if stack.after != stack.before else str(stack.after)
        name = f"{stack.name}: " if len(stacks) > 1 or stack.name != "layers" else ""
        plural = "layer" if stack.before == stack.after == 1 else "layers"
        texts.append(f"{name}{count} {plural}" + (f", {len(stack.new)} of them new" if stack.new else ""))
    return f"Inside the layers ({'; '.join(texts)})"


def _layer_strip(stack: Layers) -> Markup:
    """A small square for each layer; new ones are hatched."""
    if stack.after > MOST_LAYERS:
        return Markup("")
    squares = (element("i", class_="clone" if place in stack.new else "source") for place in range(stack.after))
    return element("div", *squares, class_="layers", aria_hidden="true")


def _group(name: str, bars: Sequence[Bar], longest: int) -> Markup:
    heading = element("h3", name) if name else ""
    return element("div", heading, *(_size(bar, longest) for bar in bars), class_="group")


def _size(bar: Bar, longest: int) -> Markup:
    """The name of a size, its bar, and its numbers."""
    word = in_words(bar.role)
    small = element("small", bar.label) if bar.label != word else ""
    if bar.after != bar.before:
        numbers = f"{bar.before:,} → {bar.after:,} ({TIMES}{bar.after / bar.before:.3g})"
    else:
        numbers = f"{bar.after:,}"
    why = element("small", f"kept: {bar.why}") if bar.why else ""
    return element(
        "div",
        element("span", word, small, class_="name", title=ROLES[bar.role][1] if bar.role in ROLES else None),
        element("span", *_parts(bar), class_="bar", aria_hidden="true", style=f"width:{_share(bar, longest):.1f}%"),
        element("span", numbers, why, class_="figures"),
        class_="size",
    )


def _share(bar: Bar, longest: int) -> float:
    """The length of a bar in percent. A root makes small sizes visible beside large ones."""
    return min(100.0, max(3.0, 100.0 * math.sqrt(bar.after / max(longest, 1))))


def _parts(bar: Bar) -> list[Markup]:
    """The source's part of a bar, then its clones: one part for each time that all of the source fits."""
    if bar.after == bar.before:
        return [element("i", class_="kept" if bar.why else "source", style="flex:1")]
    rest = bar.after - bar.before
    times, left = divmod(rest, max(bar.before, 1))
    sizes = [rest] if times > MOST_PARTS else [*[bar.before] * times, *([left] if left else [])]
    return [
        element("i", class_="source", style=f"flex:{bar.before}"),
        *(element("i", class_="clone", style=f"flex:{size}") for size in sizes),
    ]


def _rail(streams: Sequence[Bar]) -> Markup:
    """The stream beside the blocks, as wide as its parts."""
    if not streams:
        return element("div", class_="rail", aria_hidden="true")
    widest = max(streams, key=lambda bar: bar.after)
    return element("div", *_parts(widest), class_="rail", aria_hidden="true")
