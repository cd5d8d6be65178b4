"""Match the tensors of a checkpoint with initializers by name, whatever prefix the trainer put before the names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hyperclone_onnx.errors import BadRequest

INFIXES = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
"""Parts that wrappers of a module insert into the names of its parameters."""


MOMENTS = frozenset(["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu", "nu"])
"""Parts of names that mark an optimizer's own arrays. The names of weights follow these parts."""


def bare(name: str) -> str:
    """Remove from a name the parts that wrappers of modules inserted.

    >>> bare("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name


def match(names: Iterable[str], known: Mapping[str, str], what: str) -> dict[str, str]:
    """Find the initializer that each name of a checkpoint means.

    A checkpoint often stores a model under a prefix (``model.``, ``module.``, ``state.params.``), beside other arrays.
    We choose the prefix under which most names are known. Names without that prefix are ignored.

    Args:
        names: the names in the checkpoint.
        known: the initializers, by every name that they may have.
        what: what the names come from, such as the checkpoint's path; messages begin with it.

    Returns:
        The initializers, by the names in the checkpoint that have the chosen prefix.

    Raises:
        BadRequest: no name is known, a name with the chosen prefix is unknown, two names mean the same initializer, or
            several prefixes have equally many known names and none of them is empty.
    """
    saved_names = list(names)
    prefixes = Counter(prefix for name in saved_names for prefix in _levels(bare(name), known))
    if not prefixes:
        raise BadRequest(f"{what} holds no tensor of this model: {_unlike(saved_names, known)}")
    most = max(prefixes.values())
    best = sorted((prefix for prefix, count in prefixes.items() if count == most), key=len)
    if len(best) > 1 and best[0]:
        listed = " and ".join(repr(prefix.rstrip(".")) for prefix in best[:2])
        raise BadRequest(f"{what} holds the tensors of this model twice, under {listed}: save one of them by itself")
    prefix = best[0]
    initializers: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in saved_names:
        short = bare(name)
        if not short.startswith(prefix):
            continue
        initializer = known.get(short.removeprefix(prefix))
        if initializer is None:
            raise BadRequest(
                f"{what} holds {name!r}, which is no floating tensor of this model{_hint(short, prefix, known)}"
            )
        if initializer in first:
            raise BadRequest(f"{what} holds {initializer!r} twice: as {first[initializer]!r} and {name!r}")
        initializers[name] = initializer
        first[initializer] = name
    return initializers


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
    contrast = f", where this one has {near[0]!r}" if near else ""
    return f"{len(given)} tensors, such as {given[0]!r}{contrast}"
