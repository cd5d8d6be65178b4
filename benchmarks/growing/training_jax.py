"""Does a run in JAX and Optax. These runs are short, so an interrupted run starts again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from growing.corpus import corpus
from growing.results import finish
from growing.tasks import Point, Task, Tell
from hyperclone_onnx.frameworks.jax import load

jax.config.update("jax_platforms", "cpu")


def train_jax(task: Task, folder: Path, tell: Tell) -> None:
    """See `training.train`. There are no dropout and no rates by fan-in here."""
    recipe, data = task.recipe, corpus(task.tokens)
    apply, params = load(task.model)
    decayed = jax.tree.map(lambda parameter: parameter.ndim > 1, params)
    rates = jax.numpy.asarray([recipe.rate * recipe.share((step + 1) / task.steps) for step in range(task.steps)])
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda step: rates[step],
            *recipe.betas,
            weight_decay=recipe.weight_decay,
            mask=decayed,
        ),
    )
    state = optimizer.init(params)

    def loss_of(params: Any, window: Any) -> Any:
        logits = apply(params, window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()

    @jax.jit
    def advance(params: Any, state: Any, window: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss_of)(params, window), state, params)
        return optax.apply_updates(params, updates), state

    examined = jax.jit(loss_of)
    windows = np.split(data.examination(task.examined, task.length), task.examined // 16)
    started, curve, times = time.monotonic(), [], task.times()
    for step in range(task.steps + 1):
        if step in times:
            curve.append(Point(step, float(np.mean([examined(params, window) for window in windows]))))
        if step < task.steps:
            params, state = advance(params, state, data.batch(task.seed, step, task.batch, task.length))
            tell(1)
    finish(task, folder, curve, params, time.monotonic() - started)
