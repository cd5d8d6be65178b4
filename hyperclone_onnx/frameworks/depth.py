"""The stored tensors of a model that has more layers than its source, for those that follow its growth."""

from __future__ import annotations

import os

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.transforms.interface import Placed, places_of
from hyperclone_onnx.transforms.layers import deepened
from hyperclone_onnx.transforms.source import source_of

PathLike = str | os.PathLike[str]


def source_places(path: PathLike, plan: Plan, source: PathLike | None) -> dict[str, Placed]:
    """The places of the stored tensors of a deeper model's layers, by their names before growth in width.

    A model that is not deeper than its source has none.

    Args:
        path: the grown file, for messages.
        plan: its plan.
        source: the file that it was grown from; None if it is not known.

    Raises:
        BadRequest: the model is deeper, and its source is not known.
        BadModel, Refused: see `transforms.source.source_of`.
    """
    counts = deepened(plan.transforms)
    if not counts:
        return {}
    if source is None:
        shown = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in counts.items())
        raise BadRequest(
            f"{path}: it has more layers than its source ({shown}), and only the source shows which layers are new: "
            "name the ONNX file that it was grown from with --source"
        )
    return places_of(source_of(source, plan.transforms).model.graph)
