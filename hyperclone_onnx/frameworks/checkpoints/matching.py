"""Which initializer each tensor of a checkpoint is: by its name, under whatever the trainer put before it."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hyperclone_onnx.errors import BadRequest

INFIXES = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
"""What wrappers of a module put among the parts of its parameters' names."""


MOMENTS = frozenset(["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu", "nu"])
"""Levels at which an optimizer keeps arrays of its own by the names of the weights."""


def bare(name: str) -> str:
    """A name without what wrappers of modules put into it.

    >>> bare("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name


def match(names: Iterable[str], known: Mapping[str, str], what: str) -> dict[str, str]:
    """The initializer of each name.

    A checkpoint often holds a model under a level of its own (``model.``, ``module.``, ``state.params.``) beside other
    things: the one level under which most names are known is taken, and what lies beside it is left out.

    Args:
        names: those of the checkpoint.
        known: an initializer by each of the names that it may have.
        what: what the names are of, for messages.

    Returns:
        Initializers by the names as they were given.

    Raises:
        BadRequest: no name is known, one under the level taken is not, two mean one initializer, or two levels hold
            equally many.
    """
    given = list(names)
    levels = Counter(level for name in given for level in _levels(bare(name), known))
    if not levels:
        raise BadRequest(f"{what} holds no tensor of this model: {_unlike(given, known)}")
    most = max(levels.values())
    best = sorted((level for level, count in levels.items() if count == most), key=len)
    if len(best) > 1 and best[0]:
        listed = " and ".join(repr(level.rstrip(".")) for level in best[:2])
        raise BadRequest(f"{what} holds the tensors of this model twice, under {listed}: save one of them by itself")
    level = best[0]
    found: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in given:
        short = bare(name)
        if not short.startswith(level):
            continue
        initializer = known.get(short.removeprefix(level))
        if initializer is None:
            raise BadRequest(
                f"{what} holds {name!r}, which is no floating tensor of this model{_hint(short, level, known)}"
            )
        if initializer in first:
            raise BadRequest(f"{what} holds {initializer!r} twice: as {first[initializer]!r} and {name!r}")
        found[name] = initializer
        first[initializer] = name
    return found


def _levels(name: str, known: Mapping[str, str]) -> list[str]:
    parts = name.split(".")
    starts = range(len(parts))
    return [
        ".".join(parts[:i]) + "." * bool(i)
        for i in starts
        if ".".join(parts[i:]) in known and not MOMENTS.intersection(parts[:i])
    ]


def _hint(name: str, level: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name.removeprefix(level), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unlike(given: Sequence[str], known: Mapping[str, str]) -> str:
    if not given:
        return "it is empty"
    near = difflib.get_close_matches(bare(given[0]), list(known), n=1) or list(known)[:1]
    wanted = f", where this one has {near[0]!r}" if near else ""
    return f"{len(given)} tensors, such as {given[0]!r}{wanted}"
