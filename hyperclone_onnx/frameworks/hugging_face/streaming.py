"""Models of transformers whose weights stay in their files.

A parameter of such a model has its shape and type, but no memory: it is one NaN, seen as often as it has elements. When
an operator takes the parameter, the numbers are read from the file in float32 for this one operator, and forgotten. So
a model with any number of layers runs in the memory of its largest tensor. If an operator got no numbers, its result
would be NaN, and the run would end with an error.

The forward pass is the one of transformers, whole and unchanged. Nothing is assumed about the layers of a model.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hyperclone_onnx.errors import BadModel, Refused, in_bytes
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, Loaded
from hyperclone_onnx.frameworks.hugging_face.configuration import built
from hyperclone_onnx.frameworks.hugging_face.recording import run_model
from hyperclone_onnx.system.memory import free_memory

Array = npt.NDArray[Any]

aten = torch.ops.aten


class TooLarge(Refused):
    """The memory that is free does not suffice."""


def open_model(checkpoint: Checkpoint) -> Loaded:
    """The model of a checkpoint in float32. Its weights stay in their files if that is possible.

    It is possible if the files have the names and shapes of the model's tensors. Where transformers changes names or
    joins tensors while it loads, the whole model is loaded into memory.

    Args:
        checkpoint: the checkpoint.

    Raises:
        BadModel: the weights cannot be read, or do not fit the configuration.
    """
    stored = checkpoint.stored
    model = _hollow(checkpoint)
    names = _names(model)
    places = {first: next((name for name in aliases if name in stored), None) for first, aliases in names.items()}
    missing = frozenset(first for first, place in places.items() if place is None)
    known = {name for aliases in names.values() for name in aliases}
    if missing and any(name not in known for name in stored):
        need_memory(checkpoint, "transformers changes its tensors while it loads all of them", float_bytes(model))
        return checkpoint.load()
    kept = {first: stored[place] for first, place in places.items() if place is not None}
    state = model.state_dict(keep_vars=True)
    for name, array in kept.items():
        if tuple(state[name].shape) != array.shape:
            raise BadModel(
                f"{checkpoint.folder}: weights and configuration do not fit together: {name} has the shape "
                f"{list(array.shape)}, and the model needs {list(state[name].shape)}"
            )
    readers: dict[int, Callable[[], Array]] = {}
    with torch.no_grad():
        for name, tensor in dict(model.named_parameters()).items():
            readers[id(tensor)] = kept[name].read if name in kept else functools.partial(_zeros, tuple(tensor.shape))
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(in_float(kept[name]()))
            elif name in missing:
                buffer.zero_()
    _let_read(model, readers)
    return Loaded(model, missing, kept, readers)


def float_bytes(model: Any) -> int:
    """The bytes of the parameters of a model in float32."""
    return 4 * sum(int(parameter.numel()) for parameter in model.parameters())


def need_memory(checkpoint: Checkpoint, why: str, needed: float) -> None:
    """Check that a whole model fits in free memory, before the long work begins.

    Args:
        checkpoint: the checkpoint, for the message.
        why: what needs the memory.
        needed: the number of bytes.

    Raises:
        TooLarge: it does not fit.
    """
    free = free_memory()
    if free is not None and needed > free:
        raise TooLarge(
            f"{checkpoint.folder}: {why}, which needs {in_bytes(round(needed))} of memory (float32), and "
            f"{in_bytes(free)} are free: stop other programs, or use a machine with more memory"
        )


def _zeros(shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, np.float32)


def _names(model: Any) -> dict[str, list[str]]:
    """All names of each stored tensor of a model, by the first of them."""
    state = model.state_dict(keep_vars=True)
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in state}
    by_tensor: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named.items():
        by_tensor[id(tensor)].append(name)
    return {names[0]: names for names in by_tensor.values()}


def _hollow(checkpoint: Checkpoint) -> Any:
    """The model of a configuration in float32, whose parameters have no memory. Its buffers have their values."""
    with _without_memory():
        model = built(checkpoint, ())
    hollow: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in hollow:
                    nothing = torch.full((1,) * parameter.ndim, torch.nan, dtype=torch.float32)
                    hollow[id(parameter)] = torch.nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = hollow[id(parameter)]
    return model.float()


@contextmanager
def _without_memory() -> Iterator[None]:
    """Let new modules have parameters without memory: they get their places on the device ``meta``."""
    register = torch.nn.Module.register_parameter

    def registered(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = registered
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _let_read(model: Any, readers: Mapping[int, Callable[[], Array]]) -> None:
    """Let the forward pass of a model read its parameters.

    Args:
        model: the model.
        readers: by the ``id`` of a parameter, a function that reads its numbers.
    """
    forward = model.forward

    @functools.wraps(forward)
    def reading(*args: Any, **kwargs: Any) -> Any:
        with _Reading(readers):
            result = forward(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() and bool(tensor.isnan().all()):
                raise RuntimeError("an output of the model has no number at all")
        return result

    model.forward = reading


class _Reading(TorchDispatchMode):  # type: ignore[misc]
    """Gives each operator within the ``with`` block the numbers of the parameters that it takes."""

    def __init__(self, readers: Mapping[int, Callable[[], Array]]) -> None:
        super().__init__()
        self.readers = readers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for each operator: see ``torch.utils._python_dispatch``."""
        if func is aten.embedding.default and id(args[0]) in self.readers:
            table = self.readers[id(args[0])]()
            rows, places = np.unique(args[1].numpy(), return_inverse=True)
            return func(in_float(table[rows]), torch.from_numpy(places.reshape(args[1].shape)))
        args, kwargs = tree_map_only(torch.Tensor, self._filled, (list(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _filled(self, tensor: Any) -> Any:
        read = self.readers.get(id(tensor))
        return tensor if read is None else in_float(read())


def as_tensor(array: Array) -> Any:
    """An array as a tensor of PyTorch of the same type."""
    plain = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(plain)


def in_float(array: Array) -> Any:
    """An array as a tensor of PyTorch; floating numbers in float32."""
    tensor = as_tensor(array)
    return tensor.float() if tensor.is_floating_point() else tensor


def layer_outputs(model: Any, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """The output of each layer of a model, by the layer's name, in the order in which the layers finish.

    The layers are the entries of the outermost lists of modules. A layer that gives no floating tensor is left out.

    Args:
        model: the model.
        feeds: its inputs, as tensors.
    """
    got: dict[str, Array] = {}

    def note(name: str, _: Any, __: Any, result: Any) -> None:
        first = next((one for one in tree_leaves(result) if isinstance(one, torch.Tensor)), None)
        if first is not None and first.is_floating_point():
            got[name] = first.numpy().copy()

    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and not inside:
            lists.append(name)
    hooks = [
        layer.register_forward_hook(functools.partial(note, f"{name}.{number}"))
        for name in lists
        for number, layer in enumerate(model.get_submodule(name))
    ]
    try:
        run_model(model, dict(feeds))
    finally:
        for hook in hooks:
            hook.remove()
    return got
