"""Train a grown model in JAX, and take it back into ONNX.

    python examples/train_jax.py [MODEL] [--steps 50]

Writes into out/: the loss of each step, a checkpoint, and the trained model as ONNX.
"""

from __future__ import annotations

from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.jax import load


def main() -> None:
    options = common.arguments(__doc__)
    apply, params = load(options.model)
    optimizer = optax.adamw(options.rate, weight_decay=0.0)

    def loss_of(params: Any, ids: Any, targets: Any) -> Any:
        logits = apply(params, input_ids=ids, attention_mask=jnp.ones_like(ids))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(params: Any, state: Any, ids: Any, targets: Any) -> tuple[Any, Any, Any]:
        loss, gradient = jax.value_and_grad(loss_of)(params, ids, targets)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for ids, targets in track(list(common.batches(options)), "training"):
        params, state, loss = step(params, state, ids, targets)
        losses.append(float(loss))
    common.write_losses(losses, options.output / "jax_losses.csv")
    names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(params)}
    np.savez(options.output / "jax.npz", **names)
    result = absorb(options.model, params, options.output / "jax_trained.onnx")
    print(f"{options.output / 'jax_trained.onnx'}: {len(result.replaced)} tensors replaced")


if __name__ == "__main__":
    main()
