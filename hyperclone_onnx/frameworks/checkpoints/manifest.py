"""What lies in a folder that `handoff` wrote: which parameter is which initializer, and how the model was grown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.frameworks.compiling.program import Program, Role
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.training_recipe import fan_in_growth

NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One parameter: its path in the framework, its initializer in the ONNX file, and what it is for."""

    path: str
    initializer: str
    shape: tuple[int, ...]
    type: str
    role: Role
    reason: str
    fan_in_growth: float = 1.0
    """By how much the sums grew that it is a factor in: what muP divides Adam's rate by."""


@dataclass(frozen=True)
class Manifest:
    """The parameters of a handoff. `weights` is the file, the folder or the pattern of files that holds them."""

    model: str
    target: str
    weights: str
    optimizer: str | None
    growth: dict[str, Any] | None
    """The growing dimensions and the strategy, where the model says how it was grown."""
    tensors: tuple[Entry, ...]
    training: dict[str, Any] | None = None
    """How to train a grown model on; see `training_recipe.TrainingRecipe`."""

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        data = {"version": VERSION, **asdict(self)}
        (folder / NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read that of a folder.

        Raises:
            BadModel: it has none, or one of another version.
        """
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("version") != VERSION:
                raise BadModel(f"{path}: written by another release of hyperclone-onnx")
            entries = tuple(Entry(**{**each, "shape": tuple(each["shape"])}) for each in data.pop("tensors"))
            return Manifest(**data, tensors=entries)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as problem:
            raise BadModel(f"{path}: not a manifest of a handoff ({problem})") from problem


def entries(program: Program, plan: Plan | None = None) -> tuple[Entry, ...]:
    """The parameters of a program, frozen ones too, and how their fan-ins grew by a plan."""
    return tuple(
        Entry(
            each.path,
            each.initializer,
            each.shape,
            ir.DataType(each.element_type).name.lower(),
            each.role,
            each.reason,
            1.0 if plan is None else fan_in_growth(plan, each.initializer),
        )
        for each in program.weights
        if each.role != "constant"
    )
