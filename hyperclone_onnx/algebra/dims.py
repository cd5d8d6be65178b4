"""Describes axes and unifies two descriptions of one axis.

The description of an axis is a `Term`: an atomic `Dim`, a `Product` of factors (outermost first, in numpy's row-major
order) or a `Concat` of segments side by side.

A `Dim` is a union-find cell. When two axes turn out to be equal, one description is *bound* to the other: a `Dim` to
any term of its size, factor to factor, segment to segment. A `Dim` of 768 that is equal to 12 x 64 is split into these
two factors. Descriptions that do not fit each other are *pinned*: all their atoms keep their size, and we remember the
reason and the place. It is always safe to pin a dimension.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hyperclone_onnx.algebra.sizes import Size


@dataclass(frozen=True)
class Pin:
    """The reason why a dimension keeps its size.

    Attributes:
        reason: the reason, as a part of a sentence.
        place: the node at which we learnt it.
        origin: the number of the dimension that was pinned first. Others follow from it by unification.
        gap: whether our rules cannot describe this case. False where the operator or the model's interface fixes the
            size.
    """

    reason: str
    place: str
    origin: int
    gap: bool = False

    def __str__(self) -> str:
        return f"{self.reason} (at {self.place})" if self.place else self.reason


@dataclass(eq=False)
class Dim:
    """An atomic dimension. `binding` is the term that it turned out to be equal to, None until then.

    If it is `tied`, it may only grow by repeats of each index in place (0 0 1 1), and only together with all other tied
    dimensions, by one factor. The pin says why, and is that of all of them if one of them must keep its size.
    """

    uid: int
    size: Size
    binding: Term | None = field(default=None, repr=False)
    pin: Pin | None = field(default=None, repr=False)
    tied: Pin | None = field(default=None, repr=False)

    @property
    def growable(self) -> bool:
        """Whether this dimension may grow: its size is known, and it is not pinned."""
        return self.pin is None and self.size.static is not None

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Product:
    """An axis that is a product, outermost factor first: ``(heads head_dim)``. The empty product has size 1."""

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


@dataclass(frozen=True)
class Equation:
    """Two sizes that some node needs to be equal, at least one of them symbolic.

    Where broadcasting may `stretch`, each of them may be 1 instead. A `hint` holds mostly.
    """

    left: Size
    right: Size
    place: str
    stretch: bool = False
    hint: bool = False


def product(*factors: Term) -> Term:
    """The product of `factors`. The product of one factor is that factor."""
    return factors[0] if len(factors) == 1 else Product(factors)


class Space:
    """The dimensions of one graph.

    Attributes:
        place: the node that is being related. New pins and new relations are labelled with it.
        dims: all dimensions, by number.
        symbols: the sizes that are known to be equal to a symbol.
    """

    def __init__(self) -> None:
        self.place = ""
        self.dims: list[Dim] = []
        self.symbols: dict[str, Size] = {}
        self.equations: list[Equation] = []
        """The equations between symbolic sizes, in the order of the walk; also those that `symbols` cannot express."""
        self._ties_fail = False
        self._edges: dict[int, list[tuple[int, str]]] = {}
        self._links = 0
        self._last: tuple[int, int, dict[int, tuple[int, str]]] = (-1, -1, {})
        self._firsts: tuple[int, dict[int, int]] = (-1, {})

    # -- making and reading terms -------------------------------------------------------------------------

    def dim(self, size: int | Size) -> Term:
        """A new dimension. An axis of size 1 is the empty product, because it cannot grow.

        Raises:
            ValueError: the size is negative.
        """
        length = Size.of(size)
        if length.static == 1:
            return ONE
        if length.static_or(0) < 0:
            raise ValueError(f"an axis of size {length}")
        dim = Dim(len(self.dims), length)
        self.dims.append(dim)
        return dim

    def unknown(self) -> Term:
        """A new dimension whose size is a symbol of its own."""
        return self.dim(Size.symbol(f"?{len(self.dims)}"))

    def resolve(self, term: Term) -> Term:
        """The normal form of a term: all bindings followed, nested products and nested concatenations flattened."""
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
        """The normal form of a dimension. It becomes the binding of all dimensions on the way, so that ways stay short.

        We follow the bindings in a loop: each layer of a model adds one, which is too many for a recursion.
        """
        passed: list[Dim] = []
        end: Term = dim
        while isinstance(end, Dim) and end.binding is not None:
            passed.append(end)
            end = end.binding
        resolved = end if isinstance(end, Dim) else self.resolve(end)
        for bound in passed:
            bound.binding = resolved
        return resolved

    def factors(self, term: Term) -> tuple[Term, ...]:
        """The factors of a term's normal form, outermost first. An axis of size 1 has none."""
        resolved = self.resolve(term)
        return resolved.factors if isinstance(resolved, Product) else (resolved,)

    def atoms(self, term: Term) -> Iterator[Dim]:
        """The dimensions that a term's normal form consists of, in order. One dimension may come several times."""
        resolved = self.resolve(term)
        if isinstance(resolved, Dim):
            yield resolved
        else:
            for part in resolved.factors if isinstance(resolved, Product) else resolved.segments:
                yield from self.atoms(part)

    def size(self, term: Term) -> Size:
        """The size of an axis."""
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
        """The size of an axis as an integer, None when it is symbolic."""
        return self.size(term).static

    def proven(self, symbol: str) -> Size | None:
        """The number that a symbol is known to be. None if it is not known, or no number."""
        size = Size.symbol(symbol).substituted(self.symbols)
        return None if size.static is None else size

    # -- pinning and explaining ---------------------------------------------------------------------------

    def pin(self, term: Term, reason: str, gap: bool = False) -> None:
        """Forbid the dimensions of a term to grow. The first reason of a dimension stays."""
        for atom in self.atoms(term):
            if atom.pin is None:
                atom.pin = Pin(reason, self.place, atom.uid, gap)

    def _link(self, one: Dim, others: Iterable[Dim]) -> None:
        """Remember that dimensions were related at the present place."""
        for other in others:
            self._links += 1
            self._edges.setdefault(one.uid, []).append((other.uid, self.place))
            self._edges.setdefault(other.uid, []).append((one.uid, self.place))

    def chain(self, start: int, end: int) -> list[str]:
        """The places on a shortest way from dimension `start` to dimension `end`, no place twice in a row."""
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
        """The smallest number among the dimensions that are related to dimension `uid`."""
        if self._firsts[0] != self._links:
            self._firsts = (self._links, {})
        firsts = self._firsts[1]
        if uid not in firsts:
            related = self._ways(uid)
            firsts.update(dict.fromkeys(related, min(related)))
        return firsts[uid]

    def _ways(self, start: int) -> dict[int, tuple[int, str]]:
        """For each dimension that is related to `start`: the dimension before it on a shortest way, and the place.

        We keep the last answer: if one node has pinned a thousand dimensions, `start` is the same for all of them.
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

    def relate(self, one: Size, other: Size, stretch: bool = False, hint: bool = False) -> None:
        """Note an equation between two sizes; see `Equation`. It unifies nothing."""
        if one != other and (one.static is None or other.static is None):
            self.equations.append(Equation(one, other, self.place, stretch, hint))

    # -- growth in place ----------------------------------------------------------------------------------

    def _tie(self, terms: Sequence[Term], reason: str) -> bool:
        """State that two descriptions of one axis agree only where each index is repeated in place.

        Groups of channels may reach across the boundary of joined parts. Neither description can be cut at the
        boundaries of the other, but both repeat each channel in place. Of a product only the innermost factor does so.
        Returns False where a part has no index to repeat.
        """
        innermost = [dim for term in terms for dim in self._innermost(term)]
        if not all(isinstance(dim, Dim) and dim.growable for dim in innermost):
            return False
        for dim in innermost:
            assert isinstance(dim, Dim)
            dim.tied = dim.tied or Pin(reason, self.place, dim.uid, gap=True)
        for term in terms:
            self._pin_outer(term)
        return True

    def _innermost(self, term: Term) -> Iterator[Term]:
        """The innermost factor of each segment."""
        resolved = self.resolve(term)
        if isinstance(resolved, Concat):
            for segment in resolved.segments:
                yield from self._innermost(segment)
        elif isinstance(resolved, Product) and resolved.factors:
            yield from self._innermost(resolved.factors[-1])
        else:
            yield resolved

    def _pin_outer(self, term: Term) -> None:
        """Pin the factors that are not innermost."""
        resolved = self.resolve(term)
        if isinstance(resolved, Concat):
            for segment in resolved.segments:
                self._pin_outer(segment)
        elif isinstance(resolved, Product) and resolved.factors:
            for factor in resolved.factors[:-1]:
                self.pin(factor, "the factor inside it is repeated in place")
            self._pin_outer(resolved.factors[-1])

    def settle_ties(self) -> None:
        """Pin all tied dimensions if one of them keeps its size, or turned out to have a part of one index."""
        tied = [dim for dim in self.dims if dim.binding is None and dim.tied is not None]
        if self._ties_fail or not all(dim.growable for dim in tied):
            for dim in tied:
                dim.pin = dim.pin or dim.tied

    # -- unification --------------------------------------------------------------------------------------

    def unify(self, left: Term, right: Term) -> None:
        """State that two terms describe one axis. Where the descriptions do not fit each other, they are pinned.

        The two axes must be equal for certain. Where broadcasting may stretch one of them, they are not.
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
        """Learn that two sizes are equal. Returns False when they cannot be."""
        if a.static is not None and b.static is not None:
            return False
        self.relate(a, b)
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
        if dim.tied is not None and not self._tie([term], dim.tied.reason):
            self._ties_fail = True
            self.pin(term, dim.tied.reason, gap=True)

    def _split(self, term: Term, outer: Size, inner: Size) -> tuple[Term, Term]:
        """Two new dimensions, (outer inner), that an axis consists of."""
        parts = self.dim(outer), self.dim(inner)
        self.unify(term, Product(parts))
        return parts

    def match(self, left: Sequence[Term], right: Sequence[Term]) -> None:
        """State that two lists of factors, both outermost first, describe one index space.

        We match factors of equal size from the left, then from the right. A factor that is a multiple of its
        counterpart is split (768 against 12 64). Factors that remain and fit nowhere (4 9 against 6 6) are pinned.
        """
        a, b = deque(left), deque(right)
        while self._flatten_ends(a) and self._flatten_ends(b):
            if not (self._match_end(a, b, 0) or self._match_end(a, b, -1)):
                break
        self._match_rest(list(a), list(b))

    def _flatten_ends(self, side: deque[Term]) -> bool:
        """Replace the first and the last term by their factors. Returns whether any term is left."""
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
        """Unify the two terms at one end (0 or -1), or split the larger one. False where neither is possible."""
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
            if min(rest.static_or(2), small_size.static_or(2)) < 2:  # with a factor of 0 or 1 nothing would be split
                continue
            outer, inner = (small_size, rest) if end == 0 else (rest, small_size)
            parts = self._split(big, outer, inner)
            del side[end]
            for part in reversed(parts) if end == 0 else parts:
                (side.appendleft if end == 0 else side.append)(part)
            return True
        return False

    def _match_rest(self, a: list[Term], b: list[Term]) -> None:
        """Unify the factors that neither end could match: one dimension with a product. Otherwise pin them all."""
        if not a and not b:
            return
        for lone, others in ((a, b), (b, a)):
            if len(lone) == 1 and others and isinstance(lone[0], Dim):
                self.unify(lone[0], product(*others))
                return
        self.relate(self.size(Product(tuple(a))), self.size(Product(tuple(b))))
        text = " and into ".join(self._sizes(Product(tuple(side))) for side in (a, b))
        for term in (*a, *b):
            self.pin(term, f"an axis is divided into {text}, which do not divide each other", gap=True)

    def _align(self, left: Sequence[Term], right: Sequence[Term]) -> None:
        """State that two lists of segments describe one axis: both are cut at all boundaries of either."""
        both = " and into ".join(self._sizes(Concat(tuple(side))) for side in (left, right))
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
        text = f"an axis is divided into {both}, whose boundaries do not line up"
        if not self._tie([*a, *b], text):
            for term in (*a, *b):
                self.pin(term, text, gap=True)

    def _sizes(self, term: Term) -> str:
        """The sizes of a term's parts, for a message; "?" where a size is known only when the model runs."""
        resolved = self.resolve(term)
        if isinstance(resolved, Product):
            return (
                " x ".join(f"({text})" if " + " in text else text for text in map(self._sizes, resolved.factors)) or "1"
            )
        if isinstance(resolved, Concat):
            return " + ".join(map(self._sizes, resolved.segments))
        size = self.static(resolved)
        return "?" if size is None else str(size)

    def cut(self, term: Term, at: int) -> tuple[Term, Term] | None:
        """Cut an axis into its first `at` indices and the rest. None when that cut cannot be described.

        A cut through a product is a cut through its outermost factor, where the size of the inner ones divides `at`.
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
        """Cut an axis into segments of the given sizes. None when one of the cuts cannot be described."""
        parts: list[Term] = []
        rest = term
        for size in sizes[:-1]:
            pieces = self.cut(rest, size)
            if pieces is None:
                return None
            parts.append(pieces[0])
            rest = pieces[1]
        return [self.resolve(part) for part in (*parts, rest)]
