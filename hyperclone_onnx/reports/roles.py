"""The roles of dimensions in plain words, for terminals and pages."""

from __future__ import annotations

ROLES = {
    "hidden": ("residual stream", "the width of what flows from layer to layer"),
    "ffn": ("feed-forward width", "the units inside a feed-forward layer"),
    "heads": ("query heads", "the heads of an attention, as people count them"),
    "kv_heads": ("key/value heads", "heads with keys and values of their own; each serves a group of query heads"),
    "group": ("query heads of a group", "the query heads of one key/value head"),
    "head_dim": ("size of a head", "the numbers in a head's query, key or value, or in one part of them"),
    "width": ("other width", "a width between two weights that is none of the others"),
    "vocab": ("vocabulary", "rows of a table that token numbers look up"),
    "positions": ("positions", "rows of a table that positions look up, or places that a softmax runs over"),
}
"""For each role its name in plain words, and what it is."""


def in_words(role: str) -> str:
    """The name of a role in plain words.

    >>> in_words("kv_heads"), in_words("else")
    ('key/value heads', 'else')
    """
    return ROLES[role][0] if role in ROLES else role
