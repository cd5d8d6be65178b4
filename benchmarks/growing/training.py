"""One training run: a model file in, a curve and the trained model file out."""

from __future__ import annotations

from pathlib import Path

from growing.tasks import Task, Tell
from growing.training_torch import train_torch


def train(task: Task, folder: Path, tell: Tell) -> None:
    """Do what is left of a run. Leaves curve.csv, model.onnx, optimizer.pt and result.json in its folder.

    Args:
        task: what to do.
        folder: its own.
        tell: called with the number of steps just done.
    """
    if (folder / "result.json").exists():
        tell(task.steps)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if task.framework == "jax":
        from growing.training_jax import train_jax

        train_jax(task, folder, tell)
    else:
        train_torch(task, folder, tell)
