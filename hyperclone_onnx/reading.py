"""Reading a model: what is not whole, or would reach outside its folder, is refused before anything is done with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX model; weights stay on disk until they are used.

    Raises:
        BadModel: the file is missing, not ONNX, truncated, or its external data is missing, too short, or
            outside the model's folder.
    """
    file = Path(path)
    if not file.is_file():
        raise BadModel(f"{file}: {'a folder, not a model file' if file.is_dir() else 'no such file'}")
    try:
        model = ir.load(file.resolve())
    except PermissionError as problem:
        raise BadModel(f"{file}: cannot be read ({problem.strerror})") from problem
    except Exception as problem:  # protobuf raises several types for a broken file
        raise BadModel(f"{file}: not a readable ONNX model, or truncated ({_first_line(problem)})") from problem
    if len(model.graph) == 0 and not model.graph.outputs:
        raise BadModel(f"{file}: not an ONNX model: it has no graph")
    if not model.graph.opset_imports:
        raise BadModel(f"{file}: truncated, or not an ONNX model: it names no opset")
    _check_tensors(file, model)
    return model


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0][:200] if text else type(problem).__name__


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor that a model holds: initializers, those of subgraphs included, and attributes of nodes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()


def _check_tensors(file: Path, model: ir.Model) -> None:
    folder = file.resolve().parent
    for tensor in tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            if isinstance(tensor, ir.TensorProtoTensor) and not _is_whole(tensor):
                raise BadModel(f"{file}: tensor {tensor.name!r} has more or fewer bytes than its shape needs")
            continue
        data = Path(tensor.path).resolve()
        if Path(tensor.path).is_symlink():
            raise BadModel(f"{file}: its data file {tensor.location} is a link; put the file itself beside the model")
        if not data.is_relative_to(folder):
            raise BadModel(f"{file}: tensor {tensor.name!r} lies outside the model's folder ({tensor.location})")
        if not data.is_file():
            raise BadModel(f"{file}: its data file {tensor.location} is missing (looked in {folder})")
        length = tensor.length if tensor.length is not None else tensor.nbytes
        end = (tensor.offset or 0) + max(length, tensor.nbytes)
        if end > data.stat().st_size or length < tensor.nbytes:
            raise BadModel(
                f"{file}: its data file {tensor.location} is too short: tensor {tensor.name!r} needs {end} bytes, "
                f"the file has {data.stat().st_size}"
            )


def _is_whole(tensor: ir.TensorProtoTensor) -> bool:
    """Whether a tensor stored in the model file has the elements that its shape needs."""
    raw = tensor.raw
    if raw.HasField("raw_data"):
        return len(raw.raw_data) == tensor.nbytes
    if tensor.dtype == ir.DataType.STRING:
        return len(raw.string_data) == tensor.size
    fields = (raw.float_data, raw.int32_data, raw.int64_data, raw.double_data, raw.uint64_data)
    if tensor.size and not any(fields):
        return False
    try:
        return tensor.numpy().size == tensor.size
    except ValueError:
        return False


def source_files(path: Path, model: ir.Model) -> set[Path]:
    """The files that a model is read from, resolved."""
    external = {Path(t.path).resolve() for t in tensors(model) if isinstance(t, ir.ExternalTensor)}
    return {path.resolve()} | external
