"""The one registry of rules, keyed by (domain, operator).

A rule is a function that relates the axes of an operator's inputs and outputs (`relates`). If the operator has sizes in
attributes or integer inputs, a second function edits them for the grown model (`edits`). Contractions and reductions
need no edit, since the plan divides their sums. An operator whose axes must all keep their size is `pinned` on purpose,
with the reason. An operator that is in none of these lists is a gap in the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from hyperclone_onnx.rules.grown_op import GrownOp
    from hyperclone_onnx.rules.op import Op

Relation = Callable[["Op"], None]
Edit = Callable[["GrownOp"], None]

_relations: dict[tuple[str, str], Relation] = {}
_edits: dict[tuple[str, str], Edit] = {}
_pinned: dict[tuple[str, str], str] = {}


def relates(*op_types: str, domain: str = "") -> Callable[[Relation], Relation]:
    """Register the relation of one or more operators. To register an operator twice is an error."""

    def register(function: Relation) -> Relation:
        for op_type in op_types:
            if (domain, op_type) in _relations or (domain, op_type) in _pinned:
                raise ValueError(f"{op_type} has a rule already")
            _relations[domain, op_type] = function
        return function

    return register


def edits(*op_types: str, domain: str = "") -> Callable[[Edit], Edit]:
    """Register the function that edits one or more operators when their axes grow."""

    def register(function: Edit) -> Edit:
        for op_type in op_types:
            if (domain, op_type) in _edits:
                raise ValueError(f"{op_type} has an edit already")
            _edits[domain, op_type] = function
        return function

    return register


def pinned(reason: str, *op_types: str, domain: str = "") -> None:
    """Register operators all of whose axes keep their size, with the reason."""
    for op_type in op_types:
        if (domain, op_type) in _relations or (domain, op_type) in _pinned:
            raise ValueError(f"{op_type} has a rule already")
        _pinned[domain, op_type] = reason


def relation(domain: str, op_type: str) -> Relation | None:
    """The relation of an operator, None when it has no rule."""
    return _relations.get((domain, op_type))


def edit(domain: str, op_type: str) -> Edit | None:
    """The edit of an operator, None when it needs none."""
    return _edits.get((domain, op_type))


def pin_reason(domain: str, op_type: str) -> str | None:
    """Why an operator is pinned on purpose, None when it is not."""
    return _pinned.get((domain, op_type))


def pinned_operators() -> dict[tuple[str, str], str]:
    """Every (domain, operator) that is pinned on purpose, with the reason."""
    return dict(sorted(_pinned.items()))


def ruled() -> list[tuple[str, str]]:
    """Every (domain, operator) that has a rule."""
    return sorted(_relations)


def name(node: ir.Node) -> str:
    """An operator's name with its domain: ``com.microsoft.Attention``."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
