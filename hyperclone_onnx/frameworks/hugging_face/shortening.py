"""A model with a few layers of a checkpoint, on which the constants of the whole model are measured.

Layers that are alike derive the same constants from their sizes, so two of them say what all of them need. Whether that
is true for a checkpoint is not assumed: the written checkpoint is compared with its source, and where it differs, the
whole model is measured.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, quiet, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.configuration import (
    Change,
    Path,
    Shapes,
    built,
    changed_config,
    integers,
    value_at,
)
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation

LAYERS = 2
"""The number of layers that are measured: one may stand behind the first, and one behind another."""


def shortened(checkpoint: Checkpoint, shapes: Shapes) -> Checkpoint | None:
    """The checkpoint's configuration with fewer layers; None if no field of it is a number of layers.

    A field is a number of layers if the model with a smaller number has some of the tensors, and all of them with the
    shapes that they have in the whole model.

    Args:
        checkpoint: the checkpoint. Its weights are not read.
        shapes: the shapes of all stored tensors of its model.
    """
    with quiet():
        return _shortened(checkpoint, shapes)


def _shortened(checkpoint: Checkpoint, shapes: Shapes) -> Checkpoint | None:
    short, left = checkpoint, shapes
    for path, value in integers(checkpoint.config.to_dict()):
        if value <= LAYERS:
            continue
        config = _with_fewer(short, path, value)
        candidate = None if config is None else replace(short, config=config)
        fewer = None if candidate is None else _shapes(candidate)
        if candidate is not None and fewer and len(fewer) < len(left) and fewer.items() <= left.items():
            short, left = candidate, fewer
    return None if short is checkpoint else short


def _with_fewer(checkpoint: Checkpoint, path: Path, value: int) -> Any:
    """The configuration with `LAYERS` for one field, and with that many entries in lists that have one for each."""
    fields = checkpoint.config.to_dict()
    changes = [Change(path, value, LAYERS)]
    beside = value_at(fields, path[:-1])
    for key, entry in beside.items() if isinstance(beside, Mapping) else ():
        if isinstance(entry, list) and len(entry) == value:
            changes.append(Change((*path[:-1], key), entry, entry[:LAYERS]))
    try:
        return changed_config(checkpoint, changes)
    except Exception:  # a configuration that contradicts itself may raise any exception
        return None


def _shapes(checkpoint: Checkpoint) -> Shapes | None:
    try:
        with torch.device("meta"):
            model = built(checkpoint, ())
    except Exception:  # a model whose sizes do not fit together may raise any exception
        return None
    return {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}


def for_all_layers(
    folded: Mapping[str, Compensation], measured: Iterable[str], names: Iterable[str]
) -> dict[str, Compensation] | None:
    """The factors of all tensors, from those of the layers that were measured.

    A tensor of another layer gets the factor of the tensors whose names differ from its own in the layer's number only.

    Args:
        folded: the factors that were found.
        measured: the tensors of the model that was measured.
        names: the tensors of the whole model.

    Returns:
        The factors by name; None if the layers that were measured have different factors.
    """
    own = set(measured)
    alike: dict[str, set[Compensation | None]] = defaultdict(set)
    for name in own:
        alike[without_numbers(name)].add(_rounded(folded.get(name)))
    factors = dict(folded)
    for name in names:
        if name in own:
            continue
        choices = alike[without_numbers(name)]
        if len(choices) != 1:
            return None
        (factor,) = choices
        if factor is not None:
            factors[name] = next(folded[other] for other in own if without_numbers(other) == without_numbers(name))
    return factors


def without_numbers(name: str) -> str:
    """A tensor's name with a sign in the place of each number that stands alone between dots."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def _rounded(fold: Compensation | None) -> Compensation | None:
    """A factor without the last digits, which differ between layers."""
    return None if fold is None else Compensation(float(f"{fold.factor:.6g}"), fold.offset)
