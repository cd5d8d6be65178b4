"""A program: a graph as a list of calls of the table's operators.

A `Program` is frozen data and does not depend on a framework. `compiler` makes it. Sizes, and the values that are
computed from sizes, are *host* values: Python numbers instead of arrays. So a framework that traces the program sees
static shapes, or its own symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hyperclone_onnx.analysis.trainable import Role


@dataclass(frozen=True)
class Local:
    """A variable of the program: an input, or a result of a step."""

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
    """A host value that is turned into an array of an ONNX element type."""

    value: Local | Number
    element_type: int


Operand = Local | Stored | Number | Lifted


@dataclass(frozen=True)
class Call:
    """outputs = operator(*inputs, **attributes). If `host`, the operator's form for Python numbers is called."""

    node: str
    domain: str
    op_type: str
    inputs: tuple[Operand | None, ...]
    outputs: tuple[str | None, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    host: bool = False
    creates: bool = False
    """Whether the operator creates an array, and so takes the device as an argument."""


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
    """A Loop: states, results = turn(number, condition, *states), repeated. The results of all turns are stacked."""

    node: str
    trips: Operand | None
    """The largest number of turns. With None the Loop runs until the condition fails."""
    condition: Operand | None
    """Whether the first turn runs. None if the condition always holds, also after each turn."""
    states: tuple[Operand, ...]
    turn: Body
    outputs: tuple[str | None, ...]
    numbered: bool
    """Whether the body takes the turn's number, or a state, as a Python number."""
    creates: bool = True


@dataclass(frozen=True)
class Walk:
    """A Scan: states, results = turn(*states, *slices), along one axis of each scanned array."""

    node: str
    states: tuple[Operand, ...]
    scanned: tuple[Operand, ...]
    turn: Body
    outputs: tuple[str | None, ...]
    axes: tuple[int, ...]
    """The axis of each scanned array, then the axis along which each result is stacked."""
    backwards: tuple[int, ...]
    """In the same order: 1 if the Scan runs from the end of the axis, otherwise 0."""


@dataclass(frozen=True)
class BlockCall:
    """outputs = block(*inputs), with the stored tensors under `path`. `block` is an index into `Program.blocks`."""

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
    """The operands of a step itself. The operands of steps within its bodies are left out."""
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
    """Steps in the order in which they run. Each variable is set once."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]


@dataclass(frozen=True)
class Weight:
    """A stored tensor: the name of its initializer, its path in the parameters, its shape, type and role."""

    initializer: str
    path: str
    shape: tuple[int, ...]
    element_type: int
    role: Role
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class Input:
    """A graph input: its name, its variable and its element type.

    `host`: the program takes it as Python numbers. `optional`: it may be left out, and is None then.
    """

    name: str
    variable: str
    element_type: int
    host: bool
    optional: bool = False


@dataclass(frozen=True)
class Program:
    """A whole graph as a program. A `BlockCall` names one of its `blocks` by index."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    body: Body
    weights: tuple[Weight, ...]
    blocks: tuple[Body, ...] = ()

    def by_name(self, result: Any) -> dict[str, Any]:
        """The outputs of a run by name. A program with one output gives it alone."""
        return result if isinstance(result, dict) else {self.outputs[0]: result}

    def by_path(self) -> dict[str, Weight]:
        """The stored tensors by path."""
        return {weight.path: weight for weight in self.weights}
