"""The handoff to Hugging Face, and the way in from there.

In: a checkpoint (and a grown ONNX file that comes from it). Out: a grown checkpoint that transformers loads, or the
checkpoint as an ONNX file. After training, `read_trained` reads its weights back as the initializers of the ONNX file.

Everything but `read_trained` needs the extra ``hf``, which installs torch and transformers.
"""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.hugging_face.reading import read_trained

if TYPE_CHECKING:
    from hyperclone_onnx.frameworks.hugging_face.expanding import (
        CheckpointExpansion,
        CheckpointExport,
        expand_checkpoint,
        export_checkpoint,
        exported_file,
        plan_checkpoint,
    )
    from hyperclone_onnx.frameworks.hugging_face.growing import grow_checkpoint
    from hyperclone_onnx.frameworks.hugging_face.report import Report

_PLACES = {
    "CheckpointExpansion": "expanding",
    "CheckpointExport": "expanding",
    "Report": "report",
    "expand_checkpoint": "expanding",
    "export_checkpoint": "expanding",
    "exported_file": "expanding",
    "grow_checkpoint": "growing",
    "plan_checkpoint": "expanding",
}
"""The module of each name that is imported at its first use."""

__all__ = [
    "CheckpointExpansion",
    "CheckpointExport",
    "Report",
    "expand_checkpoint",
    "export_checkpoint",
    "exported_file",
    "grow_checkpoint",
    "plan_checkpoint",
    "read_trained",
]


def _missing(problem: ImportError, name: str) -> MissingExtra:
    """The error where torch or transformers is not installed.

    For the commands that begin with a checkpoint it is the two commands that install the extra and repeat this one.
    """
    error = MissingExtra("hf", problem)
    if _PLACES[name] == "expanding":
        again = shlex.join(["hyperclone-onnx", *sys.argv[1:]])
        error.msg = f"{problem}. Install it and repeat: pip install 'hyperclone-onnx[hf]' && {again}"
    return error


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    except ModuleNotFoundError as problem:
        if problem.name is None or problem.name.startswith("hyperclone_onnx"):
            raise
        raise _missing(problem, name) from problem
