"""Record what a model computes, operator by operator.

A `Recorder` sees every operator that PyTorch runs, whatever the model's code looks like. `record` keeps a signature of
each result: we sort the elements and take those at fixed ranks. If one tensor repeats all elements of another equally
often, the two signatures are equal, whatever the order of the repeats. If it repeats them scaled, the signatures are in
proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Array = npt.NDArray[Any]

RANKS = 64
"""The number of ranks in a signature, besides the smallest and the largest element."""

LARGEST = 1 << 24
"""The most elements of a tensor that we sort. Larger tensors, such as transposed embeddings, get no signature."""

HUGE = 1e30
"""Absolute values from here on count as infinite: masks write such numbers for minus infinity."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Signature:
    """A floating tensor's elements at fixed ranks."""

    values: Array
    """The smallest element, the elements at `RANKS` ranks in ascending order, and the largest element."""
    size: int
    """The number of the tensor's elements."""


def signature(tensor: Any) -> Signature | None:
    """The signature of a tensor; None for one that is not floating, is empty, or has more than `LARGEST` elements."""
    if not tensor.is_floating_point() or tensor.is_meta or not 0 < tensor.numel() <= LARGEST:
        return None
    ordered = tensor.detach().reshape(-1).double().sort().values
    ranks = ((torch.arange(RANKS) + 0.5) / RANKS * tensor.numel()).floor().long()
    picked = ordered[torch.cat([torch.tensor([0]), ranks, torch.tensor([tensor.numel() - 1])])]
    return Signature(picked.numpy(), tensor.numel())


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


def record(model: Any, feeds: dict[str, Any]) -> tuple[list[Step], dict[str, Any]]:
    """Run a model and record it.

    Args:
        model: the model in PyTorch.
        feeds: its inputs by name.

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
                leaves[position] = signature(tensor)
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
                [signature(output) for output in outputs],
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
