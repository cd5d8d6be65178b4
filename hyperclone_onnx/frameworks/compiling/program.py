"""A graph as a program: calls into the table of operators, host values apart from arrays.

A `Program` is frozen data that knows no framework; `compiler` makes it. Sizes and what is computed from them are *host*
values, Python numbers; so a tracing framework sees static shapes, or its own symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from typing import Literal as OneOf


@dataclass(frozen=True)
class Local:
    """A variable: an input or what a call made."""

    name: str


@dataclass(frozen=True)
class Stored:
    """A stored tensor, by its path."""

    path: str


@dataclass(frozen=True)
class Number:
    """A Python number, or a tuple of them."""

    value: Any


@dataclass(frozen=True)
class Lifted:
    """A host value as an array of an ONNX element type."""

    value: Local | Number
    element_type: int


Operand = Local | Stored | Number | Lifted


@dataclass(frozen=True)
class Call:
    """outputs = operator(*inputs, **attributes), by the operator's form for Python numbers when `host`."""

    node: str
    domain: str
    op_type: str
    inputs: tuple[Operand | None, ...]
    outputs: tuple[str | None, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    host: bool = False
    creates: bool = False
    """Whether it makes an array from nothing, and so is told the device."""


@dataclass(frozen=True)
class Choice:
    """Outputs = yes() if condition else no()."""

    node: str
    condition: Operand
    yes: Body
    no: Body
    outputs: tuple[str | None, ...]


@dataclass(frozen=True)
class Repeat:
    """A Loop: states, made = turn(number, condition, *states), again and again."""

    node: str
    trips: Operand | None
    """How often at most; None: until the condition fails."""
    condition: Operand | None
    """Whether to begin; None where it always holds, also after each turn."""
    states: tuple[Operand, ...]
    turn: Body
    outputs: tuple[str | None, ...]
    numbered: bool
    """Whether the turn takes its number, or a state, as a Python number."""
    creates: bool = True


@dataclass(frozen=True)
class Walk:
    """A Scan: states, made = turn(*states, *slices), along one axis of each scanned array."""

    node: str
    states: tuple[Operand, ...]
    scanned: tuple[Operand, ...]
    turn: Body
    outputs: tuple[str | None, ...]
    axes: tuple[int, ...]
    """Of each scanned array, then of each made one."""
    backwards: tuple[int, ...]
    """The same, 1 where it runs from the end."""


@dataclass(frozen=True)
class BlockCall:
    """outputs = the block at `path`, called."""

    path: str
    block: int
    inputs: tuple[Operand, ...]
    outputs: tuple[str | None, ...]


Step = Call | Choice | Repeat | Walk | BlockCall


def bodies(step: Step) -> tuple[Body, ...]:
    """The bodies within a step."""
    match step:
        case Choice():
            return (step.yes, step.no)
        case Repeat() | Walk():
            return (step.turn,)
    return ()


def given(step: Step) -> tuple[Operand | None, ...]:
    """What a step itself is given, its bodies aside."""
    match step:
        case Choice():
            return (step.condition,)
        case Repeat():
            return (step.trips, step.condition, *step.states)
        case Walk():
            return (*step.states, *step.scanned)
    return step.inputs


@dataclass(frozen=True)
class Body:
    """Steps in order, each variable set once."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]


Role = OneOf["trainable", "frozen", "constant"]


@dataclass(frozen=True)
class Weight:
    """A stored tensor: the initializer it is, where it lives, and what it is for."""

    initializer: str
    path: str
    shape: tuple[int, ...]
    element_type: int
    role: Role
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class Input:
    """A graph input: its name, its variable, and whether it is taken as Python numbers."""

    name: str
    variable: str
    element_type: int
    host: bool


@dataclass(frozen=True)
class Program:
    """A whole graph. `blocks` are the bodies that `BlockCall`s refer to."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    body: Body
    weights: tuple[Weight, ...]
    blocks: tuple[Body, ...] = ()

    def by_path(self) -> dict[str, Weight]:
        """The stored tensors by path."""
        return {weight.path: weight for weight in self.weights}
