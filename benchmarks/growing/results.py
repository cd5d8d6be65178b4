"""Writes and reads the results of a training run, the same for both frameworks."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from growing.tasks import Point, Task
from hyperclone_onnx.frameworks.absorb import absorb


def finish(task: Task, folder: Path, curve: list[Point], weights: Mapping[str, Any], seconds: float) -> None:
    """Write the results of a run. result.json comes last: if it exists, all files are complete."""
    absorb(task.model, weights, folder / "model.onnx", check=False)
    with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *((point.step, f"{point.loss:.6f}") for point in curve)])
    files = {"model": task.model, "optimizer": task.optimizer, "tokens": task.tokens}
    described = asdict(task) | {name: path and path.name for name, path in files.items()}
    result = {"task": described, "seconds": round(seconds, 1), "loss": curve[-1].loss}
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "result.json")


def read_curve(folder: Path) -> list[Point]:
    """The curve of a finished run."""
    with (folder / "curve.csv").open(newline="", encoding="utf-8") as file:
        return [Point(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
