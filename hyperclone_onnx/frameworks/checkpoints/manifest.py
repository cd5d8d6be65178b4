"""The manifest in a folder that `handoff` wrote.

It says which initializer each parameter is, and how the model was grown.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.analysis.trainable import Role
from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.frameworks.compiling.program import Program
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.training_recipe import fan_in_growth

NAME = "manifest.json"
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
    return tuple(
        Entry(
            weight.path,
            weight.initializer,
            weight.shape,
            ir.DataType(weight.element_type).name.lower(),
            weight.role,
            weight.reason,
            1.0 if plan is None else fan_in_growth(plan, weight.initializer),
        )
        for weight in program.weights
        if weight.role != "constant"
    )
