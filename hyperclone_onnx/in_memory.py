"""Grows and validates models that are in memory: they are files in a temporary folder meanwhile.

Validation must run what was written, and a runtime reads files. So a model in memory takes the same way as a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, HypercloneError
from hyperclone_onnx.reading.in_memory import IN_MEMORY, NAME, GivenModel, path_of, taken
from hyperclone_onnx.writing import onnx_files as writer


@dataclass(frozen=True)
class Files:
    """The files of a growth: the source, and the output. Either may lie in a temporary folder."""

    source: Path
    output: Path
    source_name: str
    """The source as reports name it."""
    read_back: type[onnx.ModelProto] | type[ir.Model] | None
    """The type in which the output is given back; None if the output is a file of the user."""

    def grown(self) -> Any:
        """The grown model in memory, with all its tensors; None if the output is a file of the user."""
        if self.read_back is None:
            return None
        if self.read_back is ir.Model:
            return ir.external_data.load_to_model(ir.load(self.output))
        return onnx.load(self.output)


def check_output(output: object) -> None:
    """Check that an output is a path, or None.

    Raises:
        BadRequest: it is something else, most likely a factor in the wrong place.
    """
    if output is not None and not isinstance(output, str | os.PathLike):
        raise BadRequest(f"the output is {output!r}: give a path as the second argument, and the factor as factor=2")


@contextmanager
def files(model: GivenModel, output: str | os.PathLike[str] | None) -> Iterator[Files]:
    """The files of a growth. A model in memory is written, and without an output there is a temporary one.

    Raises:
        BadRequest: the model is of another type.
    """
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder, _named(Path(folder)):
        source = as_file(model, Path(folder) / "source")
        name = NAME if isinstance(model, IN_MEMORY) else str(source)
        if output is not None:
            yield Files(source, Path(output), name, None)
            return
        out = Path(folder) / "grown" / "model.onnx"
        out.parent.mkdir()
        yield Files(source, out, name, ir.Model if isinstance(model, ir.Model) else onnx.ModelProto)


@contextmanager
def pair_of_files(small: GivenModel, big: GivenModel) -> Iterator[tuple[Path, Path]]:
    """A source and a grown model as files."""
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder, _named(Path(folder)):
        yield as_file(small, Path(folder) / "source"), as_file(big, Path(folder) / "grown", "grown model")


def as_file(model: GivenModel, folder: Path, what: str = "model") -> Path:
    """The path of a model. A model in memory is written into a new folder."""
    if not isinstance(model, IN_MEMORY):
        return path_of(model, what)
    folder.mkdir()
    path = folder / "model.onnx"
    stored = taken(model)
    writer.save(stored, path, external=writer.needs_data_file(stored))
    return path


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors within name the models and not their temporary files."""
    try:
        yield
    except HypercloneError as problem:
        text = str(problem)
        for part, name in (("source", NAME), ("grown", "the grown model")):
            text = text.replace(str(folder / part / "model.onnx"), name)
        if text == str(problem):
            raise
        raise type(problem)(text) from problem
