"""Train a grown model in JAX, and take it back into ONNX.

    python examples/train_jax.py [MODEL] [--steps 50] [--resume]

Writes into out/: the loss of each step as CSV and PNG, Orbax checkpoints, and the trained model as ONNX.
"""

from __future__ import annotations

import shutil
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.jax import load


def main() -> None:
    options = common.arguments(__doc__)
    apply, params = load(options.model)
    optimizer = optax.adamw(options.rate, weight_decay=0.0)
    state, losses = optimizer.init(params), jnp.zeros(0)
    folder = (options.output / "jax").resolve()
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)
    checkpoints = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    if options.resume:
        done = checkpoints.latest_step()
        like = {"params": params, "state": state, "losses": jnp.zeros(done)}
        saved = checkpoints.restore(done, args=ocp.args.StandardRestore(like))
        params, state, losses = saved["params"], saved["state"], saved["losses"]

    def loss_of(params: Any, ids: Any, targets: Any) -> Any:
        logits = apply(params, input_ids=ids, attention_mask=jnp.ones_like(ids))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(params: Any, state: Any, ids: Any, targets: Any) -> tuple[Any, Any, Any]:
        loss, gradient = jax.value_and_grad(loss_of)(params, ids, targets)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    first = len(losses)
    for ids, targets in common.progress(common.batches(options, first), options.steps - first):
        params, state, loss = step(params, state, ids, targets)
        losses = jnp.append(losses, loss)
        if len(losses) % 25 == 0 or len(losses) == options.steps:
            saved = {"params": params, "state": state, "losses": losses}
            checkpoints.save(len(losses), args=ocp.args.StandardSave(saved))
    checkpoints.wait_until_finished()
    common.draw_losses(losses.tolist(), options.output / "jax_losses.csv")
    result = absorb(options.model, folder, options.output / "jax_trained.onnx")
    print(f"{options.output / 'jax_trained.onnx'}: {len(result.replaced)} tensors replaced")


if __name__ == "__main__":
    main()
