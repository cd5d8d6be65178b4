"""Write a program as Python source. A framework runs it, and a person can read it (`model.code`)."""

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
from hyperclone_onnx.frameworks.compiling.namespaces.products import WithProductsIn
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
"""A function from the path of a stored tensor or a block to the source that reads or calls it."""


def function_source(name: str, first: str, body: Body, stored: Spell, block: Spell) -> str:
    """The source of a function that takes `first` and the body's inputs, and returns the body's outputs in a tuple."""
    writer = _Writer(stored, block)
    lines = writer.body(body)
    if needs_device(body):
        lines.insert(0, f"device = device_of({_first_array(body, stored)})")
    return "\n".join([f"def {name}({', '.join([first, *body.inputs])}):", *(INDENT + line for line in lines), ""])


def needs_device(body: Body) -> bool:
    """Whether a body creates arrays, for which the function must know the device."""
    return any(_creates(step) for step in body.steps) or any(isinstance(operand, Lifted) for operand in body.outputs)


def _creates(step: Step) -> bool:
    lifts = any(isinstance(operand, Lifted) for operand in given(step))
    return lifts or (isinstance(step, Call | Repeat) and step.creates) or any(map(needs_device, bodies(step)))


def _first_array(body: Body, stored: Spell) -> str:
    """The source of an array that is on the device: an input of the body, or a stored tensor."""
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
    """The variables of a body that its steps read as Python numbers."""
    names: set[str] = set()
    for step in body.steps:
        for inner in bodies(step):
            names |= host_variables(inner)
        if isinstance(step, Call):
            operator = registry.operator(step.domain, step.op_type)
            for position, operand in enumerate(step.inputs):
                if isinstance(operand, Local) and (step.host or (operator is not None and operator.is_host(position))):
                    names.add(operand.name)
        for operand in operands(step):
            if isinstance(operand, Lifted) and isinstance(operand.value, Local):
                names.add(operand.value.name)
    return names


def operands(step: Step) -> Iterator[Operand]:
    """The operands that a step reads, also within its bodies."""
    yield from (operand for operand in given(step) if operand is not None)
    for body in bodies(step):
        for inner in body.steps:
            yield from operands(inner)
        yield from body.outputs


def reads(step: Step) -> Iterator[str]:
    """The variables that a step reads."""
    for operand in operands(step):
        yield from variables(operand)


def variables(operand: Operand) -> Iterator[str]:
    """The variable of an operand; nothing for an operand that reads no variable."""
    inner = operand.value if isinstance(operand, Lifted) else operand
    if isinstance(inner, Local):
        yield inner.name


class _Writer:
    """Writes the lines of one generated function, and numbers the inner functions in it."""

    def __init__(self, stored: Spell, block: Spell) -> None:
        self.stored = stored
        self.block = block
        self.bodies = 0

    def body(self, body: Body, outer: bool = False) -> list[str]:
        """The lines of a body. They delete a variable after its last reader, so that its memory is free again."""
        last: dict[str, int] = {}
        for number, step in enumerate(body.steps):
            for name in (*reads(step), *(output for output in step.outputs if output)):
                last[name] = number
        returned = {name for operand in body.outputs for name in variables(operand)}
        defined = set(body.inputs) | {name for step in body.steps for name in step.outputs if name}
        lines: list[str] = []
        for number, step in enumerate(body.steps):
            lines += self.step(step)
            unread = sorted(name for name, place in last.items() if place == number and name in defined - returned)
            if unread and not outer:
                lines.append(f"del {', '.join(unread)}")
        lines.append(f"return ({''.join(f'{self.operand(output)}, ' for output in body.outputs)})")
        return lines

    def step(self, step: Step) -> list[str]:
        match step:
            case Choice():
                return self.choice(step)
            case Repeat():
                return self.repeat(step)
            case Walk():
                return self.walk(step)
        arguments = [self.operand(operand) for operand in step.inputs]
        targets = [name or "_" for name in step.outputs]
        if isinstance(step, BlockCall):
            return [f"{', '.join(targets)}, = {self.block(step.path)}({', '.join(arguments)})"]
        keywords = [f"{name}={literal(value)}" for name, value in step.attributes]
        if step.creates:
            keywords.append("device=device")
        single = len(targets) == 1 and step.op_type != "Split"
        left = targets[0] if single else f"{', '.join(targets)},"
        if not any(step.outputs):
            return []
        if step.host:
            return [f"{left} = host.{step.op_type}({', '.join([*arguments, *keywords])})"]
        return [f"{left} = {function_name(step.domain, step.op_type)}({', '.join(['xp', *arguments, *keywords])})"]

    def choice(self, step: Choice) -> list[str]:
        yes, yes_lines = self.inner("yes", step.yes)
        no, no_lines = self.inner("no", step.no)
        return [*yes_lines, *no_lines, f"{_targets(step)} = branch({self.operand(step.condition)}, {yes}, {no})"]

    def repeat(self, step: Repeat) -> list[str]:
        name, lines = self.inner("turn", step.turn)
        states = ", ".join([*map(self.operand, step.states), ""])
        trips, condition = self.operand(step.trips), self.operand(step.condition)
        call = f"loop({name}, {trips}, {condition}, ({states.strip()}), numbered={step.numbered}, device=device)"
        return [*lines, f"{_targets(step)} = {call}"]

    def walk(self, step: Walk) -> list[str]:
        name, lines = self.inner("turn", step.turn)
        states, scanned = (
            ", ".join([*map(self.operand, arrays), ""]).strip() for arrays in (step.states, step.scanned)
        )
        call = f"walk({name}, ({states}), ({scanned}), {step.axes!r}, {step.backwards!r})"
        return [*lines, f"{_targets(step)} = {call}"]

    def inner(self, kind: str, body: Body) -> tuple[str, list[str]]:
        """A body as a function within the generated function: the name and the lines of this inner function."""
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
    """The Python source of a number, a string, or a tuple of them."""
    if isinstance(value, tuple):
        return f"({''.join(f'{literal(item)}, ' for item in value)})"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value)


def function_name(domain: str, op_type: str) -> str:
    """The name of an operator in the source."""
    return f"{domain.replace('.', '_')}_{op_type}" if domain else op_type


@cache
def _globals(framework: str, products: str | None) -> dict[str, Any]:
    xp: Any = import_module(f"hyperclone_onnx.frameworks.compiling.namespaces.{framework}")
    xp = xp if products is None else WithProductsIn(xp, xp.dtype_named(products))
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
def compiled(source: str, framework: str, products: str | None = None) -> Callable[..., Any]:
    """The function that the source defines, with a framework's arrays. A traceback shows the lines of the source.

    Args:
        source: the source.
        framework: the name of the framework's namespace.
        products: the name of the type in which products run; None for the types of their operands.
    """
    # A traceback takes its lines from this cache, because the source is in no file.
    name = f"<handoff {len(linecache.cache)} for {framework}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = dict(_globals(framework, products))
    exec(compile(source, name, "exec"), scope)
    match = re.match(r"def (\w+)\(", source)
    assert match is not None
    return scope[match.group(1)]  # type: ignore[no-any-return]
