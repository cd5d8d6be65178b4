"""One training run: a model file in, a curve and the trained model file out; what was interrupted goes on."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from growing.corpus import corpus
from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.compiled_model import compile_model
from hyperclone_onnx.frameworks.optimizer.moments import step_factors
from hyperclone_onnx.frameworks.optimizer.resume import resume_torch
from hyperclone_onnx.frameworks.torch import Block, OnnxModule, load

SAVE_EVERY = 20.0
"""Seconds between checkpoints."""
Tell = Callable[[int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, gradients clipped at a norm of 1, a linear warm-up and then a decay to nothing."""

    rate: float
    """At its peak."""
    warm_up: float = 0.05
    """The share of all steps in which the rate rises; 0 begins at the peak."""
    decay: str = "linear"
    """linear, cosine, late (constant until the last quarter), or none."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    dropout: float = 0.0
    """Behind each layer."""
    by_fan_in: bool = False
    """Whether a grown matrix gets the rate divided by the growth of its fan-in (muP, arXiv 2203.03466)."""

    def share(self, done: float) -> float:
        """The rate after a share of all steps, in parts of its peak."""
        if done < self.warm_up:
            return done / self.warm_up
        left = (1.0 - done) / (1.0 - self.warm_up)
        if self.decay == "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return {"none": 1.0, "late": min(1.0, 4.0 * left), "linear": left}[self.decay]


@dataclass(frozen=True)
class Task:
    """A run, in all that decides its result."""

    model: Path
    """What it starts from."""
    recipe: Recipe
    steps: int
    seed: int
    """Of the order of the data."""
    batch: int
    length: int
    evaluations: int
    examined: int
    """How many windows of what is held out."""
    optimizer: Path | None = None
    """The state to start from."""
    framework: str = "torch"
    device: str = "cpu"

    def times(self) -> set[int]:
        """The steps before which the model is examined; the last is the end."""
        return {round(self.steps * number / self.evaluations) for number in range(self.evaluations + 1)}


@dataclass(frozen=True)
class Point:
    """A place on a curve."""

    step: int
    loss: float
    """On what is held out, in nats per byte."""


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


def train_torch(task: Task, folder: Path, tell: Tell) -> None:
    torch.manual_seed(task.seed)
    module = load(task.model, device=task.device)
    _add_dropout(module, task.recipe.dropout)
    optimizer = torch.optim.AdamW(_groups(module, task), betas=task.recipe.betas, fused=True)
    if task.optimizer is not None:
        resume_torch(optimizer, task.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    checkpoint = folder / "checkpoint.pt"
    curve: list[Point] = []
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=task.device, weights_only=True)
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"].cpu())
        curve, first, seconds = [Point(*each) for each in saved["curve"]], saved["step"], saved["seconds"]
    tell(first)
    data = corpus()
    last_saved = started = time.monotonic()
    times = task.times()
    for step in range(first, task.steps + 1):
        if step in times and (not curve or curve[-1].step < step):
            curve.append(Point(step, examine(module, task)))
        if step == task.steps:
            break
        if time.monotonic() - last_saved > SAVE_EVERY:
            last_saved = time.monotonic()
            state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            state |= {"curve": [(each.step, each.loss) for each in curve], "random": torch.get_rng_state()}
            torch.save(state | {"seconds": seconds + last_saved - started}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * task.recipe.share((step + 1) / task.steps)
        window = torch.from_numpy(data.batch(task.seed, step, task.batch, task.length)).to(task.device)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.device != "cpu"):
            logits = module(window[:, :-1])
        functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(1)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    finish(task, folder, curve, module.state_dict(), seconds + time.monotonic() - started)
    checkpoint.unlink(missing_ok=True)


def _groups(module: OnnxModule, task: Task) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; by fan-in, each kind of growth is a group."""
    plan = compile_model(task.model).plan if task.recipe.by_fan_in else None
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = 1.0 if plan is None else step_factors(plan, module.initializers[name]).rate
            decay = task.recipe.weight_decay / factor if parameter.ndim > 1 else 0.0
            groups.setdefault((factor, decay), []).append((name, parameter))
    return [
        {"params": each, "lr": task.recipe.rate * factor, "weight_decay": decay}
        for (factor, decay), each in groups.items()
    ]


def _add_dropout(module: OnnxModule, share: float) -> None:
    if share:
        for layer in module.modules():
            if isinstance(layer, Block):
                layer.register_forward_hook(lambda layer, _, outputs: _dropped(layer.training, outputs, share))


def _dropped(training: bool, outputs: Any, share: float) -> Any:
    return tuple(
        functional.dropout(each, share, training) if torch.is_tensor(each) and each.is_floating_point() else each
        for each in outputs
    )


def examine(module: Any, task: Task) -> float:
    """The mean loss over the windows of the examination."""
    module.eval()
    windows = torch.from_numpy(corpus().examination(task.examined, task.length)).to(task.device)
    total = 0.0
    with torch.inference_mode():
        for part in windows.split(16):
            logits = module(part[:, :-1])
            total += functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    module.train()
    return total / (task.examined * task.length)


def finish(task: Task, folder: Path, curve: list[Point], weights: Mapping[str, Any], seconds: float) -> None:
    """Write what a run leaves; the last file says that all are there."""
    absorb(task.model, weights, folder / "model.onnx", check=False)
    with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *((each.step, f"{each.loss:.6f}") for each in curve)])
    described = asdict(task) | {"model": task.model.name, "optimizer": task.optimizer and task.optimizer.name}
    result = {"task": described, "seconds": round(seconds, 1), "loss": curve[-1].loss}
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "result.json")


def read_curve(folder: Path) -> list[Point]:
    """What a finished run left."""
    with (folder / "curve.csv").open(newline="", encoding="utf-8") as file:
        return [Point(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
