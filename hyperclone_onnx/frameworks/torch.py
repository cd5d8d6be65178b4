"""A model file as a torch.nn.Module: ``model = load("big.onnx")``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.blocks import block_paths
from hyperclone_onnx.frameworks.handoff import Handoff, PathLike, bind, read
from hyperclone_onnx.frameworks.program import Body, Program
from hyperclone_onnx.frameworks.source import compiled, function_source

try:
    import torch

    from hyperclone_onnx.frameworks import fast_torch as _fast  # noqa: F401 - importing it fills the table
    from hyperclone_onnx.frameworks.namespaces import torch as namespace
except ImportError as problem:
    raise MissingExtra("torch", problem) from problem


def load(
    model: PathLike | Any,
    *,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    device: Any = None,
) -> OnnxModule:
    """A model file (or an onnx_ir model) as an ordinary module.

    Its parameters have their initializers' names, the dots as submodules; layers that repeat are submodules of the
    class `Block`. It takes the graph's inputs by position or by name, and returns the one output, or a dict of them.

    Args:
        model: the file.
        freeze: globs of initializer names that are not to be trained (``requires_grad`` is False).
        train: globs of initializer names that are to be trained, whatever their place in the graph says.
        device: where to put parameters and buffers.

    Raises:
        BadModel: the file is not a readable, complete ONNX model.
        BadRequest: a glob matches nothing.
        Refused: an operator, or a form of one, is not covered.
    """
    return OnnxModule(read(model, freeze=freeze, train=train), device)


class Block(torch.nn.Module):
    """One of a model's repeated layers. It takes and returns tuples of activations (and sizes)."""

    def __init__(self, body: Body, path: str) -> None:
        super().__init__()
        self.body = body
        self.path = path
        self._compile()

    def _compile(self) -> None:
        self.code = function_source("block", "self", self.body, _attribute, _attribute)
        self._function = compiled(self.code, "torch")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def forward(self, *inputs: Any) -> Any:
        """The layer's outputs, in a tuple."""
        return self._function(self, *inputs)


class Folder(torch.nn.Module):
    """A level of names."""

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(index))


class OnnxModule(torch.nn.Module):
    """A whole graph; see `load`."""

    def __init__(self, handoff: Handoff, device: Any = None) -> None:
        super().__init__()
        self.program: Program = handoff.program
        self._add_blocks()
        for weight in self.program.weights:
            parent, leaf = self._parent(weight.path)
            data = tensor_from(handoff.tensors[weight.initializer], device)
            if weight.role == "constant":
                parent.register_buffer(leaf, data, persistent=False)
            else:
                parent.register_parameter(leaf, torch.nn.Parameter(data, requires_grad=weight.role == "trainable"))
        self._compile()

    @property
    def initializers(self) -> dict[str, str]:
        """The ONNX initializer of each parameter."""
        return {each.path: each.initializer for each in self.program.weights if each.role != "constant"}

    def _add_blocks(self) -> None:
        lists: dict[str, dict[int, Block]] = defaultdict(dict)
        for path, number in block_paths(self.program):
            parent, _, index = path.rpartition(".")
            lists[parent][int(index)] = Block(self.program.blocks[number], path)
        for path, blocks in lists.items():
            parent, leaf = self._parent(path)
            parent.add_module(leaf, torch.nn.ModuleList(blocks[i] for i in sorted(blocks)))

    def _parent(self, path: str) -> tuple[torch.nn.Module, str]:
        *folders, leaf = path.split(".")
        module: torch.nn.Module = self
        for name in folders:
            if name not in module._modules:
                module.add_module(name, Folder())
            module = module._modules[name]
        return module, leaf

    def _compile(self) -> None:
        self.code = function_source("forward", "self", self.program.body, _attribute, _attribute)
        self._function = compiled(self.code, "torch")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The graph's one output, or a dict of its outputs by name."""
        given = bind(self.program, inputs, named)
        given = [
            namespace.numbers(value) if each.host and isinstance(value, torch.Tensor) else value
            for each, value in zip(self.program.inputs, given, strict=True)
        ]
        values = self._function(self, *given)
        names = self.program.outputs
        return values[0] if len(names) == 1 else dict(zip(names, values, strict=True))


def _attribute(path: str) -> str:
    """How the source reads a stored tensor."""
    return "self" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def tensor_from(tensor: Any, device: Any = None) -> Any:
    """A stored tensor as torch has it, in memory of its own."""
    array = tensor.numpy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)
