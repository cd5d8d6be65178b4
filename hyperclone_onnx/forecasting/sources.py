"""Chooses the model to grow from, where the user leaves it open."""

from __future__ import annotations

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.forecasting.answers import Source
from hyperclone_onnx.forecasting.curves import Chosen


def choose_source(chosen: Chosen, target: float, size: float | None, tokens: float | None) -> Source | None:
    """The source of a growth: as asked, or the largest size below the target, trained as long as its longest run.

    Where a run of this size and length was measured, its loss is taken from there.

    Args:
        chosen: the losses.
        target: the weights of the target.
        size: the weights of the source; None for the largest size below the target.
        tokens: the tokens of its training; None for those of its longest run.

    Returns:
        The source; None if no size is below the target and none was asked for.

    Raises:
        BadRequest: the size was never measured, and the tokens are not given.
    """
    if size is None:
        smaller = [one for one in chosen.sizes if one < target]
        if not smaller:
            return None
        size = smaller[-1]
    runs = [one for one in chosen.observations if one.size == size]
    if tokens is None:
        if not runs:
            raise BadRequest(
                f"no curve has {size:g} weights: give --source-tokens, the tokens of the source's training"
            )
        longest = max(runs, key=lambda one: one.tokens)
        return Source(size, longest.tokens, longest.loss)
    measured = [one.loss for one in runs if one.tokens == tokens]
    return Source(size, tokens, sum(measured) / len(measured) if measured else None)
