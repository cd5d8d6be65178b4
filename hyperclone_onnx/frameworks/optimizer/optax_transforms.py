"""optax transforms with which a grown model goes on as its source would, and the clipping of its gradient.

    optimizer = optax.chain(clip_by_source_norm(apply, 1.0), adamw(apply, params, 3e-4, weight_decay=0.1))

The settings are those of the *source's* training, as in `groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hyperclone_onnx.analysis.trainable import matches
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.continuation import (
    AdamWFactors,
    Continuation,
    Parametrisation,
    adamw_factors,
    sgd_factors,
)

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as problem:
    raise MissingExtra("jax", problem) from problem

Rate = float | Callable[[Any], Any]
"""A learning rate, or a schedule: the number of steps -> the rate."""


def adamw(
    apply: Any,
    params: Mapping[str, Any],
    learning_rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    continue_from: Literal["source"] = "source",
    parametrisation: Parametrisation = "exact",
    no_decay: Sequence[str] = (),
) -> optax.GradientTransformation:
    """``optax.adamw`` with which a grown model goes on as its source would.

    Args:
        apply: the function of `frameworks.jax.load`.
        params: the parameters of `frameworks.jax.load`.
        learning_rate: the learning rate of the source, or its schedule.
        b1: the decay of the mean of gradients.
        b2: the decay of the mean of squared gradients.
        eps: the eps of the source.
        weight_decay: the weight decay of the source.
        continue_from: the model to whose training the settings belong; the source is the only choice.
        parametrisation: "exact", or "mup"; see `groups.adamw_groups`.
        no_decay: globs of parameter paths (with dots) that have no weight decay.

    Raises:
        BadRequest: `apply` does not know how a parameter grew.
    """
    del continue_from

    def of(factors: AdamWFactors, decays: bool) -> optax.GradientTransformation:
        rate, decay = _times(learning_rate, factors.rate), weight_decay * factors.weight_decay * decays
        return optax.adamw(rate, b1, b2, eps * factors.eps, weight_decay=decay)

    def settings(name: str, tensor: Continuation) -> tuple[AdamWFactors, bool]:
        return adamw_factors(tensor, parametrisation), not matches(name, no_decay)

    return _partition(apply, params, settings, of)


def sgd(
    apply: Any, params: Mapping[str, Any], learning_rate: Rate, *, momentum: float | None = None, nesterov: bool = False
) -> optax.GradientTransformation:
    """``optax.sgd`` with which a grown model goes on as its source would. See `adamw` for arguments and errors."""

    def settings(_: str, tensor: Continuation) -> tuple[float]:
        return (sgd_factors(tensor).rate,)

    def of(rate: float) -> optax.GradientTransformation:
        return optax.sgd(_times(learning_rate, rate), momentum, nesterov)

    return _partition(apply, params, settings, of)


def clip_by_source_norm(apply: Any, max_norm: float) -> optax.GradientTransformation:
    """Clip the gradient by the norm of the source's gradient, as ``optax.clip_by_global_norm`` does in its training.

    Args:
        apply: the function of `frameworks.jax.load`.
        max_norm: the largest norm, as in the source's training.
    """

    def update(gradients: Any, state: Any, _: Any = None) -> tuple[Any, Any]:
        squares = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _known(apply, _name(path)).norm * jnp.sum(jnp.square(leaf)), gradients
        )
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        limit = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda leaf: (leaf * limit).astype(leaf.dtype), gradients), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _partition(
    apply: Any,
    params: Mapping[str, Any],
    settings: Callable[[str, Continuation], tuple[Any, ...]],
    of: Callable[..., optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One transform for each set of settings."""
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: repr(settings(_name(path), _known(apply, _name(path)))), params
    )
    kinds = {
        repr(values): values for name, tensor in apply.continuations.items() for values in [settings(name, tensor)]
    }
    return optax.partition({label: of(*values) for label, values in kinds.items()}, labels)


def _times(rate: Rate, factor: float) -> Rate:
    return (lambda step: rate(step) * factor) if callable(rate) else rate * factor


def _name(path: Any) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="."))


def _known(apply: Any, name: str) -> Continuation:
    known: Mapping[str, Continuation] = getattr(apply, "continuations", {})
    if name not in known:
        raise BadRequest(f"apply does not say how the parameter {name!r} grew: give the function that load returned")
    return known[name]
