"""Does one training run: reads a model file, and writes a curve and the trained model."""

from __future__ import annotations

from pathlib import Path

from growing.tasks import Task, Tell
from growing.training_torch import train_torch


def train(task: Task, folder: Path, tell: Tell) -> None:
    """Do a run, or the rest of it. Writes curve.csv, model.onnx, optimizer.pt and result.json into its folder.

    Args:
        task: the run.
        folder: the folder of the run.
        tell: called with the number of steps that were done since the last call.
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
