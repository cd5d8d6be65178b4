"""A program as Python source: what a framework runs, and what a person can read (`model.code`)."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any

from hyperclone_onnx.frameworks.compiling import ops as _table  # noqa: F401 - importing it fills the table
from hyperclone_onnx.frameworks.compiling import registry
from hyperclone_onnx.frameworks.compiling.ops.control import walk
from hyperclone_onnx.frameworks.compiling.program import (
    BlockCall,
    Body,
    Call,
    Choice,
    Lifted,
    Local,
    Number,
    Operand,
    Repeat,
    Step,
    Stored,
    Walk,
    bodies,
    given,
)

INDENT = "    "
Spell = Callable[[str], str]
"""How a framework writes a stored tensor, or calls a block, by its path."""


def function_source(name: str, first: str, body: Body, stored: Spell, block: Spell) -> str:
    """The source of a function of `first` and the body's inputs that returns the body's outputs in a tuple."""
    writer = _Writer(stored, block)
    lines = writer.body(body)
    if needs_device(body):
        lines.insert(0, f"device = device_of({_first_array(body, stored)})")
    return "\n".join([f"def {name}({', '.join([first, *body.inputs])}):", *(INDENT + line for line in lines), ""])


def needs_device(body: Body) -> bool:
    """Whether a body makes arrays from nothing."""
    return any(_creates(step) for step in body.steps) or any(isinstance(each, Lifted) for each in body.outputs)


def _creates(step: Step) -> bool:
    lifts = any(isinstance(each, Lifted) for each in given(step))
    return lifts or (isinstance(step, Call | Repeat) and step.creates) or any(map(needs_device, bodies(step)))


def _first_array(body: Body, stored: Spell) -> str:
    hosts = host_variables(body)
    for name in body.inputs:
        if name not in hosts:
            return name
    for step in body.steps:
        for operand in operands(step):
            if isinstance(operand, Stored):
                return stored(operand.path)
    return "None"


def host_variables(body: Body) -> set[str]:
    """The variables of a body that are read as Python numbers."""
    found: set[str] = set()
    for step in body.steps:
        for inner in bodies(step):
            found |= host_variables(inner)
        if isinstance(step, Call):
            operator = registry.operator(step.domain, step.op_type)
            for position, operand in enumerate(step.inputs):
                if isinstance(operand, Local) and (step.host or (operator is not None and operator.is_host(position))):
                    found.add(operand.name)
        for operand in operands(step):
            if isinstance(operand, Lifted) and isinstance(operand.value, Local):
                found.add(operand.value.name)
    return found


def operands(step: Step) -> Iterator[Operand]:
    """What a step reads, in its bodies too."""
    yield from (each for each in given(step) if each is not None)
    for body in bodies(step):
        for inner in body.steps:
            yield from operands(inner)
        yield from body.outputs


def reads(step: Step) -> Iterator[str]:
    """The variables that a step reads."""
    for operand in operands(step):
        yield from variables(operand)


def variables(operand: Operand) -> Iterator[str]:
    """The variable that an operand is, if any."""
    inner = operand.value if isinstance(operand, Lifted) else operand
    if isinstance(inner, Local):
        yield inner.name


class _Writer:
    def __init__(self, stored: Spell, block: Spell) -> None:
        self.stored = stored
        self.block = block
        self.bodies = 0

    def body(self, body: Body, outer: bool = False) -> list[str]:
        """The lines of a body; each variable is let go after its last reader, so that memory is free again."""
        last: dict[str, int] = {}
        for number, step in enumerate(body.steps):
            for name in (*reads(step), *(each for each in step.outputs if each)):
                last[name] = number
        kept = {name for operand in body.outputs for name in variables(operand)}
        own = set(body.inputs) | {name for step in body.steps for name in step.outputs if name}
        lines: list[str] = []
        for number, step in enumerate(body.steps):
            lines += self.step(step)
            done = sorted(name for name, place in last.items() if place == number and name in own - kept)
            if done and not outer:
                lines.append(f"del {', '.join(done)}")
        lines.append(f"return ({''.join(f'{self.operand(each)}, ' for each in body.outputs)})")
        return lines

    def step(self, step: Step) -> list[str]:
        match step:
            case Choice():
                return self.choice(step)
            case Repeat():
                return self.repeat(step)
            case Walk():
                return self.walk(step)
        given = [self.operand(each) for each in step.inputs]
        targets = [name or "_" for name in step.outputs]
        if isinstance(step, BlockCall):
            return [f"{', '.join(targets)}, = {self.block(step.path)}({', '.join(given)})"]
        keywords = [f"{name}={literal(value)}" for name, value in step.attributes]
        if step.creates:
            keywords.append("device=device")
        single = len(targets) == 1 and step.op_type != "Split"
        left = targets[0] if single else f"{', '.join(targets)},"
        if not any(step.outputs):
            return []
        if step.host:
            return [f"{left} = host.{step.op_type}({', '.join([*given, *keywords])})"]
        return [f"{left} = {function_name(step.domain, step.op_type)}({', '.join(['xp', *given, *keywords])})"]

    def choice(self, step: Choice) -> list[str]:
        yes, one = self.inner("yes", step.yes)
        no, other = self.inner("no", step.no)
        return [*one, *other, f"{_targets(step)} = branch({self.operand(step.condition)}, {yes}, {no})"]

    def repeat(self, step: Repeat) -> list[str]:
        name, lines = self.inner("turn", step.turn)
        states = ", ".join([*map(self.operand, step.states), ""])
        trips, condition = self.operand(step.trips), self.operand(step.condition)
        call = f"loop({name}, {trips}, {condition}, ({states.strip()}), numbered={step.numbered}, device=device)"
        return [*lines, f"{_targets(step)} = {call}"]

    def walk(self, step: Walk) -> list[str]:
        name, lines = self.inner("turn", step.turn)
        states, scanned = (", ".join([*map(self.operand, each), ""]).strip() for each in (step.states, step.scanned))
        call = f"walk({name}, ({states}), ({scanned}), {step.axes!r}, {step.backwards!r})"
        return [*lines, f"{_targets(step)} = {call}"]

    def inner(self, kind: str, body: Body) -> tuple[str, list[str]]:
        """A body as a function within this one: its name and its lines."""
        self.bodies += 1
        name = f"{kind}_{self.bodies}"
        inner = self.body(body, outer=True)
        return name, [f"def {name}({', '.join(body.inputs)}):", *(INDENT + line for line in inner)]

    def operand(self, operand: Operand | None) -> str:
        match operand:
            case None:
                return "None"
            case Local(name):
                return name
            case Stored(path):
                return self.stored(path)
            case Number(value):
                return literal(value)
            case Lifted(value, element_type):
                return f"lift({self.operand(value)}, {element_type}, device)"
        raise AssertionError(operand)


def _targets(step: Choice | Repeat | Walk) -> str:
    return "".join(f"{name or '_'}, " for name in step.outputs).strip()


def literal(value: Any) -> str:
    """A number, a string, or a tuple of them, as Python writes it."""
    if isinstance(value, tuple):
        return f"({''.join(f'{literal(each)}, ' for each in value)})"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value)


def function_name(domain: str, op_type: str) -> str:
    """What an operator is called in the source."""
    return f"{domain.replace('.', '_')}_{op_type}" if domain else op_type


@cache
def _globals(framework: str) -> dict[str, Any]:
    xp = import_module(f"hyperclone_onnx.frameworks.compiling.namespaces.{framework}")
    table = {function_name(*key): registry.implementation(framework, *key) for key in registry.covered()}
    host = type("host", (), {name: staticmethod(op.function) for name, op in registry.host_operators().items()})
    return {
        "xp": xp,
        "host": host,
        "partial": partial,
        "inf": math.inf,
        "nan": math.nan,
        **{name: getattr(xp, name) for name in ("device_of", "lift", "branch", "loop")},
        "walk": partial(walk, xp),
        **table,
    }


@cache
def compiled(source: str, framework: str) -> Callable[..., Any]:
    """The function that a source defines, in a framework's terms; a traceback shows its lines."""
    name = f"<handoff {len(linecache.cache)} for {framework}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = dict(_globals(framework))
    exec(compile(source, name, "exec"), scope)
    match = re.match(r"def (\w+)\(", source)
    assert match is not None
    return scope[match.group(1)]  # type: ignore[no-any-return]
