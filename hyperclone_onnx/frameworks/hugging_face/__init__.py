"""The handoff to Hugging Face.

In: a grown ONNX file, and the checkpoint from which its source was exported. Out: a grown checkpoint that transformers
loads. After training, `read_trained` reads its weights back as the initializers of the ONNX file.

`grow_checkpoint` needs the extra ``hf``, which installs transformers. `read_trained` needs no extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.hugging_face.reading import MANIFEST, read_trained

if TYPE_CHECKING:
    from hyperclone_onnx.frameworks.hugging_face.growing import grow_checkpoint
    from hyperclone_onnx.frameworks.hugging_face.report import Report

__all__ = ["MANIFEST", "Report", "grow_checkpoint", "read_trained"]


def __getattr__(name: str) -> Any:
    if name == "grow_checkpoint":
        try:
            from hyperclone_onnx.frameworks.hugging_face.growing import grow_checkpoint
        except ModuleNotFoundError as problem:
            raise MissingExtra("hf", problem) from problem
        return grow_checkpoint
    if name == "Report":
        from hyperclone_onnx.frameworks.hugging_face.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
