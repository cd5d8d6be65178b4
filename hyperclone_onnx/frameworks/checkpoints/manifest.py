"""The manifest in a folder that `handoff` wrote.

It says which initializer each parameter is, and how the model was grown.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.analysis.trainable import Role
from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.frameworks.compiling.program import Program
from hyperclone_onnx.frameworks.continuation import Continuation, continuations
from hyperclone_onnx.plan.plans import Plan

NAME = "manifest.json"
HUGGING_FACE = "hyperclone_onnx.json"
"""The manifest that `handoff --to hf` adds to a checkpoint. It says which tensor belongs to which initializer."""
VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One parameter: its path in the framework, its initializer in the ONNX file, and its role with the reason."""

    path: str
    initializer: str
    shape: tuple[int, ...]
    type: str
    role: Role
    reason: str
    fan_in_growth: float = 1.0
    """The growth factor of the parameter's fan-in. muP divides Adam's learning rate by it."""
    continuation: dict[str, Any] = field(default_factory=dict)
    """How the parameter follows the source in training; see `continuation.Continuation`."""


@dataclass(frozen=True)
class Manifest:
    """The content of the manifest: where the weights are, which parameters they are, and how the model was grown."""

    model: str
    """The name of the ONNX file, without its folder."""
    target: str
    weights: str
    """The file or subfolder, in the manifest's folder, that holds the weights."""
    optimizer: str | None
    """The file with the optimizer's state, in the manifest's folder; None if there is none."""
    growth: dict[str, Any] | None
    """The growing dimensions and the strategy; None if the model contains no plan."""
    tensors: tuple[Entry, ...]
    training: dict[str, Any] | None = None
    """Advice for training a grown model further; see `training_recipe.TrainingRecipe`. None for other models."""

    teacher: dict[str, Any] | None = None
    """The teacher's file as `model`, and what of the two is compared; see `pairing.Pairing`. None without a teacher."""

    def write(self, folder: Path) -> None:
        """Write this manifest into a folder."""
        data = {"version": VERSION, **asdict(self)}
        (folder / NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            BadModel: the folder has no manifest, or the manifest is malformed or of another version.
        """
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("version") != VERSION:
                raise BadModel(f"{path}: written by another release of hyperclone-onnx")
            entries = tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in data.pop("tensors"))
            return Manifest(**data, tensors=entries)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as problem:
            raise BadModel(f"{path}: not a manifest of a handoff ({problem})") from problem


def entries(program: Program, plan: Plan | None = None) -> tuple[Entry, ...]:
    """List the parameters of a program, frozen ones included, with the growth of their fan-ins by a plan."""
    followed = continuations(plan, [weight.initializer for weight in program.weights if weight.role != "constant"])
    return tuple(
        Entry(
            weight.path,
            weight.initializer,
            weight.shape,
            ir.DataType(weight.element_type).name.lower(),
            weight.role,
            weight.reason,
            followed[weight.initializer].fan_in,
            followed[weight.initializer].to_json(),
        )
        for weight in program.weights
        if weight.initializer in followed
    )


def continuations_in(folder: Path) -> dict[str, Continuation]:
    """How the parameters of a handoff's folder follow the source, by their names in the framework.

    Args:
        folder: a folder that `handoff` wrote, for Hugging Face too.

    Raises:
        BadModel: the folder has no manifest, or one of another release.
    """
    hugging_face = folder / HUGGING_FACE
    if not hugging_face.is_file():
        return {entry.path: Continuation.from_json(entry.continuation) for entry in Manifest.read(folder).tensors}
    try:
        data = json.loads(hugging_face.read_text(encoding="utf-8"))["continuations"]
        return {name: Continuation.from_json(entry) for name, entry in data.items()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as problem:
        raise BadModel(f"{hugging_face}: does not say how the parameters grew ({problem!r})") from problem
