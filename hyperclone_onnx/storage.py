"""Models in and out of files: checked when read (`reading.py`), published by rename when written (`publication.py`)."""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.publication import check_output, data_name, publication, publication_folder, write_text
from hyperclone_onnx.reading import check_unchanged, load, source_files, stamps, tensors

INLINE_LIMIT = 1_500_000_000
"""Models with more bytes of weights get a data file of their own: a protobuf ends at 2 GB."""


def needs_data_file(model: ir.Model) -> bool:
    """Whether a model's weights are too many for one protobuf file."""
    return sum(tensor.nbytes for tensor in tensors(model)) > INLINE_LIMIT


__all__ = [
    "check_output",
    "check_unchanged",
    "data_name",
    "load",
    "needs_data_file",
    "publication",
    "publication_folder",
    "source_files",
    "stamps",
    "write_text",
]
