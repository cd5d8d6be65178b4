"""Reading a model: what is not whole, or would reach outside its folder, is refused before anything is done with it."""

from __future__ import annotations

import itertools
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, first_line
from hyperclone_onnx.reading.field_count import Malformed, count_parts
from hyperclone_onnx.reading.structure import check_structure
from hyperclone_onnx.system.stamps import Stamp, stamp

LARGEST_FILE = 2**31 - 1
"""A protobuf ends here."""

SMALL_FILE = 4 << 20
"""A smaller file is parsed without counting first: what it asks for is in proportion."""

MOST_PARTS = 5_000_000
"""More fields than the graph of any model has: one of 20,000 nodes has a million."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX model; weights stay on disk until they are used.

    Raises:
        BadModel: the file is missing, not ONNX, truncated or malformed, or its external data is missing, too short,
            or outside the model's folder.
        Refused: it has sparse tensors.
    """
    file = Path(path)
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
        raise BadModel(f"{file}: not a readable ONNX model, or truncated ({_first_line(problem)})") from problem
    if not proto.graph.node and not proto.graph.output:
        raise BadModel(f"{file}: not an ONNX model: it has no graph")
    if not proto.opset_import:
        raise BadModel(f"{file}: truncated, or not an ONNX model: it names no opset")
    check_structure(str(file), proto)
    try:
        model = ir.from_proto(proto)
    except Exception as problem:  # whatever a malformed graph makes it raise
        raise BadModel(f"{file}: a malformed graph ({_first_line(problem)})") from problem
    ir.external_data.set_base_dir(model.graph, file.resolve().parent)
    _check_tensors(file, model)
    return model


def _check_file(file: Path) -> None:
    """Refuse what is no file before it is opened: a pipe would never end."""
    try:
        found = file.stat()
    except OSError as problem:
        missing = isinstance(problem, FileNotFoundError)
        raise BadModel(f"{file}: {'no such file' if missing else f'cannot be read ({problem.strerror})'}") from problem
    except ValueError as problem:
        raise BadModel(f"{file}: no such file") from problem
    if stat.S_ISDIR(found.st_mode):
        raise BadModel(f"{file}: a folder, not a model file")
    if not stat.S_ISREG(found.st_mode):
        raise BadModel(f"{file}: not a regular file: copy what it gives into one")
    if found.st_size > LARGEST_FILE:
        raise BadModel(f"{file}: not an ONNX model: larger than 2 GB (the weights of a large model lie beside it)")


def _first_line(problem: BaseException) -> str:
    """What an exception says, or the one that caused it where that says more."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return first_line(problem)


# -- tensors ----------------------------------------------------------------------------------------------


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor that a model holds: initializers, those of subgraphs included, and attributes of nodes."""
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


Ranges = dict[str, list[tuple[int, int, str]]]
"""For each data file the bytes that tensors take: start, end, name."""


def _check_tensors(file: Path, model: ir.Model) -> None:
    folder = file.resolve().parent
    ranges: Ranges = defaultdict(list)
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            data = _data_file(file, folder, tensor)
            start, end = _range(file, tensor, data)
            ranges[str(tensor.location)].append((start, end, tensor.name or ""))
        elif isinstance(tensor, ir.TensorProtoTensor) and not _is_whole(tensor):
            raise BadModel(f"{file}: tensor {tensor.name!r} has more or fewer bytes than its shape needs")
    for location, taken in ranges.items():
        _check_overlaps(file, location, taken)


def _data_file(file: Path, folder: Path, tensor: ir.ExternalTensor) -> Path:
    """The data file of a tensor: a regular file in the model's folder or below, reached without links."""
    location = str(tensor.location)
    parts = PurePosixPath(location).parts
    outside = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or ".." in parts
    if os.name == "nt":
        outside = outside or ".." in PureWindowsPath(location).parts or PureWindowsPath(location).is_absolute()
    if outside:
        raise BadModel(f"{file}: tensor {tensor.name!r} lies outside the model's folder ({location})")
    data = folder
    for part in parts:
        data = data / part
        try:
            is_link = data.is_symlink()
        except (OSError, ValueError):  # a name that no file can have
            is_link = False
        if is_link:
            raise BadModel(f"{file}: its data file {location} is a link; put the file itself beside the model")
    try:
        found = data.stat()
    except (OSError, ValueError) as problem:
        raise BadModel(f"{file}: its data file {location} is missing (looked in {folder})") from problem
    if not stat.S_ISREG(found.st_mode):
        raise BadModel(f"{file}: its data file {location} is missing: what is there is no regular file")
    return data


def _range(file: Path, tensor: ir.ExternalTensor, data: Path) -> tuple[int, int]:
    """The bytes of its data file that a tensor takes."""
    if tensor.dtype == ir.DataType.STRING:
        raise BadModel(f"{file}: tensor {tensor.name!r} holds strings, which no data file can")
    start = tensor.offset or 0
    length = tensor.length if tensor.length is not None else tensor.nbytes
    size = data.stat().st_size
    if start < 0 or length < 0:
        raise BadModel(f"{file}: tensor {tensor.name!r} begins or ends before its data file {tensor.location}")
    if start + max(length, tensor.nbytes) > size:
        raise BadModel(
            f"{file}: its data file {tensor.location} is too short: tensor {tensor.name!r} needs "
            f"{start + max(length, tensor.nbytes)} bytes, the file has {size}"
        )
    if length != tensor.nbytes:
        raise BadModel(
            f"{file}: tensor {tensor.name!r} has {length} bytes in {tensor.location}, its shape needs {tensor.nbytes}"
        )
    return start, start + length


def _check_overlaps(file: Path, location: str, taken: list[tuple[int, int, str]]) -> None:
    """Refuse tensors that share some of their bytes: two may be one, but not parts of one another."""
    ranges = sorted({(start, end): name for start, end, name in taken if end > start}.items())
    for ((_, end), name), ((start, _), other) in itertools.pairwise(ranges):
        if start < end:
            raise BadModel(f"{file}: tensors {name!r} and {other!r} overlap in {location}")


def _is_whole(tensor: ir.TensorProtoTensor) -> bool:
    """Whether a tensor stored in the model file has the elements that its shape needs."""
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
    """The files that a model is read from, resolved."""
    external = {Path(t.path).resolve() for t in tensors(model) if isinstance(t, ir.ExternalTensor)}
    return {path.resolve()} | external


def stamps(files: set[Path]) -> dict[Path, Stamp]:
    """What tells each file from another version of it."""
    try:
        return {each: stamp(each) for each in files}
    except OSError as problem:
        raise BadModel(f"{problem.filename}: cannot be read ({problem.strerror})") from problem


def check_unchanged(before: Mapping[Path, Stamp]) -> None:
    """Refuse what was made from files that have changed meanwhile: it may hold some of each version.

    Raises:
        BadModel: a file is another one, or has another size or time of change.
    """
    for path, known in before.items():
        try:
            same = stamp(path) == known
        except OSError:
            same = False
        if not same:
            raise BadModel(f"{path}: changed while it was read; nothing was written. Run again when it is still")
