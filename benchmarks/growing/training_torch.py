"""Does a run in PyTorch. An interrupted run continues from its last checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from growing.corpus import corpus
from growing.results import finish
from growing.tasks import Point, Task, Tell
from hyperclone_onnx.frameworks.continuation import adamw_factors
from hyperclone_onnx.frameworks.optimizer.groups import adamw_groups, clip_grad_norm
from hyperclone_onnx.frameworks.optimizer.resume import resume_torch
from hyperclone_onnx.frameworks.torch import Block, OnnxModule, load

SAVE_EVERY = 20.0
"""Seconds between checkpoints."""


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
        curve, first, seconds = [Point(*numbers) for numbers in saved["curve"]], saved["step"], saved["seconds"]
    tell(first)
    data = corpus(task.tokens)
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
            state |= {"curve": [(point.step, point.loss) for point in curve], "random": torch.get_rng_state()}
            torch.save(state | {"seconds": seconds + last_saved - started}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * task.recipe.share((step + 1) / task.steps)
        window = torch.from_numpy(data.batch(task.seed, step, task.batch, task.length)).to(task.device)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.device != "cpu"):
            logits = module(window[:, :-1])
        functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten()).backward()
        if task.recipe.exact:
            clip_grad_norm(module, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(1)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    finish(task, folder, curve, module.state_dict(), seconds + time.monotonic() - started)
    checkpoint.unlink(missing_ok=True)


def _groups(module: OnnxModule, task: Task) -> list[dict[str, Any]]:
    """The parameter groups: only matrices decay. With rates by fan-in, each growth of the fan-in is a group."""
    if task.recipe.exact:
        vectors = [name for name, parameter in module.named_parameters() if parameter.ndim < 2]
        decay = task.recipe.weight_decay
        return adamw_groups(module, lr=task.recipe.rate, weight_decay=decay, no_decay=vectors)
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = adamw_factors(module.continuations[name]).rate if task.recipe.by_fan_in else 1.0
            decay = task.recipe.weight_decay / factor if parameter.ndim > 1 else 0.0
            groups.setdefault((factor, decay), []).append((name, parameter))
    return [
        {"params": named, "lr": task.recipe.rate * factor, "weight_decay": decay}
        for (factor, decay), named in groups.items()
    ]


def _add_dropout(module: OnnxModule, share: float) -> None:
    if share:
        for layer in module.modules():
            if isinstance(layer, Block):
                layer.register_forward_hook(lambda layer, _, outputs: _dropped(layer.training, outputs, share))


def _dropped(training: bool, outputs: Any, share: float) -> Any:
    return tuple(
        functional.dropout(value, share, training) if torch.is_tensor(value) and value.is_floating_point() else value
        for value in outputs
    )


def examine(module: Any, task: Task) -> float:
    """The mean loss over the evaluation windows."""
    module.eval()
    windows = torch.from_numpy(corpus(task.tokens).examination(task.examined, task.length)).to(task.device)
    total = 0.0
    with torch.inference_mode():
        for part in windows.split(16):
            logits = module(part[:, :-1])
            total += functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    module.train()
    return total / (task.examined * task.length)
