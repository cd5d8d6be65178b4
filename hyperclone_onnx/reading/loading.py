"""Reads model files. Files that are not whole, or that reach outside their folder, are refused first."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, first_line
from hyperclone_onnx.reading import external_data
from hyperclone_onnx.reading.field_count import Malformed, count_parts
from hyperclone_onnx.reading.foreign import foreign_format
from hyperclone_onnx.reading.sparse import make_dense
from hyperclone_onnx.reading.structure import check_structure
from hyperclone_onnx.system.stamps import Stamp, stamp

LARGEST_FILE = 2**31 - 1
"""The most bytes of a protobuf message."""

SMALL_FILE = 4 << 20
"""Smaller files are parsed at once: they cannot ask for much memory."""

MOST_PARTS = 5_000_000
"""More fields than the graph of any model has. A graph of 20,000 nodes has a million."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX model. Weights outside the file stay there until they are used.

    Raises:
        BadModel: the file is missing, is not ONNX, or is truncated or malformed; or its external data is missing, too
            short, or outside the model's folder.
        Refused: a sparse tensor is too large to be made dense.
    """
    file = Path(path)
    try:
        proto = _parsed(file)
    except BadModel as problem:
        foreign = foreign_format(file) if file.is_file() else None
        if foreign is None:
            raise
        raise BadModel(f"{file}: not an ONNX model but {foreign}") from problem
    return from_message(file, proto)


def from_message(file: Path, proto: onnx.ModelProto) -> ir.Model:
    """The model in a message. Sparse tensors are replaced by dense ones in the message itself.

    Args:
        file: the file that the message was read from. Its data files lie beside it, and messages to people name it.
        proto: the message.

    Raises:
        BadModel: the model is malformed, or its data files are not whole.
        Refused: a sparse tensor is too large to be made dense.
    """
    make_dense(str(file), proto)
    check_structure(str(file), proto)
    try:
        model = ir.from_proto(proto)
    except Exception as problem:  # whatever a malformed graph makes it raise
        raise BadModel(f"{file}: a malformed graph ({_innermost(problem)})") from problem
    _check_tensors(file, model)
    return model


def _parsed(file: Path) -> onnx.ModelProto:
    """The message in a model file.

    Raises:
        BadModel: there is none.
    """
    _check_file(file)
    try:
        if file.stat().st_size > SMALL_FILE and count_parts(file, MOST_PARTS) > MOST_PARTS:
            raise BadModel(f"{file}: a graph of more than {MOST_PARTS:,} parts: this is no model")
        proto = onnx.load(file.resolve(), format="protobuf", load_external_data=False)
    except PermissionError as problem:
        raise BadModel(f"{file}: cannot be read ({problem.strerror})") from problem
    except Malformed as problem:
        raise BadModel(f"{file}: not a readable ONNX model, or truncated ({problem})") from problem
    except BadModel:
        raise
    except Exception as problem:  # protobuf raises several types for a broken file
        raise BadModel(f"{file}: not a readable ONNX model, or truncated ({_innermost(problem)})") from problem
    if not proto.graph.node and not proto.graph.output:
        raise BadModel(f"{file}: not an ONNX model: it has no graph")
    if not proto.opset_import:
        raise BadModel(f"{file}: truncated, or not an ONNX model: it names no opset")
    return proto


def _instead(folder: Path) -> str:
    """What to name in place of a folder, as the end of a message; nothing where the folder has nothing to offer."""
    try:
        models = sorted(folder.glob("*.onnx")) or sorted(folder.glob("*/*.onnx"))
        if models:
            return f": name a file in it, such as {models[0]}"
        if (folder / "config.json").is_file():
            return (
                f": a Hugging Face folder is exported first (hyperclone-onnx export {folder} -o OUT); "
                "then name OUT/model.onnx"
            )
    except OSError:
        pass
    return ""


def _check_file(file: Path) -> None:
    """Refuse a path that is no regular file before we open it: reading from a pipe may never end."""
    try:
        status = file.stat()
    except OSError as problem:
        missing = isinstance(problem, FileNotFoundError)
        raise BadModel(f"{file}: {'no such file' if missing else f'cannot be read ({problem.strerror})'}") from problem
    except ValueError as problem:
        raise BadModel(f"{file}: no such file") from problem
    if stat.S_ISDIR(status.st_mode):
        raise BadModel(f"{file}: a folder, not a model file{_instead(file)}")
    if not stat.S_ISREG(status.st_mode):
        raise BadModel(f"{file}: not a regular file: copy its content into one")
    if status.st_size > LARGEST_FILE:
        raise BadModel(f"{file}: not an ONNX model: larger than 2 GB (the weights of a large model lie beside it)")


def _innermost(problem: BaseException) -> str:
    """The text of the exception that caused the others."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return first_line(problem)


# -- tensors ----------------------------------------------------------------------------------------------


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """All tensors of a model: initializers, also those of bodies, and attributes of nodes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for body in bodies for node in body.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _check_tensors(file: Path, model: ir.Model) -> None:
    """Refuse tensors whose bytes are missing, or are more or fewer than their shapes need."""
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            external_data.place(file, tensor)
        elif isinstance(tensor, ir.TensorProtoTensor) and not _is_whole(tensor):
            raise BadModel(f"{file}: tensor {tensor.name!r} has more or fewer bytes than its shape needs")


def _is_whole(tensor: ir.TensorProtoTensor) -> bool:
    """Whether a tensor inside the model file has as many elements as its shape needs."""
    raw = tensor.raw
    if raw.HasField("raw_data"):
        return tensor.dtype != ir.DataType.STRING and len(raw.raw_data) == tensor.nbytes
    if tensor.dtype == ir.DataType.STRING:
        return len(raw.string_data) == tensor.size
    fields = (raw.float_data, raw.int32_data, raw.int64_data, raw.double_data, raw.uint64_data)
    if tensor.size and not any(fields):
        return False
    if tensor.size > 2 * sum(map(len, fields)):  # two to a number at most, in 4 bits
        return False
    try:
        return tensor.numpy().size == tensor.size
    except (ValueError, TypeError, OverflowError):
        return False


# -- files ------------------------------------------------------------------------------------------------


def source_files(path: Path, model: ir.Model) -> set[Path]:
    """The resolved paths of the files that a model is read from."""
    external = {Path(t.path).resolve() for t in tensors(model) if isinstance(t, ir.ExternalTensor)}
    return {path.resolve()} | external


def stamps(files: set[Path]) -> dict[Path, Stamp]:
    """A stamp for each file, which tells versions of the file apart."""
    try:
        return {file: stamp(file) for file in files}
    except OSError as problem:
        raise BadModel(f"{problem.filename}: cannot be read ({problem.strerror})") from problem


def check_unchanged(before: Mapping[Path, Stamp]) -> None:
    """Refuse to go on when a file has changed since it was stamped: we may have read parts of both versions.

    Raises:
        BadModel: a file is another one, or has another size or another time of change.
    """
    for path, known in before.items():
        try:
            same = stamp(path) == known
        except OSError:
            same = False
        if not same:
            raise BadModel(f"{path}: changed while it was read; nothing was written. Run again when it is still")
