"""Solves requested sizes: which dimensions grow, and to which sizes, so that a model has the sizes that people name.

A quantity may be several dimensions (`analysis.quantities`). So a size is an equation in their sizes, and this module
chooses the solution: the fewest dimensions change, and none of them shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.quantities import SIZE_ROLES, Heads, Quantity, Width, attentions, quantities
from hyperclone_onnx.analysis.roles import NamedDim
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.rules.dimensions import Dimensions

HEAD_ROLES = ("heads", "kv_heads", "group")
"""The roles that are solved together: query heads are key/value heads times the group."""


@dataclass(frozen=True)
class Target:
    """The size that a dimension is to have, and the part of the request that says so."""

    size: int
    because: str


@dataclass
class _Solution:
    """The sizes that were found so far."""

    named: Mapping[Dim, NamedDim]
    kept: AbstractSet[Dim]
    """Dimensions that keep their size because another factor of the same width grows, wherever there is a choice."""
    targets: dict[Dim, Target] = field(default_factory=dict)
    shrinks: bool = False
    """Whether sizes become smaller, and none becomes larger; otherwise none becomes smaller."""

    def fits(self, old: int, new: int) -> bool:
        """Whether a size changes in the right direction, or stays."""
        return 0 < new <= old if self.shrinks else new >= old

    def check(self, request: str, old: int, new: int) -> None:
        """Check that a requested size changes in the right direction, or stays.

        Raises:
            BadRequest: it does not.
        """
        if self.fits(old, new):
            return
        if self.shrinks:
            raise BadRequest(f"{request} is above the source's {old}: shrink makes sizes smaller, use expand to grow")
        raise BadRequest(f"{request} is below the source's {old}: sizes only grow, use shrink to make a model smaller")

    def put(self, dim: Dim, size: int, because: str) -> None:
        """Give a dimension a size.

        Raises:
            BadRequest: another part of the request gives it another size.
        """
        known = self.targets.get(dim)
        if known is not None and known.size != size:
            raise BadRequest(
                f"{known.because} and {because} contradict each other: {self.named[dim].called} would be {known.size} "
                f"and {size}"
            )
        self.targets.setdefault(dim, Target(size, because))


def solve_sizes(
    dimensions: Dimensions,
    named: Sequence[NamedDim],
    sizes: Mapping[str, int],
    factors: Mapping[str, int],
    kept: AbstractSet[Dim],
    shrinks: bool = False,
) -> dict[Dim, Target]:
    """The size of every dimension that the requested sizes change or keep.

    Args:
        dimensions: the dimensions of the model.
        named: the same, with roles and names.
        sizes: the size wanted, by role, by the name of a quantity ("heads.1") or by that of a dimension ("ffn.3").
        factors: the factors that are requested beside them, by role or dimension.
        kept: the dimensions that keep their size where another factor of the same width can grow.
        shrinks: whether the sizes become smaller and not larger.

    Raises:
        BadRequest: a size is below the source's (with `shrinks`: above it), fits no choice of dimensions, contradicts
            another one; or a role has several sizes in the model, so that the request does not say which of them is
            meant.
    """
    solution = _Solution({dimension.dim: dimension for dimension in named}, kept, shrinks=shrinks)
    known = quantities(dimensions, named)
    whole = {quantity.name for quantity in known if quantity.role == "heads"}
    for name, size in sizes.items():
        if name not in SIZE_ROLES and name not in whole:
            for dimension in named:
                if name in (dimension.called, dimension.name, dimension.role):
                    solution.check(f"{name}={size}", dimension.size, size)
                    solution.put(dimension.dim, size, f"{name}={size}")
    for heads in attentions(dimensions, named):
        _solve_heads(solution, heads, known, sizes, factors)
    for role, size in sizes.items():
        if role in SIZE_ROLES and role not in HEAD_ROLES:
            for quantity in _of_one_size(solution, known, role):
                solution.check(f"{role}={size}", quantity.size, size)
                _solve(solution, quantity.segments, size, f"{role}={size}")
    return solution.targets


def known_names(dimensions: Dimensions, named: Sequence[NamedDim]) -> set[str]:
    """All names that a size may be requested for."""
    names = {name for dimension in named if dimension.role != "other" for name in (dimension.name, dimension.called)}
    return names | {quantity.role for quantity in quantities(dimensions, named)}


def _of_one_size(solution: _Solution, known: Iterable[Quantity], role: str) -> list[Quantity]:
    """The quantities of a role that no name in the request has decided yet; all of them have one size.

    Raises:
        BadRequest: they have several sizes.
    """
    wanted = [quantity for quantity in known if quantity.role == role]
    wanted = [quantity for quantity in wanted if not solution.targets.keys() >= set(quantity.dims)]
    by_size: dict[int, list[str]] = {}
    for quantity in wanted:
        by_size.setdefault(quantity.size, []).append(quantity.name)
    if len(by_size) > 1:
        listed = "; ".join(f"{size}: {_few(names)}" for size, names in by_size.items())
        raise BadRequest(
            f"{role} has several sizes in this model ({listed}): give the size of each dimension by its name, "
            "or keep one by giving it its own size"
        )
    return wanted


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- heads --------------------------------------------------------------------------------------------------


def _solve_heads(
    solution: _Solution,
    heads: Heads,
    known: Iterable[Quantity],
    sizes: Mapping[str, int],
    factors: Mapping[str, int],
) -> None:
    """Give the key/value heads and the group of one attention their sizes."""
    whole = (*heads.kv_heads, *heads.group)
    name = next(quantity.name for quantity in known if quantity.role == "heads" and quantity.segments == (whole,))
    asked = {role: sizes[role] for role in HEAD_ROLES if role in sizes}
    if name in sizes:
        asked["heads"] = sizes[name]
    if not asked:
        return
    because = ", ".join(f"{name if role == 'heads' and name in sizes else role}={n}" for role, n in asked.items())
    old_kv, old_group = _product(heads.kv_heads), _product(heads.group)
    if not heads.group and asked.keys() != {"heads"}:
        raise BadRequest(
            f"{because}: this model has {old_kv} query heads without groups (each has its own key/value head, or all "
            "share one): give the size of heads alone"
        )
    if "heads" in asked:
        solution.check(because, old_kv * old_group, asked["heads"])
        for role, factor_of, old in (("kv_heads", "heads", old_kv), ("group", "group", old_group)):
            if factor_of in factors:
                asked.setdefault(role, old * factors[factor_of])
    new_kv, new_group = heads_and_group(asked, old_kv, old_group)
    for role, old, new in (("kv_heads", old_kv, new_kv), ("group", old_group, new_group)):
        if not solution.fits(old, new):
            side, way = ("above", "shrink") if solution.shrinks else ("below", "grow")
            raise BadRequest(f"{because}: {role} would be {new}, {side} the source's {old}, and sizes only {way}")
    if "heads" in asked or "kv_heads" in asked:
        _solve(solution, (heads.kv_heads,), new_kv, because)
    if heads.group and ("heads" in asked or "group" in asked):
        _solve(solution, (heads.group,), new_group, because)


def heads_and_group(asked: Mapping[str, int], old_kv: int, old_group: int) -> tuple[int, int]:
    """The new numbers of key/value heads and of queries for each of them.

    Query heads alone leave a choice. The group is kept if that is possible, else the key/value heads are.

    Raises:
        BadRequest: the numbers do not fit each other.
    """
    queries, kv_heads, group = (asked.get(role) for role in HEAD_ROLES)
    if queries is None:
        return kv_heads or old_kv, group or old_group
    if kv_heads is not None and group is not None:
        if kv_heads * group != queries:
            raise BadRequest(
                f"heads={queries} is not kv_heads={kv_heads} times group={group}, which is {kv_heads * group}: "
                "leave one of the three out"
            )
        return kv_heads, group
    for word, given in (("kv_heads", kv_heads), ("group", group)):
        if given is not None:
            if queries % given:
                near = _listed(_near(given, queries, given))
                raise BadRequest(f"heads={queries} is not a multiple of {word}={given}: {near} would fit")
            return (given, queries // given) if word == "kv_heads" else (queries // given, given)
    if queries % old_group == 0:
        return queries // old_group, old_group
    if queries % old_kv == 0:
        return old_kv, queries // old_kv
    fits = sorted({near for step in (old_group, old_kv) for near in _near(step, queries, old_kv * old_group)})
    raise BadRequest(
        f"heads={queries} is a multiple neither of the {old_group} queries for each key/value head nor of the "
        f"{old_kv} key/value heads: {_listed(fits)} would fit, or give kv_heads too"
    )


# -- one quantity ---------------------------------------------------------------------------------------------


def _solve(solution: _Solution, segments: tuple[Width, ...], size: int, because: str) -> None:
    """Give the dimensions of a quantity sizes that make up its size.

    Raises:
        BadRequest: no choice of one dimension does, nor do all of them in proportion.
    """
    dims = tuple(dict.fromkeys(dim for segment in segments for dim in segment))
    current = Quantity("", "", segments)
    decided = {dim: solution.targets[dim].size for dim in dims if dim in solution.targets}
    free = [dim for dim in dims if dim not in decided]
    if current.size_with(decided) == size:
        for dim in free:
            solution.put(dim, solution.named[dim].size, because)
        return
    if len(segments) > 1 and not decided:
        scaled = {dim: solution.named[dim].size * size for dim in dims}
        if all(product % current.size == 0 for product in scaled.values()):
            for dim, product in scaled.items():
                solution.put(dim, product // current.size, because)
            return
    largest_first = -1 if len(segments) > 1 else 0
    free.sort(key=lambda dim: (not dim.growable, dim in solution.kept, largest_first * solution.named[dim].size))
    for dim in free:
        new = _size_of(current, dim, decided, size)
        if new is not None and solution.fits(solution.named[dim].size, new):
            solution.put(dim, new, because)
            for other in free:
                if other is not dim:
                    solution.put(other, solution.named[other].size, because)
            return
    if not free:
        causes = ", ".join(dict.fromkeys(solution.targets[dim].because for dim in dims))
        raise BadRequest(
            f"{because} and {causes} contradict each other: {causes} makes it {current.size_with(decided)}"
        )
    steps = sorted({_step(current, dim, decided) for dim in free})
    base = current.size_with(decided)
    least = 1 if solution.shrinks else base
    fits = sorted({near for step in steps for near in _near(step, size, base, least)})
    written = _written(solution, segments)
    raise BadRequest(f"{because} does not fit {written}, which is {current.size} now: {_listed(fits)} would fit")


def _step(quantity: Quantity, dim: Dim, decided: Mapping[Dim, int]) -> int:
    """By how much a quantity grows if one of its dimensions grows by one."""
    old = decided.get(dim, dim.size.static_or(0))
    return quantity.size_with({**decided, dim: old + 1}) - quantity.size_with({**decided, dim: old})


def _size_of(quantity: Quantity, dim: Dim, decided: Mapping[Dim, int], size: int) -> int | None:
    """The size of one dimension with which a quantity has a size; None where there is none."""
    old = dim.size.static_or(0)
    more, rest = divmod(size - quantity.size_with(decided), _step(quantity, dim, decided))
    return None if rest else old + more


def _near(step: int, size: int, base: int, least: int | None = None) -> list[int]:
    """The sizes next to the one that was asked for, which lie whole steps from a base, and not below the least one."""
    below = base + (size - base) // step * step
    return [near for near in (below, below + step) if near >= (base if least is None else least)]


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _product(width: Width) -> int:
    return math.prod(dim.size.static_or(0) for dim in width)


def _written(solution: _Solution, segments: tuple[Width, ...]) -> str:
    """A quantity as `inspect` writes axes."""
    return " + ".join(" ".join(solution.named[dim].called for dim in segment) for segment in segments)
