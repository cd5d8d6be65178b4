"""Grows the sizes in a Hugging Face configuration that lies beside ONNX files.

A field changes if its name is that of a size (`target.FIELDS`) and its number is the model's own. Sizes that no field
says must follow from those that a field says. Otherwise the configuration would describe another model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hyperclone_onnx.planning.target import FIELDS

FOLLOWS = ("group",)
"""Roles that no field says: the queries for each key/value head follow from the two numbers of heads."""

Size = tuple[str, int, int]
"""A role, and its size before and after growth."""


@dataclass(frozen=True)
class GrownConfiguration:
    """The fields of a grown configuration, and the numbers that changed, by the keys joined by dots."""

    fields: dict[str, Any]
    changed: dict[str, tuple[int, int]]


class NotSaid(Exception):
    """The configuration cannot say the sizes of the grown model. The text is the reason."""


def grown_configuration(fields: Mapping[str, Any], sizes: Iterable[Size]) -> GrownConfiguration:
    """The configuration of a grown model.

    Args:
        fields: the fields of the source's configuration.
        sizes: every size of the models that it describes.

    Raises:
        NotSaid: a size of the grown model is in none of its fields, or one field would need two numbers.
    """
    after = _after(sizes)
    result = GrownConfiguration(copy.deepcopy(dict(fields)), {})
    said: set[tuple[str, int]] = set()
    for place, key, path in _numbers(result.fields):
        role = next((role for role, names in FIELDS.items() if key in names), None)
        if role == "kv_heads" and not any(of == "kv_heads" for of, _ in after):
            role = "heads"  # as many as query heads, so that the graph has one number for both
        before = place[key]
        if role is None or (role, before) not in after:
            continue
        said.add((role, before))
        if after[role, before] != before:
            result.changed[path] = before, after[role, before]
            place[key] = after[role, before]
    for role, before in after:
        if (role, before) not in said and role not in FOLLOWS:
            _check_follows(role, before, after, said)
    return result


def _after(sizes: Iterable[Size]) -> dict[tuple[str, int], int]:
    grown: dict[tuple[str, int], int] = {}
    for role, before, after in sizes:
        if grown.setdefault((role, before), after) != after:
            raise NotSaid(f"{role} {before} becomes {grown[role, before]} and {after}, and one field says both")
    return grown


def _numbers(fields: dict[str, Any], path: str = "") -> Iterator[tuple[dict[str, Any], str, str]]:
    """The whole numbers in nested fields: the dict that has it, its key, and all keys that lead to it."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}{key}.")
        elif type(value) is int:
            yield fields, key, f"{path}{key}"


def _check_follows(role: str, before: int, after: Mapping[tuple[str, int], int], said: set[tuple[str, int]]) -> None:
    """Check that a size which no field says follows from the fields: the size of a head, or a multiple of the width.

    Raises:
        NotSaid: it does not.
    """
    new = after[role, before]
    of: dict[str, list[tuple[int, int]]] = {name: [] for name in FIELDS}
    for kind, old in said:
        of[kind].append((old, after[kind, old]))
    if role == "head_dim":
        pairs = [(hidden, heads) for hidden in of["hidden"] for heads in of["heads"] if hidden[0] == heads[0] * before]
        follows = bool(pairs) and all(hidden[1] == heads[1] * new for hidden, heads in pairs)
    elif role == "ffn":
        follows = new == before or [Fraction(*pair) for pair in of["hidden"]] == [Fraction(before, new)]
    else:
        follows = new == before
    if follows:
        return
    grows = f"{role} {before} becomes {new}" if new != before else f"{role} stays {before}"
    raise NotSaid(f"{grows}, and no field of it says so")
