"""A model file as a torch.nn.Module: ``model = load("big.onnx")``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.application import bind
from hyperclone_onnx.frameworks.compiling.blocks import block_paths
from hyperclone_onnx.frameworks.compiling.program import Body, Program, Weight
from hyperclone_onnx.frameworks.compiling.source import compiled, function_source
from hyperclone_onnx.frameworks.slices import blocks, read_slice, shifted
from hyperclone_onnx.plan.plans import Plan

try:
    import torch

    from hyperclone_onnx.frameworks.compiling import fast_torch as _fast  # noqa: F401 - importing it fills the table
    from hyperclone_onnx.frameworks.compiling.namespaces import torch as namespace
except ImportError as problem:
    raise MissingExtra("torch", problem) from problem


def load(
    model: PathLike | ir.Model,
    *,
    plan: Plan | PathLike | None = None,
    shard: Any = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    device: Any = None,
) -> OnnxModule:
    """A model file (or an onnx_ir model) as an ordinary module.

    Its parameters have their initializers' names, the dots as submodules; layers that repeat are submodules of the
    class `Block`. It takes the graph's inputs by position or by name, and returns the one output, or a dict of them.

    Args:
        model: the file.
        plan: grow the model while it is loaded: `model` is then the small file, and each tensor is computed from it
            where it is needed. A `Plan`, or the JSON file that ``expand --plan-out`` wrote.
        shard: load only this rank's part of each parameter (FSDP2): a `DeviceMesh`, over which each `Block` and then
            the whole are `fully_shard`ed, or a function that does so in its own way to the module, whose parameters
            are on the meta device at that time.
        freeze: globs of initializer names that are not to be trained (``requires_grad`` is False).
        train: globs of initializer names that are to be trained, whatever their place in the graph says.
        device: where to put parameters and buffers; with a mesh, by default, its own kind of device. On "meta"
            nothing is read until `OnnxModule.materialize` is called.

    Raises:
        BadModel: the file (or the plan) is not readable and complete.
        BadRequest: a glob matches nothing, or the plan is for another model.
        Refused: an operator, or a form of one, is not covered, or a parameter is sharded in a way that is not known.
    """
    compiled_model = compile_model(model, plan=plan, freeze=freeze, train=train)
    if shard is None:
        module = OnnxModule(compiled_model)
        return module if _is_meta(device) else module.materialize(device)
    if _is_meta(device):
        raise BadRequest(
            "shard= reads each rank's part at once; on the meta device there is none: leave one of both out"
        )
    module = OnnxModule(compiled_model)
    if callable(shard):
        shard(module)
    else:
        fully_shard_blocks(module, shard)
        device = _device_of(shard) if device is None else device
    return module.materialize(device)


def fully_shard_blocks(module: OnnxModule, mesh: Any, **options: Any) -> OnnxModule:
    """FSDP2 on each of a module's blocks and then on the module; `options` are `fully_shard`'s.

    Args:
        module: best on the meta device.
        mesh: a `DeviceMesh`, over whose (first) dimension parameters are sharded.
        options: such as ``mp_policy`` and ``reshard_after_forward``.
    """
    from torch.distributed.fsdp import fully_shard

    for each in module.modules():
        if isinstance(each, Block):
            fully_shard(each, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    return module


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _device_of(mesh: Any) -> Any:
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


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
    """A whole graph, on the meta device until it is materialized; see `load`."""

    def __init__(self, model: CompiledModel) -> None:
        super().__init__()
        self.program: Program = model.program
        self._stored: dict[str, ir.TensorProtocol] | None = model.tensors
        self._add_blocks()
        for weight in self.program.weights:
            parent, leaf = self._parent(weight.path)
            data = torch.empty(weight.shape, dtype=namespace.dtype_of(weight.element_type), device="meta")
            if weight.role == "constant":
                parent.register_buffer(leaf, data, persistent=False)
            else:
                parent.register_parameter(leaf, torch.nn.Parameter(data, requires_grad=weight.role == "trainable"))
        self._compile()

    def materialize(self, device: Any = None) -> OnnxModule:
        """Give parameters and buffers memory and read them; of a sharded parameter only this rank's part is read.

        Args:
            device: the CPU by default.

        Raises:
            BadRequest: it has been materialized already.
            Refused: a parameter is sharded in a way that is not known.
        """
        if self._stored is None:
            raise BadRequest("this module has been materialized already, or is a copy: load the file again")
        for name, parameter in self.named_parameters():
            _check_placements(name, parameter)
        self.to_empty(device=device or "cpu")
        for weight in self.program.weights:
            with torch.no_grad():
                _fill(self._tensor(weight), self._stored[weight.initializer])
        self._stored = None
        return self

    def _tensor(self, weight: Weight) -> Any:
        parent, leaf = self._parent(weight.path)
        return getattr(parent, leaf)

    @property
    def initializers(self) -> dict[str, str]:
        """The ONNX initializer of each parameter."""
        return {each.path: each.initializer for each in self.program.weights if each.role != "constant"}

    def _add_blocks(self) -> None:
        lists: dict[str, dict[int, Block]] = defaultdict(dict)
        for path, number in block_paths(self.program):
            parent, _, index = path.rpartition(".")
            lists[parent][int(index)] = Block(self.program.blocks[number], path)
        for path, layers in lists.items():
            parent, leaf = self._parent(path)
            parent.add_module(leaf, torch.nn.ModuleList(layers[i] for i in sorted(layers)))

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
        return {name: value for name, value in self.__dict__.items() if name != "_function"} | {"_stored": None}

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


def _check_placements(name: str, parameter: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for placement in parameter.placements if isinstance(parameter, DTensor) else ():
        if type(placement) not in (Replicate, Shard):
            raise Refused(
                f"the parameter {name!r} is placed as {placement}: only Shard and Replicate are read in parts"
            )


def _fill(target: Any, stored: ir.TensorProtocol) -> None:
    """Read a tensor, or this rank's part of it, into its place, block by block."""
    offsets, local = (0,) * target.dim(), target
    if hasattr(target, "__create_chunk_list__"):  # what torch.distributed.checkpoint asks of a DTensor
        (chunk,) = target.__create_chunk_list__()
        offsets, local = tuple(chunk.offsets), target.to_local()
    for windows in blocks(tuple(local.shape), local.element_size()):
        local[windows].copy_(as_torch(read_slice(stored, shifted(windows, offsets))))


def as_torch(array: Any) -> Any:
    """A NumPy array as a tensor, of the same memory where that may be written."""
    array = array if array.flags.writeable else array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
