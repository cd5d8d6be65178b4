"""The algebra of dimensions: what an axis is made of, and how two descriptions of one axis are unified.

Every axis of every value is a `Term`: an atomic `Dim`, a `Product` of factors (outermost first, as numpy's
row-major order composes them) or a `Concat` of segments side by side. Nothing here knows ONNX.

Relating two axes is unification with refinement. A `Dim` is a union-find cell: it is bound once, to another
term of its size. Where two descriptions do not line up, every atom in them is *pinned*: it keeps its size, and
the reason and the place are kept with it. A pinned dimension is always safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hyperclone_onnx.algebra.sizes import Size


@dataclass(frozen=True)
class Pin:
    """Why a dimension keeps its size: the reason, the place (a node) and the dimension it began at.

    `gap` tells what could not be described from what an operator or the interface fixes by its nature.
    """

    reason: str
    place: str
    origin: int
    gap: bool = False

    def __str__(self) -> str:
        return f"{self.reason} (at {self.place})" if self.place else self.reason


@dataclass(eq=False)
class Dim:
    """One atomic dimension of `size`; bound when it turned out to be another term."""

    uid: int
    size: Size
    binding: Term | None = field(default=None, repr=False)
    pin: Pin | None = field(default=None, repr=False)

    @property
    def growable(self) -> bool:
        """Whether nothing forbids this dimension to grow: its size is static and it is not pinned."""
        return self.pin is None and self.size.static is not None

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Product:
    """A composite axis, outermost factor first: ``(heads head_dim)``. The empty product is an axis of size 1."""

    factors: tuple[Term, ...]

    def __str__(self) -> str:
        return "(" + " ".join(map(str, self.factors)) + ")" if self.factors else "1"


@dataclass(frozen=True)
class Concat:
    """Segments side by side along one axis: ``(q + k + v)``."""

    segments: tuple[Term, ...]

    def __str__(self) -> str:
        return "(" + " + ".join(map(str, self.segments)) + ")"


Term = Dim | Product | Concat
ONE = Product(())


def product(*factors: Term) -> Term:
    """The product of `factors`, which is the factor itself when there is only one."""
    return factors[0] if len(factors) == 1 else Product(factors)


class Space:
    """The dimensions of one graph: makes them, unifies them, pins them, and remembers why.

    `place` is the node under consideration; it labels every edge and every pin made meanwhile.
    """

    def __init__(self) -> None:
        self.place = ""
        self.dims: list[Dim] = []
        self.symbols: dict[str, Size] = {}
        self._edges: dict[int, list[tuple[int, str]]] = {}
        self._links = 0
        self._last: tuple[int, int, dict[int, tuple[int, str]]] = (-1, -1, {})
        self._firsts: tuple[int, dict[int, int]] = (-1, {})

    # -- making and reading terms -------------------------------------------------------------------------

    def dim(self, size: int | Size) -> Term:
        """A new dimension of `size`; an axis of size 1 is the empty product, which cannot grow."""
        length = Size.of(size)
        if length.static == 1:
            return ONE
        if length.static_or(0) < 0:
            raise ValueError(f"an axis of size {length}")
        made = Dim(len(self.dims), length)
        self.dims.append(made)
        return made

    def unknown(self) -> Term:
        """A new dimension whose size is a symbol of its own."""
        return self.dim(Size.symbol(f"?{len(self.dims)}"))

    def resolve(self, term: Term) -> Term:
        """`term` in normal form: bindings followed, nested products and concatenations flattened."""
        if isinstance(term, Dim):
            return self._resolve_bound(term)
        if isinstance(term, Product):
            factors: list[Term] = []
            for part in map(self.resolve, term.factors):
                factors.extend(part.factors if isinstance(part, Product) else (part,))
            return product(*factors)
        segments: list[Term] = []
        for part in map(self.resolve, term.segments):
            segments.extend(part.segments if isinstance(part, Concat) else (part,))
        return segments[0] if len(segments) == 1 else Concat(tuple(segments))

    def _resolve_bound(self, dim: Dim) -> Term:
        """Follow the bindings of a dimension and shorten them; not by recursion, for each layer adds one."""
        passed: list[Dim] = []
        end: Term = dim
        while isinstance(end, Dim) and end.binding is not None:
            passed.append(end)
            end = end.binding
        resolved = end if isinstance(end, Dim) else self.resolve(end)
        for each in passed:
            each.binding = resolved
        return resolved

    def factors(self, term: Term) -> tuple[Term, ...]:
        """The factors of the resolved term, outermost first; none for an axis of size 1."""
        resolved = self.resolve(term)
        return resolved.factors if isinstance(resolved, Product) else (resolved,)

    def atoms(self, term: Term) -> Iterator[Dim]:
        """Every unbound dimension inside `term`, with repetition, in order."""
        resolved = self.resolve(term)
        if isinstance(resolved, Dim):
            yield resolved
        else:
            for part in resolved.factors if isinstance(resolved, Product) else resolved.segments:
                yield from self.atoms(part)

    def size(self, term: Term) -> Size:
        """The length of the axis."""
        while isinstance(term, Dim) and term.binding is not None:
            term = term.binding
        if isinstance(term, Dim):
            return term.size.substituted(self.symbols)
        if isinstance(term, Product):
            total = Size.of(1)
            for factor in term.factors:
                total = total * self.size(factor)
            return total
        total = Size.of(0)
        for segment in term.segments:
            total = total + self.size(segment)
        return total

    def static(self, term: Term) -> int | None:
        """The length of the axis as an integer, or None when it is symbolic."""
        return self.size(term).static

    # -- pinning and explaining ---------------------------------------------------------------------------

    def pin(self, term: Term, reason: str, gap: bool = False) -> None:
        """Forbid every atom of `term` to grow. The first reason given stays."""
        for atom in self.atoms(term):
            if atom.pin is None:
                atom.pin = Pin(reason, self.place, atom.uid, gap)

    def _link(self, one: Dim, others: Iterable[Dim]) -> None:
        for other in others:
            self._links += 1
            self._edges.setdefault(one.uid, []).append((other.uid, self.place))
            self._edges.setdefault(other.uid, []).append((one.uid, self.place))

    def chain(self, start: int, end: int) -> list[str]:
        """The places that lead from dimension `start` to dimension `end`, shortest way, without repeats."""
        came = self._ways(start)
        if end not in came:
            return []
        places: list[str] = []
        while end != start:
            end, place = came[end]
            if place and (not places or places[-1] != place):
                places.append(place)
        return places[::-1]

    def first_related(self, uid: int) -> int:
        """The first of the dimensions that were ever related to `uid`."""
        if self._firsts[0] != self._links:
            self._firsts = (self._links, {})
        firsts = self._firsts[1]
        if uid not in firsts:
            related = self._ways(uid)
            firsts.update(dict.fromkeys(related, min(related)))
        return firsts[uid]

    def _ways(self, start: int) -> dict[int, tuple[int, str]]:
        """For each dimension related to `start`, the one before it on a shortest way there, and the place.

        The last answer is kept: what is pinned by one node asks from the same start, a thousand times in a large graph.
        """
        if self._last[:2] != (start, self._links):
            came: dict[int, tuple[int, str]] = {start: (start, "")}
            queue = deque([start])
            while queue:
                here = queue.popleft()
                for there, place in self._edges.get(here, ()):
                    if there not in came:
                        came[there] = (here, place)
                        queue.append(there)
            self._last = (start, self._links, came)
        return self._last[2]

    # -- unification --------------------------------------------------------------------------------------

    def unify(self, left: Term, right: Term) -> None:
        """Make two descriptions of the same axis one, refining or pinning as needed.

        The two must be known to be equal: where broadcasting may stretch one of them, that is not known.
        """
        a, b = self.resolve(left), self.resolve(right)
        if a == b:
            return
        size_a, size_b = self.size(a), self.size(b)
        if size_a != size_b and not self._equate(size_a, size_b):
            self._clash(a, b)
        elif isinstance(a, Dim):
            self._bind(a, b)
        elif isinstance(b, Dim):
            self._bind(b, a)
        elif isinstance(a, Product) and isinstance(b, Product):
            self.match(a.factors, b.factors)
        elif isinstance(a, Concat) and isinstance(b, Concat):
            self._align(a.segments, b.segments)
        elif isinstance(a, Concat):
            self._align(a.segments, (b,))
        else:
            assert isinstance(b, Concat)
            self._align((a,), b.segments)

    def _equate(self, a: Size, b: Size) -> bool:
        """Learn that two unequal-looking sizes are one; False when they cannot be."""
        if a.static is not None and b.static is not None:
            return False
        for name, other in ((a.lone_symbol, b), (b.lone_symbol, a)):
            if name is not None and name not in other.symbols:
                self.symbols[name] = other
                return True
        return a.static is None and b.static is None

    def _clash(self, a: Term, b: Term) -> None:
        text = f"axes that do not line up: {self.size(a)} and {self.size(b)}"
        self.pin(a, text, gap=True)
        self.pin(b, text, gap=True)

    def _bind(self, dim: Dim, term: Term) -> None:
        atoms = list(self.atoms(term))
        if dim in atoms:
            self.pin(term, "an axis that would contain itself", gap=True)
            return
        if isinstance(term, Dim) and term.pin is None:
            term.pin = dim.pin
        elif dim.pin is not None:
            for atom in atoms:
                atom.pin = atom.pin or dim.pin
        dim.binding = term
        self._link(dim, atoms)

    def _split(self, term: Term, outer: Size, inner: Size) -> tuple[Term, Term]:
        """Split an axis into (outer inner), both new."""
        parts = self.dim(outer), self.dim(inner)
        self.unify(term, Product(parts))
        return parts

    def match(self, left: Sequence[Term], right: Sequence[Term]) -> None:
        """Unify two factorisations of one index space, both outermost first.

        Equal sizes are matched from the left and then from the right; where one factor is a multiple of the
        other it splits (768 against 12 64). What is left and fits nowhere (4 9 against 6 6) is pinned.
        """
        a, b = deque(left), deque(right)
        while self._flatten_ends(a) and self._flatten_ends(b):
            if not (self._match_end(a, b, 0) or self._match_end(a, b, -1)):
                break
        self._match_rest(list(a), list(b))

    def _flatten_ends(self, side: deque[Term]) -> bool:
        for end in (0, -1):
            while side:
                factors = self.factors(side[end])
                if factors == (side[end],):
                    break
                del side[end]
                for factor in reversed(factors) if end == 0 else factors:
                    (side.appendleft if end == 0 else side.append)(factor)
        return bool(side)

    def _match_end(self, a: deque[Term], b: deque[Term], end: int) -> bool:
        one, other = a[end], b[end]
        size_one, size_other = self.size(one), self.size(other)
        if size_one == size_other:
            del a[end], b[end]
            self.unify(one, other)
            return True
        for big, small_size, size, side in (
            (one, size_other, size_one, a),
            (other, size_one, size_other, b),
        ):
            rest = size.divided_by(small_size)
            if rest is None or (size.static is not None and not 1 < rest.static_or(0) < size.static):
                continue
            if min(rest.static_or(2), small_size.static_or(2)) < 2:  # a size of 0, or no size: nothing would be cut off
                continue
            outer, inner = (small_size, rest) if end == 0 else (rest, small_size)
            parts = self._split(big, outer, inner)
            del side[end]
            for part in reversed(parts) if end == 0 else parts:
                (side.appendleft if end == 0 else side.append)(part)
            return True
        return False

    def _match_rest(self, a: list[Term], b: list[Term]) -> None:
        if not a and not b:
            return
        for lone, others in ((a, b), (b, a)):
            if len(lone) == 1 and others and isinstance(lone[0], Dim):
                self.unify(lone[0], product(*others))
                return
        for term in (*a, *b):
            self.pin(term, "factors that do not divide each other", gap=True)

    def _align(self, left: Sequence[Term], right: Sequence[Term]) -> None:
        """Unify two runs of segments: cut both at the union of their boundaries."""
        a, b = deque(left), deque(right)
        while a and b:
            one, other = a[0], b[0]
            size_one, size_other = self.size(one), self.size(other)
            if size_one == size_other:
                a.popleft()
                b.popleft()
                self.unify(one, other)
                continue
            n, m = size_one.static, size_other.static
            side, term, at = (a, one, m) if m is not None and (n is None or n > m) else (b, other, n)
            parts = None if at is None else self.cut(term, at)
            if parts is None:
                break
            side.popleft()
            side.extendleft(reversed(parts))
        for term in (*a, *b):
            self.pin(term, "segments whose boundaries do not line up", gap=True)

    def cut(self, term: Term, at: int) -> tuple[Term, Term] | None:
        """Cut an axis into its first `at` indices and the rest; None when no such cut can be described.

        A cut through a product falls on its outermost factor, when the inner ones divide it.
        """
        resolved = self.resolve(term)
        total = self.static(resolved)
        if total is None or not 0 < at < total:
            return None
        if isinstance(resolved, Dim):
            parts = self.dim(at), self.dim(total - at)
            self._bind(resolved, Concat(parts))
            return parts
        if isinstance(resolved, Product):
            outer, inner = resolved.factors[0], Product(resolved.factors[1:])
            unit = self.static(inner)
            if unit is None or at % unit:
                return None
            pieces = self.cut(outer, at // unit)
            return pieces and (Product((pieces[0], inner)), Product((pieces[1], inner)))
        before: list[Term] = []
        rest = list(resolved.segments)
        while True:
            size = self.static(rest[0])
            assert size is not None
            if size == at:
                before.append(rest.pop(0))
                break
            if size > at:
                pieces = self.cut(rest[0], at)
                if pieces is None:
                    return None
                before.append(pieces[0])
                rest[0] = pieces[1]
                break
            before.append(rest.pop(0))
            at -= size
        return Concat(tuple(before)), Concat(tuple(rest))

    def segments(self, term: Term, sizes: Sequence[int]) -> list[Term] | None:
        """Cut an axis into segments of the given sizes; None when one of the cuts cannot be described."""
        parts: list[Term] = []
        rest = term
        for size in sizes[:-1]:
            pieces = self.cut(rest, size)
            if pieces is None:
                return None
            parts.append(pieces[0])
            rest = pieces[1]
        return [self.resolve(part) for part in (*parts, rest)]
