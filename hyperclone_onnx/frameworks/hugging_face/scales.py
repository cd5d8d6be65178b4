"""Compensate for the constants that a model derives from its sizes, by factors folded into its stored tensors.

In a grown model every activation should repeat the elements of the source's activation. Two things prevent that:

* A model built from a grown configuration computes constants from the sizes: it multiplies an embedding by
  sqrt(hidden), divides scores by sqrt(head size), or divides logits by the width.
* The grown graph may have a scalar between two operators. The model has no place for such a scalar.

So some activations repeat the source's elements *and scale them*. To measure which activations, and by how much, both
models run, operator by operator.

We may multiply each stored tensor by a factor e^x. The logarithm of an activation's scale is then a linear function of
the x. A product adds the logarithms of its operands. A sum needs operands of equal scale. An operator that is not
homogeneous (a softmax, a norm with an epsilon) needs operands of scale 1. `equations.solve` solves these equations.

The handoff is refused, and the message names the operator, in two cases: the equations have no solution, or an
activation does not repeat the source's at any scale (for example the rotary frequencies of a larger head).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.hugging_face.equations import NEAR, Equation, solve
from hyperclone_onnx.frameworks.hugging_face.recording import (
    HUGE,
    TRANSPARENT,
    Recorder,
    Signature,
    Step,
    operator_name,
    run_model,
    signature,
    tensors_of,
)

SAME = frozenset(
    """view _unsafe_view reshape permute t transpose expand slice select clone contiguous _to_copy alias detach squeeze
    unsqueeze repeat flip roll unfold as_strided split split_with_sizes unbind chunk index index_select gather embedding
    diagonal lift_fresh lift_fresh_copy neg mean sum cumsum constant_pad_nd tril triu avg_pool2d avg_pool1d
    adaptive_avg_pool2d _adaptive_avg_pool2d max_pool2d max_pool2d_with_indices abs relu leaky_relu amax amin
    upsample_nearest2d view_as movedim pixel_shuffle im2col repeat_interleave narrow take_along_dim resolve_conj
    _reshape_alias to positive fill_diagonal dropout native_dropout unsafe_split pad swapaxes""".split()
)
"""Operators whose result has the scale of their first floating operand."""

PRODUCTS = frozenset("mul mm bmm matmul dot mv linear convolution outer einsum _convolution".split())
"""Operators whose result has the product of their operands' scales."""

EQUAL = frozenset(
    """add sub cat stack where maximum minimum index_put scatter scatter_add index_add index_copy slice_scatter
    select_scatter copy lerp rsub""".split()
)
"""Operators that add their operands or place them side by side: all operands need the same scale."""

UNWRITTEN = frozenset("empty new_empty empty_like empty_strided new_empty_strided".split())
"""Operators whose result has no numbers yet: they are written into parts of it."""

PARTS = frozenset(("slice", "select", "narrow"))
"""Operators that return a part of a tensor, which can be written."""

POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0, "linalg_vector_norm": 1.0, "norm": 1.0}
"""Operators of one operand whose result has a power of the operand's scale, with the exponent."""


class DerivedNumbers(Refused):
    """A model derives numbers from its sizes that are no repetition of the source's (ALiBi's slopes, rotary angles)."""

    def __init__(self, text: str, shape: tuple[int, ...]) -> None:
        super().__init__(text)
        self.shape = shape
        """The shape of the tensor that has these numbers, in the grown model."""


@dataclass
class Value:
    """What we know of a tensor's scale relative to the source's tensor.

    With factors e^x folded into the stored tensors, ``scale = exp(sum of coefficients[name] * x[name] + constant)``.
    """

    coefficients: dict[str, float] = field(default_factory=dict)
    constant: float = 0.0
    ran: float = 0.0
    """The logarithm of the scale measured in this run, in which the walk corrects operands of unequal scale."""
    active: bool = False
    """Whether the tensor depends on the model's inputs."""
    stored: bool = False
    """Whether the tensor is computed from parameters alone."""
    zero: bool = False
    """Whether all elements are zero: zeros have every scale."""
    leaf: str | None = None
    """The name of the stored tensor whose elements these are, as stored or rearranged."""
    unwritten: bool = False
    """Whether parts of the tensor may have no numbers yet, so that its elements cannot be measured."""
    broken: DerivedNumbers | None = None
    """The message about the first tensor on the way here that does not repeat the source's at any scale."""


@dataclass(frozen=True)
class Compensation:
    """A stored tensor becomes ``(tensor + offset) * factor - offset``."""

    factor: float
    offset: float = 0.0


def compensations(
    model: Any,
    feeds: dict[str, Any],
    source: Sequence[Step],
    names: Mapping[int, str],
    ratios: Iterable[int],
    known: Mapping[str, float],
) -> dict[str, Compensation]:
    """The factors with which the grown model computes what its source computes, for each stored tensor that needs one.

    Args:
        model: the grown model in float32. Its tensors are those that growth alone makes from the source's.
        feeds: the model's inputs by name. They are the inputs with which `source` was recorded.
        source: the steps recorded from the source's model.
        names: the name of each stored tensor, by the id of its parameter or buffer.
        ratios: the factors by which dimensions grow. Measured scales near a product of their roots are set to it.
        known: by name, the scales of stored tensors that are zero, because a scale of zeros cannot be measured.

    Raises:
        DerivedNumbers: the model derives numbers from its sizes that are no repetition of the source's.
        Refused: no factors make the models equal. The message names the operator.
    """
    walk = _Walk(model, source, names, _Grid(ratios), known)
    walk.run(feeds)
    sizes = {
        names[id(tensor)]: tensor.numel() for tensor in (*model.parameters(), *model.buffers()) if id(tensor) in names
    }
    for name, offsets in walk.offsets.items():
        if len(offsets) > 1:
            walk.equations.append(Equation({name: 1.0}, 0.0, f"{name}, which is read in two ways"))
    solved = solve(walk.equations, sizes)
    return {
        name: Compensation(math.exp(x), next(iter(walk.offsets.get(name, {0.0}))))
        for name, x in solved.items()
        if abs(x) > 1e-9
    }


class _Grid:
    """Snaps a measured logarithm of a scale to the nearest exact one.

    Scales are mostly products of square roots of the growth factors, so the exact values are known beforehand.
    """

    def __init__(self, ratios: Iterable[int]) -> None:
        logs = [0.0]
        for ratio in sorted({factor for factor in ratios if factor > 1}):
            logs = [log + k * 0.5 * math.log(ratio) for log in logs for k in range(-6, 7)]
        self.logs = np.unique(np.asarray(logs))

    def __call__(self, log: float) -> float:
        nearest = float(self.logs[np.abs(self.logs - log).argmin()])
        return nearest if abs(nearest - log) < NEAR else log


class _Walk:
    """One run of the grown model beside the source's recording, which collects the equations of all operators."""

    def __init__(
        self,
        model: Any,
        source: Sequence[Step],
        names: Mapping[int, str],
        grid: _Grid,
        known: Mapping[str, float],
    ) -> None:
        self.known = known
        self.model = model
        self.source = source
        self.names = dict(names)
        self.grid = grid
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []
        self.equations: list[Equation] = []
        self.offsets: dict[str, set[float]] = {}
        self.inputs: set[int] = set()
        self.where: list[str] = []
        self.labels = {id(buffer): name for name, buffer in model.named_buffers()}
        self.count = 0
        self.aligned: dict[int, int] | None = None

    def run(self, feeds: dict[str, Any]) -> None:
        self.inputs = {id(tensor) for tensor in feeds.values()}
        hooks = self._hooks()
        try:
            self._align(feeds)
            with Recorder(self._handle):
                result = run_model(self.model, feeds)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = result.items() if hasattr(result, "items") else enumerate(result)
        for name, tensor in outputs:
            value = self.values.get(id(tensor))
            if value is not None and tensor.is_floating_point():
                if value.broken is not None:
                    raise value.broken
                self._demand(value, f"the output {name}")

    def _hooks(self) -> list[Any]:
        """Hooks that keep `self.where`, the stack of modules that are running, for messages."""

        def enter(name: str) -> Any:
            return lambda *_: self.where.append(name)

        def leave(*_: Any) -> None:
            self.where.pop()

        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(name or type(module).__name__)))
            hooks.append(module.register_forward_hook(leave))
        return hooks

    def _align(self, feeds: dict[str, Any]) -> None:
        """Pair the steps of both models where the two do not run the same sequence of operators."""
        names: list[str] = []

        def handler(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            if operator_name(func) not in TRANSPARENT:
                names.append(operator_name(func))
            return func(*args, **kwargs)

        with Recorder(handler):
            run_model(self.model, feeds)
        source_names = [step.name for step in self.source]
        if names == source_names:
            return
        matcher = difflib.SequenceMatcher(None, source_names, names, autojunk=False)
        self.aligned = {b + i: a + i for a, b, size in matcher.get_matching_blocks() for i in range(size)}

    def _step(self) -> Step | None:
        """The source's step that belongs to the current step."""
        number = self.count if self.aligned is None else self.aligned.get(self.count)
        return None if number is None else self.source[number]

    # -- one operator -------------------------------------------------------------------------------------------

    def _handle(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operator, and note its equations and its result's scale."""
        name = operator_name(func)
        if name in TRANSPARENT:
            result = func(*args, **kwargs)
            self.alive.append(result)
            if id(args[0]) in self.values:
                self.values[id(result)] = self.values[id(args[0])]
            elif id(args[0]) in self.names:
                self.names[id(result)] = self.names[id(args[0])]
            return result
        step = self._step()
        step = step if step is not None and step.name == name else None
        self.count += 1
        tensors = tensors_of(args, kwargs)
        values = [self._value(tensor, step, position) for position, tensor in enumerate(tensors)]
        floating = [(t, v) for t, v in zip(tensors, values, strict=True) if t.is_floating_point()]
        bare = name.rstrip("_") if _works_in_place(name) else name
        out, factors = self._rule(bare, args, floating, name)
        if factors:
            if _works_in_place(name) and id(args[0]) in factors:
                args[0].mul_(factors.pop(id(args[0])))
            args = _scaled(args, factors)
        result = func(*args, **kwargs)
        self._made(result, out, values, step, name, tensors)
        return result

    def _value(self, tensor: Any, step: Step | None, position: int) -> Value:
        """The value of an operand. At its first use, a parameter, buffer, constant or input is measured."""
        value = self.values.get(id(tensor))
        if value is not None:
            return value
        leaf = self.names.get(id(tensor))
        value = Value(active=id(tensor) in self.inputs, stored=leaf is not None, leaf=leaf)
        if leaf is not None:
            value.coefficients = {leaf: 1.0}
        measured = self._measured(tensor, step.leaves.get(position) if step is not None else None)
        if isinstance(measured, float):
            value.ran = value.constant = measured
        elif measured is None and leaf is not None:
            value.ran = value.constant = math.log(self.known.get(leaf, 1.0))
        elif measured is None and tensor.is_floating_point():
            value.zero = bool((tensor == 0).all()) if tensor.numel() < 1 << 20 else False
        elif leaf is None and tensor.is_floating_point():
            label = self.labels.get(id(tensor), "a constant")
            value.broken = self._explanation(label, tensor, step.leaves.get(position) if step is not None else None)
        self.values[id(tensor)] = value
        self.alive.append(tensor)
        return value

    def _rule(
        self, name: str, args: Sequence[Any], floating: list[tuple[Any, Value]], full: str
    ) -> tuple[Value, dict[int, float]]:
        """The result's scale as the operator implies it, and the factors by which operands must be multiplied first.

        The factors, by the id of the operand, correct scales that the operator does not accept: with them the rest of
        the run stays comparable with the source's.
        """
        where = self._where(full)
        inputs = [value for _, value in floating]
        if not inputs:
            return Value(), {}
        first = inputs[0]
        if name in SAME or (name in ("mul", "div") and len(inputs) == 1 and isinstance(args[0], torch.Tensor)):
            return _copied(first, keep_leaf=name in SAME), {}
        if name in PRODUCTS:
            self._bare(inputs)
            return _combined(inputs, [1.0] * len(inputs)), {}
        if name == "div":
            self._bare(inputs)
            return _combined(inputs, [1.0, -1.0][: len(inputs)]), {}
        if name in POWERS or (name == "pow" and not isinstance(args[1], torch.Tensor)):
            self._bare(inputs)
            return _combined([first], [POWERS.get(name) or float(args[1])]), {}
        if name == "add" and len(inputs) == 1 and first.leaf is not None and isinstance(_number(args), int | float):
            self.offsets.setdefault(first.leaf, set()).add(float(_number(args)))
            return Value(dict(first.coefficients), first.constant, 0.0, stored=True), {}
        if name in ("masked_fill", "fill", "zero", "clamp_min") and _harmless(args):
            return _copied(first), {}
        self._bare(inputs)
        if name in EQUAL and not (name in ("add", "sub", "rsub") and len(inputs) == 1 and _number(args)):
            return self._equal(floating, where)
        return self._nonlinear(floating, where)

    def _bare(self, inputs: Sequence[Value]) -> None:
        """Note that the model reads these stored tensors without adding a constant to them first."""
        for value in inputs:
            if value.leaf is not None:
                self.offsets.setdefault(value.leaf, set()).add(0.0)

    def _equal(self, floating: list[tuple[Any, Value]], where: str) -> tuple[Value, dict[int, float]]:
        """Operands that are added, or placed side by side, must have the same scale."""
        operands = [(t, v) for t, v in floating if not v.zero]
        if not operands:
            return _copied(floating[0][1]), {}
        head = next((v for _, v in operands if not v.coefficients), operands[0][1])
        for _, value in operands:
            if value is head:
                continue
            difference = dict(value.coefficients)
            for key, coefficient in head.coefficients.items():
                difference[key] = difference.get(key, 0.0) - coefficient
            self._equation(difference, head.constant - value.constant, where)
        unequal = any(abs(v.ran - head.ran) > NEAR for _, v in operands)
        out = Value(dict(head.coefficients), head.constant, 0.0 if unequal else head.ran)
        return out, {id(t): math.exp(-v.ran) for t, v in operands if abs(v.ran) > 0.0} if unequal else {}

    def _nonlinear(self, floating: list[tuple[Any, Value]], where: str) -> tuple[Value, dict[int, float]]:
        """Every operand must have the scale 1, because nothing is known of how the operator treats scales."""
        factors = {}
        for tensor, value in floating:
            if value.zero:
                continue
            if value.stored:  # the scale that growth gave a stored tensor is correct, so only the factors count
                self._equation(value.coefficients, 0.0, where)
                continue
            self._demand(value, where)
            if abs(value.ran) > NEAR:
                factors[id(tensor)] = math.exp(-value.ran)
        return Value(), factors

    def _demand(self, value: Value, where: str) -> None:
        """Demand that a value has the scale 1."""
        self._equation(value.coefficients, -value.constant, where)

    def _equation(self, coefficients: Mapping[str, float], constant: float, where: str) -> None:
        kept = {name: coefficient for name, coefficient in coefficients.items() if coefficient}
        if kept or abs(constant) > NEAR:
            self.equations.append(Equation(kept, constant if abs(constant) > NEAR else 0.0, where))

    # -- the operator's result ----------------------------------------------------------------------------------

    def _made(
        self, result: Any, out: Value, inputs: Sequence[Value], step: Step | None, name: str, given: Sequence[Any]
    ) -> None:
        """Note the values of an operator's results: as the operator implies them, corrected by what is measured."""
        active = any(value.active for value in inputs)
        stored = bool(inputs) and not active and any(value.stored for value in inputs)
        broken = next((value.broken for value in inputs if value.broken is not None), None)
        outputs = tensors_of(result)
        # An operator that works in place may return a view of its operand: what changed is the operand itself.
        if _works_in_place(name) and given and outputs and outputs[0] is not given[0]:
            outputs = [given[0], *outputs[1:]]
        for number, tensor in enumerate(outputs):
            value = Value(dict(out.coefficients), out.constant, out.ran, active, stored, leaf=out.leaf, broken=broken)
            if name in UNWRITTEN:
                value.zero = value.unwritten = True
            elif name in PARTS and inputs[0].unwritten:
                value.zero, value.unwritten = inputs[0].zero, True
            elif tensor.is_floating_point():
                expected = step.outputs[number] if step is not None and number < len(step.outputs) else None
                self._measure(value, tensor, expected, name)
            self.values[id(tensor)] = value
            self.alive.append(tensor)
            if name == "copy_" and tensor._base is not None:
                self._wrote(tensor._base, tensor)

    def _wrote(self, whole: Any, part: Any) -> None:
        """Note that the first part of a tensor was written. Parts that are written later must have its scale."""
        before, value = self.values.get(id(whole)), self.values[id(part)]
        if before is not None and before.unwritten and before.zero:
            self.values[id(whole)] = replace(value, unwritten=True)

    def _measure(self, value: Value, tensor: Any, theirs: Signature | None, name: str) -> None:
        if value.broken is not None:
            return
        measured = self._measured(tensor, theirs)
        if measured is None:
            value.zero = not value.stored and bool((tensor == 0).all())
            return
        if isinstance(measured, float):
            value.constant += measured - value.ran
            value.ran = measured
            if not value.active and not value.stored:
                value.coefficients = {}
        elif not value.stored:
            value.broken = self._explanation(self._where(name), tensor, theirs)

    def _measured(self, tensor: Any, theirs: Signature | None) -> float | str | None:
        """The logarithm of a tensor's scale, from its signature and that of the source's tensor.

        None means that there is no scale to measure (zeros, or a signature is missing). "" means that the tensor does
        not repeat the source's at any scale.
        """
        repeated = signature(tensor)
        if repeated is None or theirs is None:
            return None
        a, b = theirs.values, repeated.values
        if repeated.size % theirs.size:  # repeats are unequal in number: only the extremes are comparable
            a, b = a[:2], b[:2]
        elif not np.allclose(theirs.infinite, repeated.infinite, rtol=0.0, atol=1e-9):
            return ""
        power = float(np.dot(a, a))
        if not power:
            return None if not np.any(b) else ""
        scale = float(np.dot(a, b)) / power
        if scale <= 0.0 or np.abs(b - scale * a).max() > NEAR * scale * np.abs(a).max():
            return ""
        log = math.log(scale)
        return 0.0 if abs(log) < NEAR else self.grid(log)

    def _where(self, name: str) -> str:
        return f"what {name} makes in {self.where[-1] if self.where else 'the model'}"

    def _explanation(self, where: str, tensor: Any, theirs: Signature | None) -> DerivedNumbers:
        """The message for a tensor that does not repeat the source's: where it is, and a number that differs."""
        repeated = signature(tensor)
        shown = ""
        if repeated is not None and theirs is not None:
            pairs = [(a, b) for a, b in zip(theirs.values, repeated.values, strict=True) if abs(a - b) > NEAR * abs(a)]
            if pairs:
                shown = f" ({pairs[0][0]:.4g} becomes {pairs[0][1]:.4g})"
        return DerivedNumbers(
            f"the model derives numbers from its sizes that are no repetition of the source's: {where}{shown}",
            tuple(tensor.shape),
        )


def _copied(value: Value, keep_leaf: bool = False) -> Value:
    """The value of a result that has its operand's scale."""
    return Value(
        dict(value.coefficients), value.constant, value.ran, zero=value.zero, leaf=value.leaf if keep_leaf else None
    )


def _combined(values: Sequence[Value], powers: Sequence[float]) -> Value:
    """The value of a product of powers."""
    out = Value()
    for value, power in zip(values, powers, strict=False):
        for name, coefficient in value.coefficients.items():
            out.coefficients[name] = out.coefficients.get(name, 0.0) + coefficient * power
        out.constant += value.constant * power
        out.ran += value.ran * power
    return out


def _number(args: Sequence[Any]) -> Any:
    """The number among the operands of a sum."""
    return next((operand for operand in args[:2] if isinstance(operand, int | float)), None)


def _harmless(args: Sequence[Any]) -> bool:
    """Whether the number that a mask writes means the same at every scale: zero, or a stand-in for infinity."""
    number = args[-1]
    return isinstance(number, int | float) and (number == 0 or abs(number) >= HUGE or math.isinf(number))


def _works_in_place(name: str) -> bool:
    """Whether an operator writes its result into its first operand, as ``add_`` does."""
    return name.endswith("_") and not name.startswith("_")


def _scaled(args: Sequence[Any], factors: Mapping[int, float]) -> list[Any]:
    """An operator's arguments with some tensors multiplied, in nested lists too."""

    def scale(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor) and id(argument) in factors:
            return argument * factors[id(argument)]
        if isinstance(argument, list | tuple):
            return [scale(inner) for inner in argument]
        return argument

    return [scale(argument) for argument in args]
