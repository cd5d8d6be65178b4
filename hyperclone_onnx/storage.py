"""Models in and out of files: checked when read (`reading.py`), published by rename when written (`publication.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.publication import check_output, data_name, publication, publication_folder, write_text
from hyperclone_onnx.reading import check_unchanged, load, source_files, stamps, tensors

INLINE_LIMIT = 1_500_000_000
"""Models with more bytes of weights get a data file of their own: a protobuf ends at 2 GB."""

Progress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


def save(model: ir.Model, path: Path, *, external: bool, progress: Progress | None = None) -> None:
    """Write a model, streaming its lazy tensors; with `external`, into a data file beside it."""
    done = 0

    def callback(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, info.total)

    try:
        if external:
            workers = min(8, os.cpu_count() or 1)
            data = data_name(path)
            ir.save(
                model, path, external_data=data, callback=callback, max_workers=workers, max_in_flight_bytes=1 << 29
            )
        else:
            ir.save(model, path)
    except OSError as problem:
        raise CannotWrite(f"{path}: cannot be written ({problem.strerror or problem})") from problem


def needs_data_file(model: ir.Model) -> bool:
    """Whether a model's weights are too many for one protobuf file."""
    return sum(tensor.nbytes for tensor in tensors(model)) > INLINE_LIMIT


__all__ = [
    "Progress",
    "check_output",
    "check_unchanged",
    "data_name",
    "load",
    "needs_data_file",
    "publication",
    "publication_folder",
    "save",
    "source_files",
    "stamps",
    "write_text",
]
