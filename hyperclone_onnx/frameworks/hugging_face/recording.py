"""Record what a model computes, operator by operator.

A `Recorder` sees every operator that PyTorch runs, whatever the model's code looks like. `record` keeps a signature of
each result: the smallest element, the largest one, and means. If one tensor repeats all elements of another equally
often, the two signatures are equal, whatever the order of the repeats. If it repeats them scaled, the signatures are in
proportion. A signature takes one pass over the elements, which need not be sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Array = npt.NDArray[Any]

BLOCK = 1 << 18
"""The number of elements that are widened to float64 at a time."""

HUGE = 1e30
"""Absolute values from here on count as infinite: masks write such numbers for minus infinity."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Signature:
    """Numbers that depend on the elements of a floating tensor, not on their order, and that scale as they do.

    Infinite elements, and those that stand for infinity (see `HUGE`), are left out.
    """

    values: Array
    """The smallest element and the largest one; then, with M(p) for the mean of x^p: M(1), the mean of |x|, the root of
    M(2), M(3) / M(2), and the root of M(4) / M(2)."""
    size: int
    """The number of the tensor's elements."""
    infinite: tuple[float, float]
    """The parts of the elements that are left out, the negative ones and the others."""


def signature(tensor: Any) -> Signature | None:
    """The signature of a tensor; None for one that is not floating, or is empty."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return None
    flat = _elements(tensor.detach())
    low, high = math.inf, -math.inf
    sums = torch.zeros(5, dtype=torch.float64)
    negative = other = 0
    for start in range(0, flat.numel(), BLOCK):
        part = flat[start : start + BLOCK].double()
        usual = part.abs() < HUGE
        if not bool(usual.all()):
            below = int((part <= -HUGE).sum())
            negative, other = negative + below, other + int((~usual).sum()) - below
            part = part[usual]
        if part.numel():
            low, high = min(low, float(part.min())), max(high, float(part.max()))
            square = part * part
            sums += torch.stack([part.sum(), part.abs().sum(), square.sum(), square @ part, square @ square])
    count = flat.numel()
    used = count - negative - other
    if not used:
        return Signature(np.zeros(7), tensor.numel(), (negative / count, other / count))
    first, absolute, second, third, fourth = (float(number) / used for number in sums)
    values = [low, high, first, absolute, math.sqrt(second)]
    values += [third / second, math.sqrt(fourth / second)] if second else [0.0, 0.0]
    return Signature(np.asarray(values), tensor.numel(), (negative / count, other / count))


def _elements(tensor: Any) -> Any:
    """The elements of a tensor in any order, each as often as all others. A view of them where one can be had."""
    for axis in range(tensor.ndim):
        if tensor.stride(axis) == 0:
            tensor = tensor.narrow(axis, 0, 1)
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    return tensor.permute(order).reshape(-1)


@dataclass
class Step:
    """One operator as it ran: its name, its results, and those operands that no operator computed."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    outputs: list[Signature | None]
    leaves: dict[int, Signature | None] = field(default_factory=dict)
    """Parameters, buffers, constants and inputs at their first use, by position among the operator's tensors."""


TRANSPARENT = frozenset(("detach", "alias", "lift_fresh"))
"""Operators that return the same tensor once more. PyTorch inserts them at varying places, so they count as no step."""

Handler = Callable[[Any, Sequence[Any], dict[str, Any]], Any]
"""Runs one operator: the operator, its positional arguments and its keyword arguments -> its result."""


class Recorder(TorchDispatchMode):
    """Calls `handler` for each operator that runs inside the ``with`` block.

    Fused operators are split into products and sums, because scales behave differently in the two.
    """

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for each operator: see ``torch.utils._python_dispatch``."""
        return self._run(func, list(args), dict(kwargs or {}))

    def _run(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operator, or the operators into which it is split."""
        run = self._run
        match func:
            case aten.addmm.default if not kwargs:
                return run(aten.add.Tensor, [run(aten.mm.default, args[1:], {}), args[0]], {})
            case aten.baddbmm.default:
                product = run(aten.bmm.default, args[1:], {})
                if kwargs.get("alpha", 1) != 1:
                    product = run(aten.mul.Tensor, [product, kwargs["alpha"]], {})
                if kwargs.get("beta", 1) == 0:
                    return product
                added = args[0]
                if kwargs.get("beta", 1) != 1:
                    added = run(aten.mul.Tensor, [added, kwargs["beta"]], {})
                return run(aten.add.Tensor, [product, added], {})
            case aten.linear.default if len(args) > 2 and args[2] is not None:
                return run(aten.add.Tensor, [run(func, args[:2], {}), args[2]], {})
            case aten.convolution.default if args[2] is not None:
                convolved = run(func, [*args[:2], None, *args[3:]], kwargs)
                bias = run(aten.view.default, [args[2], [-1] + [1] * (convolved.ndim - 2)], {})
                return run(aten.add.Tensor, [convolved, bias], {})
            case aten.native_layer_norm.default if args[2] is not None or args[3] is not None:
                normalised, *rest = run(func, [args[0], args[1], None, None, args[4]], {})
                if args[2] is not None:
                    normalised = run(aten.mul.Tensor, [normalised, args[2]], {})
                if args[3] is not None:
                    normalised = run(aten.add.Tensor, [normalised, args[3]], {})
                return (normalised, *rest)
        return self.handler(func, args, kwargs)


def tensors_of(args: Any, kwargs: Any = None) -> list[Any]:
    """The tensors among an operator's arguments, in order."""
    return [leaf for leaf in tree_flatten((args, kwargs or {}))[0] if isinstance(leaf, torch.Tensor)]


def operator_name(func: Any) -> str:
    """An operator's name without its overload: ``add`` for ``aten.add.Tensor``."""
    return str(func.overloadpacket.__name__)


def record(
    model: Any, feeds: dict[str, Any], sign: Callable[[Any], Signature | None] = signature
) -> tuple[list[Step], dict[str, Any]]:
    """Run a model and record it.

    Args:
        model: the model in PyTorch.
        feeds: its inputs by name.
        sign: gives the signature of a tensor; a function that gives None saves the time where only shapes are wanted.

    Returns:
        The steps in the order in which they ran, and the floating outputs by name.
    """
    steps: list[Step] = []
    alive: list[Any] = []  # keeps every tensor, because the id of a deleted tensor may be given to another one
    seen: set[int] = set()

    def handler(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        leaves = {}
        if operator_name(func) in TRANSPARENT:
            result = func(*args, **kwargs)
            alive.append(result)
            seen.update({id(result)} if id(args[0]) in seen else ())
            return result
        for position, tensor in enumerate(tensors_of(args, kwargs)):
            if id(tensor) not in seen:
                leaves[position] = sign(tensor)
                seen.add(id(tensor))
                alive.append(tensor)
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        alive.extend(outputs)
        seen.update(map(id, outputs))
        steps.append(
            Step(
                operator_name(func),
                tuple(tuple(output.shape) for output in outputs),
                [sign(output) for output in outputs],
                leaves,
            )
        )
        return result

    with torch.no_grad(), Recorder(handler):
        result = run_model(model, feeds)
    return steps, floating_outputs(result)


def run_model(model: Any, feeds: dict[str, Any]) -> Any:
    """Run a model's forward pass without a cache, and return what the model returns."""
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    with torch.no_grad():
        try:
            return model(**feeds, **options, return_dict=True)
        except TypeError:
            return model(**feeds)


def floating_outputs(result: Any) -> dict[str, Any]:
    """The floating tensors that a model returns, by name."""
    items = result.items() if hasattr(result, "items") else enumerate(result)
    return {
        str(name): output for name, output in items if isinstance(output, torch.Tensor) and output.is_floating_point()
    }
