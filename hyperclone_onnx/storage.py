"""Models in and out of files: checked when read, published by rename when written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite

INLINE_LIMIT = 1_500_000_000
"""Models with more bytes of weights get a data file of their own: a protobuf ends at 2 GB."""


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


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
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
    for tensor in _tensors(model):
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
    external = {Path(t.path).resolve() for t in _tensors(model) if isinstance(t, ir.ExternalTensor)}
    return {path.resolve()} | external


def data_name(path: Path) -> str:
    """The name of the data file beside a model file."""
    return f"{path.name}.data"


def check_output(out: Path, sources: set[Path]) -> None:
    """Refuse an output that cannot be written or would harm the source.

    Raises:
        BadRequest: OUT is (a data file of) the source, or a folder.
        CannotWrite: the folder of OUT does not exist or cannot be written.
    """
    folder = out.parent if str(out.parent) else Path()
    if out.is_dir():
        raise BadRequest(f"{out}: a folder; name the file to write")
    if not folder.is_dir():
        raise CannotWrite(f"{out}: its folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise CannotWrite(f"{out}: no permission to write in {folder}")
    for target in (out, out.with_name(data_name(out))):
        if target.resolve() in sources:
            raise BadRequest(f"{out}: this would overwrite the source {target}; choose another output")
        if target.is_dir():
            raise BadRequest(f"{out}: {target} is a folder; choose another output")


def write_text(path: Path, text: str) -> None:
    """Write a small file by rename.

    Raises:
        CannotWrite: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise CannotWrite(f"{path}: cannot be written ({problem.strerror or problem})") from problem


def needs_data_file(model: ir.Model) -> bool:
    """Whether a model's weights are too many for one protobuf file."""
    return sum(tensor.nbytes for tensor in _tensors(model)) > INLINE_LIMIT


def _refers_to_data(out: Path) -> bool:
    """Whether the model that OUT holds already has its weights in OUT's data file."""
    try:
        tensors = list(_tensors(ir.load(out)))
    except Exception:  # whatever is there, it is no model whose data file this is
        return False
    return any(isinstance(t, ir.ExternalTensor) and str(t.location) == data_name(out) for t in tensors)


@contextmanager
def publication(out: Path) -> Iterator[Path]:
    """A place to write a model so that OUT appears only when all is right.

    Yields the path to write, in a temporary folder beside OUT and with OUT's own name (so that the model refers
    to its data file by the final name). When the block ends without an error the data file and then the model
    are renamed into place; otherwise nothing is left.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as problem:
        raise CannotWrite(f"{out}: cannot be written ({problem.strerror or problem})") from problem
    try:
        written = folder / out.name
        replaces = _refers_to_data(out)
        yield written
        has_data = (folder / data_name(out)).exists()
        for name in (data_name(out), out.name) if has_data else (out.name,):
            os.replace(folder / name, out.with_name(name))
        if replaces and not has_data:  # the data file of the model that was here
            out.with_name(data_name(out)).unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
