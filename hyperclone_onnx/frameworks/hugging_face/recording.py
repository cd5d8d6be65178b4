"""What a model computes, operator by operator, and what of it a comparison needs to remember.

A `Recorder` sees every operator that PyTorch runs, whatever the model's code looks like. Of each result it keeps a
signature: its elements in order of size, at fixed ranks. Where a tensor repeats another's elements equally often, the
two signatures are the same, whatever the order of the repeats; where it repeats them scaled, they are in proportion.
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
LARGEST = 1 << 24
"""Elements; larger tensors (embeddings turned over) are not sorted."""

HUGE = 1e30
"""What masks write for minus infinity."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Signature:
    """A floating tensor's elements at fixed ranks, the smallest and the largest included; its number of elements."""

    values: Array
    size: int


def signature(tensor: Any) -> Signature | None:
    """The signature of a floating tensor; None of an empty or a very large one."""
    if not tensor.is_floating_point() or tensor.is_meta or not 0 < tensor.numel() <= LARGEST:
        return None
    ordered = tensor.detach().reshape(-1).double().sort().values
    ranks = ((torch.arange(RANKS) + 0.5) / RANKS * tensor.numel()).floor().long()
    picked = ordered[torch.cat([torch.tensor([0]), ranks, torch.tensor([tensor.numel() - 1])])]
    return Signature(picked.numpy(), tensor.numel())


@dataclass
class Step:
    """One operator as it ran: its name, what it made, and what it read that no operator made."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    outputs: list[Signature | None]
    leaves: dict[int, Signature | None] = field(default_factory=dict)
    """By the position among the operator's tensors: parameters, buffers and constants at their first use."""


TRANSPARENT = frozenset(("detach", "alias", "lift_fresh"))
"""What PyTorch puts in between as it likes: the same tensor once more, no step."""

Handler = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


class Recorder(TorchDispatchMode):
    """Runs `handler` for each operator, the fused ones taken apart into what adds and what multiplies."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch.utils._python_dispatch."""
        return self._run(func, list(args), dict(kwargs or {}))

    def _run(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
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
                made = run(func, [*args[:2], None, *args[3:]], kwargs)
                bias = run(aten.view.default, [args[2], [-1] + [1] * (made.ndim - 2)], {})
                return run(aten.add.Tensor, [made, bias], {})
            case aten.native_layer_norm.default if args[2] is not None or args[3] is not None:
                made, *rest = run(func, [args[0], args[1], None, None, args[4]], {})
                if args[2] is not None:
                    made = run(aten.mul.Tensor, [made, args[2]], {})
                if args[3] is not None:
                    made = run(aten.add.Tensor, [made, args[3]], {})
                return (made, *rest)
        return self.handler(func, args, kwargs)


def tensors_of(args: Any, kwargs: Any = None) -> list[Any]:
    """The tensors among an operator's arguments, in order."""
    return [each for each in tree_flatten((args, kwargs or {}))[0] if isinstance(each, torch.Tensor)]


def operator_name(func: Any) -> str:
    """The operator without its overload."""
    return str(func.overloadpacket.__name__)


def record(model: Any, feeds: dict[str, Any]) -> tuple[list[Step], dict[str, Any]]:
    """Run a model and record it: its steps, and its floating outputs by name."""
    steps: list[Step] = []
    alive: list[Any] = []
    made: set[int] = set()

    def handler(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        leaves = {}
        if operator_name(func) in TRANSPARENT:
            result = func(*args, **kwargs)
            alive.append(result)
            made.update({id(result)} if id(args[0]) in made else ())
            return result
        for position, tensor in enumerate(tensors_of(args, kwargs)):
            if id(tensor) not in made:
                leaves[position] = signature(tensor)
                made.add(id(tensor))
                alive.append(tensor)
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        alive.extend(outputs)
        made.update(map(id, outputs))
        steps.append(
            Step(
                operator_name(func),
                tuple(tuple(each.shape) for each in outputs),
                [signature(t) for t in outputs],
                leaves,
            )
        )
        return result

    with torch.no_grad(), Recorder(handler):
        result = run_model(model, feeds)
    return steps, floating_outputs(result)


def run_model(model: Any, feeds: dict[str, Any]) -> Any:
    """A forward pass without a cache."""
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    with torch.no_grad():
        try:
            return model(**feeds, **options, return_dict=True)
        except TypeError:
            return model(**feeds)


def floating_outputs(result: Any) -> dict[str, Any]:
    """The floating tensors that a model returns, by name."""
    items = result.items() if hasattr(result, "items") else enumerate(result)
    return {str(name): each for name, each in items if isinstance(each, torch.Tensor) and each.is_floating_point()}
