"""Solves the equations between powers of a stretch: which values of a graph are stretched, and how often.

A variable is the power of one part of an axis. Variables that must be equal are joined to classes. All other equations
are linear. They are solved by propagation: wherever one class is left unknown in an equation, the equation tells its
power. The order in which powers are chosen decides which equations do not hold in the end; a multiplication in the
graph then corrects each of those, so that any solution is right, and a good one needs few corrections.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Generic, TypeVar

Site = TypeVar("Site", bound=Hashable)


@dataclass(frozen=True)
class Equation(Generic[Site]):
    """The sum of `factor * power(variable)` over the terms is `total`.

    Args:
        terms: (variable, factor).
        total: the sum.
        variable: the variable whose power a correction changes if the equation does not hold.
        site: the place of that correction.
    """

    terms: tuple[tuple[int, int], ...]
    total: int
    variable: int
    site: Site


@dataclass
class Powers(Generic[Site]):
    """Variables and the equations between them."""

    equations: list[Equation[Site]] = field(default_factory=list)
    hints: list[tuple[int, int, int]] = field(default_factory=list)
    """(a, b, total): if the power of a is known, that of b should be total - power(a)."""
    wishes: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By priority, the most urgent first: (variable, power that it should have)."""
    _parents: list[int] = field(default_factory=list)

    def variable(self) -> int:
        """A new variable."""
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def root(self, variable: int) -> int:
        """The variable that stands for the class of a variable."""
        while self._parents[variable] != variable:
            self._parents[variable] = self._parents[self._parents[variable]]
            variable = self._parents[variable]
        return variable

    def join(self, one: int, other: int) -> None:
        """State that two powers are equal."""
        one, other = self.root(one), self.root(other)
        if one != other:
            self._parents[max(one, other)] = min(one, other)

    def solve(self, last: Iterable[int]) -> dict[int, Fraction]:
        """Choose a power for every class.

        Args:
            last: the variables of stored tensors, which get the powers that the others leave to them.

        Returns:
            By the root of a class, its power.
        """
        solved: dict[int, Fraction] = {}
        folded = [self._folded(equation) for equation in self.equations]
        by_class: dict[int, list[int]] = defaultdict(list)
        for number, (factors, _) in enumerate(folded):
            for root in factors:
                by_class[root].append(number)
        hints: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for known, other, total in self.hints:
            hints[self.root(known)].append((self.root(other), total))

        def choose(root: int, power: Fraction) -> None:
            pending = [(root, power)]
            while pending:
                root, power = pending.pop()
                if root in solved:
                    continue
                solved[root] = power
                pending += [(other, total - power) for other, total in hints[root]]
                for number in by_class[root]:
                    factors, total = folded[number]
                    unknown = [other for other in factors if other not in solved]
                    if len(unknown) == 1:
                        known = (factor * solved[other] for other, factor in factors.items() if other in solved)
                        pending.append((unknown[0], (total - sum(known, Fraction(0))) / factors[unknown[0]]))

        for priority in sorted(self.wishes):
            for variable, power in self.wishes[priority]:
                choose(self.root(variable), Fraction(power))
        stored = {self.root(variable) for variable in last}
        roots = dict.fromkeys(map(self.root, range(len(self._parents))))
        for root in sorted(roots, key=lambda root: root in stored):
            choose(root, Fraction(0))
        return solved

    def _folded(self, equation: Equation[Site]) -> tuple[dict[int, int], int]:
        """The factor of each class in an equation, and the total."""
        factors: dict[int, int] = defaultdict(int)
        for variable, factor in equation.terms:
            factors[self.root(variable)] += factor
        return {root: factor for root, factor in factors.items() if factor}, equation.total

    def corrections(self, solved: dict[int, Fraction]) -> dict[tuple[Site, int], Fraction]:
        """For each equation that does not hold: by (site, variable), what must be added to the power there."""
        made: dict[tuple[Site, int], Fraction] = {}
        for equation in self.equations:
            parts = (factor * solved[self.root(variable)] for variable, factor in equation.terms)
            rest = equation.total - sum(parts, Fraction(0))
            if rest:
                factor = next(factor for variable, factor in equation.terms if variable == equation.variable)
                key = equation.site, equation.variable
                made[key] = made.get(key, Fraction(0)) + rest / factor
        return made
