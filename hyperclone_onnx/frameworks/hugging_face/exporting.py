"""Export a Hugging Face checkpoint as an ONNX file.

In: a folder with config.json and safetensors. Out: an ONNX file in float32 of the model that config.json names, with
the inputs that this class takes: tokens, images or sound; and tokens for the decoder, where there is one.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from hyperclone_onnx.errors import Refused, one_line
from hyperclone_onnx.frameworks.hugging_face.checking import MappedRunner, relative_error
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, Loaded, quiet, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.configuration import built
from hyperclone_onnx.frameworks.hugging_face.recording import floating_outputs, run_model
from hyperclone_onnx.frameworks.hugging_face.repeating import with_all_layers
from hyperclone_onnx.frameworks.hugging_face.shortening import shortened
from hyperclone_onnx.frameworks.hugging_face.streaming import float_bytes, in_float, need_memory
from hyperclone_onnx.writing import onnx_files

BATCH, LENGTH, TARGET, PAST = 2, 6, 5, 3
"""The sizes of the example that is traced. The file takes any sizes along the axes that have a name."""

FOLDED = 128
"""The most elements of a constant that is computed at export. Weights are larger, and keep their names."""

STACKS = "do_not_emit_stack_traces"
"""The setting of torch.fx, in releases that have it, with which it records no tracebacks."""

FOR_TRACING = 2.5
"""The memory that tracing a whole model takes, in units of its size in float32."""

AGREED = 1e-3
"""The largest difference of a file that was made from few layers, relative to the largest element of an output."""


@dataclass(frozen=True)
class Input:
    """One input of the graph: its name, an example, and the names of the axes whose length is free."""

    name: str
    example: Any
    axes: dict[int, str]


@dataclass(frozen=True)
class Exported:
    """What was exported."""

    file: str
    inputs: dict[str, list[int | str]]
    """The shape of each input; free lengths by their name."""
    outputs: dict[str, list[int | str]]
    cache: bool
    """Whether the graph takes and gives the keys and values of earlier tokens."""


def export_model(checkpoint: Checkpoint, opened: Loaded, path: Path, cache: bool = False) -> Exported:
    """Export a model as an ONNX file in float32, with its weights beside it.

    If its layers are traced once and repeated, the weights go from file to file, one at a time. If all layers are
    traced, the whole model is loaded into memory.

    Args:
        checkpoint: the checkpoint.
        opened: its model in float32.
        path: the file to write.
        cache: whether the graph takes and gives a cache.

    Raises:
        Refused: PyTorch cannot export the model, or it has no cache of keys and values.
        CannotWrite: the file cannot be written.
    """
    inputs, outputs = _interface(checkpoint, opened.model, cache)
    proto = _from_few_layers(checkpoint, opened, path, inputs, outputs, cache)
    if proto is None:
        if opened.stored is not None:
            need_memory(checkpoint, "PyTorch must trace all its layers", FOR_TRACING * float_bytes(opened.model))
        model = opened.model if opened.stored is None else checkpoint.load().model
        flat = _Flat(model, [item.name for item in inputs], outputs)
        proto = _traced(checkpoint, flat, inputs, outputs)
        onnx_files.save(proto, path, external=True)
    return Exported(path.name, _shapes(proto.graph.inputs), _shapes(proto.graph.outputs), cache)


def _from_few_layers(
    checkpoint: Checkpoint, opened: Loaded, path: Path, inputs: Sequence[Input], outputs: Sequence[str], cache: bool
) -> ir.Model | None:
    """Write the same file, but trace two layers only. None where that does not give the model's outputs."""
    model = opened.model
    short = shortened(checkpoint, {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()})
    if short is None:
        return None
    small = built(short, ()).to(model.dtype)
    try:
        own, given = _interface(short, small, cache)
        proto = _traced(short, _Flat(small, [item.name for item in own], given), own, given)
    except (Refused, RuntimeError, ValueError, IndexError):  # a few layers may not run where the whole model does
        return None
    if not with_all_layers(proto, model, partial(_tensor, opened)):
        return None
    onnx_files.save(proto, path, external=True)
    wanted = [item.name for item in inputs], list(outputs)
    names = [value.name for value in proto.graph.inputs], [value.name for value in proto.graph.outputs]
    return proto if names == wanted and _agrees(path, model, inputs, outputs) else None


def _tensor(opened: Loaded, name: str, parameter: Any) -> ir.TensorProtocol:
    """A parameter of a model as a tensor of a graph. If it stays in its file, it is read when it is written."""
    if opened.stored is None:
        return TorchTensor(parameter.detach(), name=name)
    read = opened.reads[id(parameter)]

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.asarray(in_float(read()).numpy()), name=name)

    return ir.LazyTensor(made, dtype=ir.DataType.FLOAT, shape=ir.Shape(parameter.shape), name=name)


def _agrees(path: Path, model: Any, inputs: Sequence[Input], outputs: Sequence[str]) -> bool:
    """Whether a file computes in ONNX Runtime what the model computes."""
    with torch.no_grad():
        want = _Flat(model, [item.name for item in inputs], outputs)(*(item.example for item in inputs))
    try:
        got = MappedRunner(path).run({item.name: item.example.numpy() for item in inputs})
    except (Refused, RuntimeError):
        return False
    return all(relative_error(got[name], tensor.numpy()) <= AGREED for name, tensor in zip(outputs, want, strict=True))


def _interface(checkpoint: Checkpoint, model: Any, cache: bool) -> tuple[list[Input], list[str]]:
    """The inputs of the graph of a model, and the names of its outputs.

    Raises:
        Refused: the model does not run on the inputs that we make, or it has no cache of keys and values.
    """
    try:
        inputs = _inputs(model)
        outputs = list(floating_outputs(run_model(model, {item.name: item.example for item in inputs})))
    except Exception as problem:  # a model may raise any exception on inputs of another kind than it takes
        raise Refused(
            f"{checkpoint.folder}: {type(model).__name__} does not run on the inputs that are made for it "
            f"({one_line(problem)}): export it in another way, grow the ONNX file, and hand it over with "
            "handoff --to hf --like"
        ) from problem
    if cache:
        kept = _cache_inputs(checkpoint, model)
        inputs += kept
        for item in inputs:
            if item.name == "attention_mask":
                inputs[inputs.index(item)] = Input(
                    item.name, torch.ones(BATCH, LENGTH + PAST, dtype=torch.int64), {0: "batch", 1: "total_sequence"}
                )
        outputs = [outputs[0], *(item.name.replace("past_key_values", "present") for item in kept)]
    return inputs, outputs


def _shapes(values: Sequence[ir.Value]) -> dict[str, list[int | str]]:
    return {
        str(value.name): [dim if isinstance(dim, int) else str(dim) for dim in (value.shape or ())] for value in values
    }


def has_cache(model: Any) -> bool:
    """Whether a model is a decoder of text that keeps the keys and values of earlier tokens."""
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    return (
        model.main_input_name == "input_ids"
        and not getattr(config, "is_encoder_decoder", False)
        and "past_key_values" in accepted
        and bool(getattr(config, "use_cache", False))
    )


# -- the inputs -------------------------------------------------------------------------------------------------


def _inputs(model: Any) -> list[Input]:
    """The inputs that the class of a model takes, in the order in which it takes them."""
    config, accepted = model.config, inspect.signature(model.forward).parameters
    text, two_towers = getattr(config, "text_config", config), hasattr(config, "vision_config")
    main = str(model.main_input_name)
    wanted = {main}
    if two_towers:
        wanted |= {"input_ids", "pixel_values"}
    if "input_ids" in wanted:
        wanted.add("attention_mask")
    if "token_type_ids" in accepted and getattr(text, "type_vocab_size", 0) > 1:
        wanted.add("token_type_ids")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        wanted.add("decoder_input_ids")
    return [_example(name, model) for name in accepted if name in wanted]


def _example(name: str, model: Any) -> Input:
    config = model.config
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        height, width = np.broadcast_to(_setting(vision, "image_size", 224), 2).tolist()
        return Input(name, torch.randn(BATCH, _setting(vision, "num_channels", 3), height, width), {0: "batch"})
    if name == "input_features":
        bins = _setting(config, "num_mel_bins", 80)
        fixed = getattr(config, "max_source_positions", None)
        if model.main_input_name == name and fixed is not None and hasattr(model, "get_encoder"):
            stride = getattr(model.get_encoder(), "conv1", None)
            length = fixed * (2 if stride is not None else 1)
            return Input(name, torch.randn(BATCH, bins, length), {0: "batch"})
        return Input(name, torch.randn(BATCH, 4 * LENGTH, bins), {0: "batch", 1: "frames"})
    if name == "input_values":
        return Input(name, torch.randn(BATCH, 4000), {0: "batch", 1: "samples"})
    length, axis = (TARGET, "target_sequence") if name.startswith("decoder") else (LENGTH, "sequence")
    if name == "attention_mask":
        return Input(name, torch.ones(BATCH, length, dtype=torch.int64), {0: "batch", 1: axis})
    most = 2 if name == "token_type_ids" else min(8, int(getattr(config, "vocab_size", None) or 8))
    return Input(name, torch.randint(0, most, (BATCH, length)), {0: "batch", 1: axis})


def _setting(config: Any, name: str, otherwise: Any) -> Any:
    value = getattr(config, name, None)
    return otherwise if value is None else value


def _cache_inputs(checkpoint: Checkpoint, model: Any) -> list[Input]:
    """The keys and values of each layer."""
    refusal = Refused(
        f"{checkpoint.folder}: {type(model).__name__} has no cache of keys and values for each layer: export it without"
    )
    if not has_cache(model):
        raise refusal
    with torch.no_grad():
        result = model(input_ids=torch.zeros(BATCH, PAST, dtype=torch.int64), use_cache=True)
    layers = getattr(getattr(result, "past_key_values", None), "layers", None)
    if not layers or any(getattr(getattr(layer, "keys", None), "ndim", 0) != 4 for layer in layers):
        raise refusal
    axes = {0: "batch", 2: "past_sequence"}
    return [
        Input(f"past_key_values.{number}.{name}", tensor, axes)
        for number, layer in enumerate(layers)
        for name, tensor in (("key", layer.keys), ("value", layer.values))
    ]


# -- tracing ----------------------------------------------------------------------------------------------------


class _Flat(torch.nn.Module):  # type: ignore[misc]
    """A model whose inputs and outputs are tensors in a row."""

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(inputs)
        self.outputs = list(outputs)

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        """Run the model."""
        feeds = dict(zip(self.names, tensors, strict=True))
        past = [feeds.pop(name) for name in self.names if name.startswith("past_key_values.")]
        if not past:
            named = floating_outputs(run_model(self.model, feeds))
            return tuple(named[name] for name in self.outputs)
        result = self.model(**feeds, past_key_values=_filled(self.model.config, past), use_cache=True)
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (next(iter(floating_outputs(result).values())), *present)


def _filled(config: Any, tensors: Sequence[Any]) -> Any:
    """A cache that holds these keys and values, one pair for each layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for layer, key, value in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
    return cache


def _traced(checkpoint: Checkpoint, module: _Flat, inputs: Sequence[Input], outputs: Sequence[str]) -> ir.Model:
    from onnx_ir.passes.common import InlinePass
    from onnxscript.optimizer import optimize_ir

    try:
        with quiet(), _silent(), _untraced():
            program = torch.onnx.export(
                module,
                tuple(item.example for item in inputs),
                dynamo=True,
                input_names=[item.name for item in inputs],
                output_names=list(outputs),
                dynamic_shapes=(tuple(item.axes for item in inputs),),
                optimize=False,
                verbose=False,
            )
    except Exception as problem:  # the exporter may raise any exception
        raise Refused(
            f"{checkpoint.folder}: PyTorch {torch.__version__} cannot export {type(module.model).__name__} "
            f"({_reason(problem)}): export it in another way, grow the ONNX file, and hand it over with "
            "handoff --to hf --like"
        ) from problem
    assert program is not None
    model: ir.Model = program.model
    InlinePass()(model)
    with _silent(), _without_values(model, {name for name, _ in module.named_parameters()}):
        optimize_ir(model, input_size_limit=FOLDED)
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("model.") and name.removeprefix("model.") not in model.graph.initializers:
            value.name = name.removeprefix("model.")
    return model


def _reason(problem: BaseException) -> str:
    """The cause that an exporter names last. Its first exception has colours and general advice, and no reason."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return one_line(re.sub("\x1b\\[[0-9;]*m", "", str(problem)) or type(problem).__name__)


@contextmanager
def _without_values(model: ir.Model, parameters: set[str]) -> Iterator[None]:
    """Hide the values of parameters. An optimizer then neither computes with them nor merges those that are equal.

    Gains that are all ones before training are equal by chance. As one tensor they could not be trained apart.
    """
    hidden = {value: value.const_value for name, value in model.graph.initializers.items() if name in parameters}
    for value in hidden:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in hidden.items():
            value.const_value = tensor


@contextmanager
def _untraced() -> Iterator[None]:
    """Let PyTorch record no traceback for each node: that takes as long as everything else."""
    config = getattr(torch.fx, "config", None)
    before = getattr(config, STACKS, None)
    if before is None:
        yield
        return
    setattr(config, STACKS, True)
    try:
        yield
    finally:
        setattr(config, STACKS, before)


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the warnings and logs of the exporter: an error is reported, everything else is not for our user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
