"""What cannot follow a model that has more layers than its source."""

from __future__ import annotations

import os

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.transforms.layers import deepened


def refuse_deeper(path: str | os.PathLike[str], plan: Plan, what: str) -> None:
    """Refuse a file that has more layers than its source.

    Raises:
        Refused: it has.
    """
    for name, (before, after) in deepened(plan.transforms).items():
        raise Refused(
            f"{path}: it has more layers than its source ({name}: {before} -> {after}). {what} can be grown in width "
            "alone so far. Hand the file to PyTorch, JAX or safetensors instead"
        )
