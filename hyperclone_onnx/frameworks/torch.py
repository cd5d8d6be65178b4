"""Load a model file as a torch.nn.Module: ``model = load("big.onnx")``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.application import bind
from hyperclone_onnx.frameworks.compiling.blocks import block_paths
from hyperclone_onnx.frameworks.compiling.program import Body, Program, Weight
from hyperclone_onnx.frameworks.compiling.source import compiled, function_source
from hyperclone_onnx.frameworks.distillation import AnyTeacher, find_teacher
from hyperclone_onnx.frameworks.pairing import Pairing
from hyperclone_onnx.frameworks.slices import blocks, read_slice, shifted
from hyperclone_onnx.frameworks.sub_models import compile_sub_models
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
    router_logits: bool = False,
    values: Sequence[str] = (),
) -> OnnxModule:
    """Load a model file (or an onnx_ir model) as an ordinary module.

    The names of the parameters are the initializers' names; a dot in a name separates submodules. Repeated layers are
    submodules of the class `Block`. The module takes the graph's inputs by position or by name. It returns the output,
    or a dict of outputs by name if the graph has several.

    Args:
        model: path of the ONNX file, or the model.
        plan: grow the model while loading it. `model` is then the small file, and each grown tensor is computed when it
            is read. A `Plan`, or the path of the JSON file that ``expand --plan-out`` wrote.
        shard: load only this rank's part of each parameter (FSDP2). Give a `DeviceMesh`: `fully_shard` is then called
            on each `Block` and then on the whole module. Or give a function that takes the module, whose parameters
            are still on the meta device, and shards it.
        freeze: globs of initializer names; the matching tensors are not trained (``requires_grad`` is False).
        train: globs of initializer names; the matching tensors are trained, even where the graph's structure says that
            they are constants.
        device: where to put parameters and buffers. The default is the CPU or, with a mesh, a device of the mesh's
            type. On "meta" no tensor is read until `OnnxModule.materialize` is called.
        router_logits: also return the scores of the routers of mixtures of experts, for a loss that balances the load.
        values: also return these values inside the graph, by name, for a loss on hidden values (see `load_teacher`).

    Raises:
        BadModel: the file (or the plan) cannot be read, or is incomplete.
        BadRequest: a glob matches no tensor, the plan is for another model, or `shard` is combined with the device
            "meta".
        Refused: the model has an operator, or a form of an operator, that is not supported; or a parameter is sharded
            with a placement that is neither Shard nor Replicate.
    """
    compiled_model = compile_model(
        model, plan=plan, freeze=freeze, train=train, router_logits=router_logits, values=values
    )
    if shard is None:
        module = OnnxModule(compiled_model)
        return module if _is_meta(device) else module.materialize(device)
    if _is_meta(device):
        raise BadRequest(
            "shard= reads each rank's part at once, but the meta device has no values: leave out shard= or device="
        )
    module = OnnxModule(compiled_model)
    if callable(shard):
        shard(module)
    else:
        fully_shard_blocks(module, shard)
        device = _device_of(shard) if device is None else device
    return module.materialize(device)


@dataclass(frozen=True)
class SubModel:
    """The bottom layers of a model with its head, for the first stage of bert2BERT (see `frameworks.sub_models`).

    Args:
        layers: the number of its layers.
        module: the module. Its parameters are those of the whole model.
        updated: the parameters that a step updates, by their path: the top layers and the head.
    """

    layers: int
    module: OnnxModule
    updated: Mapping[str, torch.nn.Parameter]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the sub-model, as the whole model is run."""
        return self.module(*inputs, **named)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of the updated parameters alone. An optimizer leaves parameters without one alone."""
        loss.backward(inputs=list(self.updated.values()))


def sub_models(
    whole: OnnxModule,
    model: PathLike,
    layers: Sequence[int] | None = None,
    *,
    every: int | None = None,
    plan: Plan | PathLike | None = None,
    stack: str | None = None,
) -> list[SubModel]:
    """The sub-models of a loaded model, whose bottom layers they are, for the first stage of bert2BERT.

    The paper (Chen et al., arXiv 2110.07143, "Two-stage Pre-training" and Algorithm 1) chooses one at random in each
    step, and updates its top layers and the head. Then it trains the whole model. One step of the first stage::

        part = random.choice(parts)
        optimizer.zero_grad()
        part.backward(loss_of(part(ids)))
        optimizer.step()

    Args:
        whole: what `load` gave for the same file. It is materialized, and not sharded.
        model: path of the ONNX file. With a plan: the file of the small model that the plan grows.
        layers: the number of layers of each sub-model, e.g. ``[3, 6, 9, 12]``.
        every: in the place of `layers`: one sub-model for each so many layers.
        plan: the plan that was given to `load`.
        stack: the name of the stack of layers, where the graph has several (an encoder and a decoder).

    Raises:
        BadRequest: the graph has no layers, or not those that were asked for; or `whole` is another model.
    """
    known = {weight.initializer: whole._tensor(weight) for weight in whole.program.weights}
    result = []
    for part in compile_sub_models(model, layers, every=every, plan=plan, stack=stack):
        module = OnnxModule(part.compiled)
        module._share(known)
        updated = {
            weight.path: known[weight.initializer]
            for weight in module.program.weights
            if weight.initializer in part.updated and known[weight.initializer].requires_grad
        }
        result.append(SubModel(part.layers, module, updated))
    return result


class Teacher(AnyTeacher):
    """A large model that gives a student its targets. Its parameters are not trained. `load_teacher` makes one.

    Args:
        module: the module. It also gives the hidden values that are compared.
        pairing: what is compared.
    """

    def __init__(self, module: OnnxModule, pairing: Pairing) -> None:
        super().__init__(pairing, namespace)
        self.module = module

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, torch.Tensor]:
        """Run the teacher. Return what the student is compared with, by name, without a gradient."""
        with torch.no_grad():
            given = self.module(*inputs, **named)
        return self.module.program.by_name(given)


def load_teacher(
    teacher: PathLike | None = None, *, student: PathLike, shard: Any = None, device: Any = None
) -> Teacher:
    """Load a model as the teacher of a smaller (or larger) one.

    One step of distillation::

        targets = teacher(ids, mask)
        loss = teacher.loss(student(ids, mask), targets, hidden=1.0)

    Hidden values are compared if one of the two was made of the other by `shrink` or `expand`: the plan that one of
    them carries says which channels belong together.

    Args:
        teacher: path of the teacher's ONNX file. It may be left out if `student` is a folder that names it.
        student: path of the student's ONNX file, or the folder that ``handoff --teacher`` wrote for it.
        shard: as in `load`.
        device: as in `load`.

    Raises:
        BadModel: a file cannot be read, or is incomplete.
        BadRequest: the two models have nothing in common that could be compared, or the folder names no teacher.
        Refused: the teacher has an operator, or a form of an operator, that is not supported.
    """
    file, pairing = find_teacher(teacher, student)
    module = load(file, freeze=["*"], shard=shard, device=device, values=pairing.names("teacher"))
    return Teacher(module.eval(), pairing)


def fully_shard_blocks(module: OnnxModule, mesh: Any, **options: Any) -> OnnxModule:
    """Call FSDP2's `fully_shard` on each block of a module and then on the module.

    Args:
        module: the module to shard; put it on the meta device, so that no rank holds all its parameters.
        mesh: a `DeviceMesh`; parameters are sharded over its (first) dimension.
        options: further arguments of `fully_shard`, such as ``mp_policy`` and ``reshard_after_forward``.

    Returns:
        The module that was given.
    """
    from torch.distributed.fsdp import fully_shard

    for submodule in module.modules():
        if isinstance(submodule, Block):
            fully_shard(submodule, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    return module


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _device_of(mesh: Any) -> Any:
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


class Block(torch.nn.Module):
    """One of a model's repeated layers. It takes activations (and sizes) and returns a tuple of them."""

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
        """Return the layer's outputs as a tuple."""
        return self._function(self, *inputs)


class Folder(torch.nn.Module):
    """A submodule that only groups parameters: one level of their dotted names."""

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(index))


class OnnxModule(torch.nn.Module):
    """A whole graph as a module. Its parameters are on the meta device until `materialize` is called; see `load`."""

    def __init__(self, model: CompiledModel) -> None:
        super().__init__()
        self.program: Program = model.program
        self.continuations = model.continuations
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

    def materialize(self, device: Any = None, *, parameters: bool = True) -> OnnxModule:
        """Allocate parameters and buffers and read their values. For a sharded parameter, read only this rank's part.

        Args:
            device: where to allocate them; the CPU by default.
            parameters: whether to read the parameters too. A checkpoint may fill them instead.

        Returns:
            This module.

        Raises:
            BadRequest: the module was materialized before, or is a copy (a copy does not know its file).
            Refused: a parameter is sharded with a placement that is neither Shard nor Replicate.
        """
        if self._stored is None:
            raise BadRequest("this module has been materialized already, or is a copy: load the file again")
        for name, parameter in self.named_parameters():
            _check_placements(name, parameter)
        self.to_empty(device=device or "cpu")
        for weight in self.program.weights:
            if weight.role != "constant" and not parameters:
                continue
            with torch.no_grad():
                _fill(self._tensor(weight), self._stored[weight.initializer])
        self._stored = None
        return self

    def _share(self, known: Mapping[str, Any]) -> None:
        """Put parameters and buffers of another module in the place of this one's.

        Args:
            known: those of the other module, by initializer.

        Raises:
            BadRequest: the other module lacks a parameter, or has it in another shape.
        """
        assert self._stored is not None
        for weight in self.program.weights:
            parent, leaf = self._parent(weight.path)
            tensor = known.get(weight.initializer)
            if tensor is None and weight.role == "constant":
                stored = self._stored[weight.initializer]
                tensor = as_torch(read_slice(stored, tuple(slice(0, size) for size in weight.shape)))
            if tensor is None or tuple(tensor.shape) != weight.shape or tensor.is_meta:
                raise BadRequest(
                    f"{weight.initializer!r} of the file is no materialized parameter of the module: load the module "
                    "from the same file"
                )
            setattr(parent, leaf, tensor)
        self._stored = None

    def _tensor(self, weight: Weight) -> Any:
        parent, leaf = self._parent(weight.path)
        return getattr(parent, leaf)

    @property
    def initializers(self) -> dict[str, str]:
        """The name of the ONNX initializer of each parameter, by the parameter's path."""
        return {weight.path: weight.initializer for weight in self.program.weights if weight.role != "constant"}

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
        """Run the graph. Return its output, or a dict of outputs by name if it has several."""
        arguments = bind(self.program, inputs, named)
        arguments = [
            namespace.numbers(value) if graph_input.host and isinstance(value, torch.Tensor) else value
            for graph_input, value in zip(self.program.inputs, arguments, strict=True)
        ]
        values = self._function(self, *arguments)
        names = self.program.outputs
        return values[0] if len(names) == 1 else dict(zip(names, values, strict=True))


def _attribute(path: str) -> str:
    """Return the Python expression with which generated source reads a stored tensor."""
    return "self" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def _check_placements(name: str, parameter: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for placement in parameter.placements if isinstance(parameter, DTensor) else ():
        if type(placement) not in (Replicate, Shard):
            raise Refused(
                f"the parameter {name!r} is placed as {placement}: only Shard and Replicate are read in parts"
            )


def _fill(target: Any, stored: ir.TensorProtocol) -> None:
    """Read a stored tensor into `target` block by block; if `target` is sharded, read only this rank's part."""
    offsets, local = (0,) * target.dim(), target
    if hasattr(target, "__create_chunk_list__"):  # only a DTensor has it: it lists the local shards
        (chunk,) = target.__create_chunk_list__()
        offsets, local = tuple(chunk.offsets), target.to_local()
    for windows in blocks(tuple(local.shape), local.element_size()):
        local[windows].copy_(as_torch(read_slice(stored, shifted(windows, offsets))))


def as_torch(array: Any) -> Any:
    """Convert a NumPy array to a tensor. It shares the array's memory if that is writeable, and is a copy if not."""
    array = array if array.flags.writeable else array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
