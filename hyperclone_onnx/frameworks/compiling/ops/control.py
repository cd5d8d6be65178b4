"""What runs a body again and again, in the terms of a namespace's `scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array


def walk(
    xp: Any,
    turn: Callable[..., tuple[Array, ...]],
    states: tuple[Array, ...],
    scanned: tuple[Array, ...],
    axes: tuple[int, ...],
    backwards: tuple[int, ...],
) -> tuple[Array, ...]:
    """ONNX's Scan: states, made = turn(*states, *slices) along an axis of each scanned array, made ones stacked."""
    slices = []
    for x, axis, turned in zip(scanned, axes, backwards, strict=False):
        along = xp.moveaxis(x, axis, 0)
        slices.append(xp.flip(along, axis=0) if turned else along)

    def step(carry: tuple[Array, ...], now: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        found = turn(*carry, *now)
        return found[: len(carry)], found[len(carry) :]

    carry, made = xp.scan(step, states, tuple(slices), slices[0].shape[0])
    laid = []
    for x, axis, turned in zip(made, axes[len(scanned) :], backwards[len(scanned) :], strict=True):
        laid.append(xp.moveaxis(xp.flip(x, axis=0) if turned else x, 0, axis))
    return (*carry, *laid)


def scan_in_turns(
    xp: Any, step: Callable[..., Any], carry: tuple[Array, ...], slices: tuple[Array, ...], length: int
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """carry, made = step(carry, slices[i]) for each i, in Python; made ones stacked."""
    made = []
    for i in range(length):
        carry, found = step(carry, tuple(x[i] for x in slices))
        made.append(found)
    empty = tuple(xp.zeros(x.shape[1:], dtype=x.dtype, device=xp.device_of(x)) for x in slices)
    return carry, stacked(xp, made, lambda: step(carry, empty)[1])


def loop_in_turns(
    xp: Any,
    turn: Callable[..., tuple[Array, ...]],
    trips: Any,
    condition: Array | None,
    states: tuple[Any, ...],
    *,
    numbered: bool,
    device: Any,
) -> tuple[Any, ...]:
    """ONNX's Loop, turn by turn in Python: the last states, and what all turns made, stacked.

    A turn is given its number (a Python number when `numbered`), whether to go on, and the states. Without a condition
    it always goes on, and turns say nothing of it.
    """
    bound, made, i = whole(trips), [], 0

    def one(i: int, states: tuple[Any, ...], goes_on: Array | None) -> tuple[Any, ...]:
        on = xp.lift(True, 9, device) if goes_on is None else goes_on
        return turn(i if numbered else xp.lift(i, 7, device), on, *states)

    known = int(condition is not None)
    goes_on = condition
    while (bound is None or i < bound) and (goes_on is None or bool(goes_on)):
        found = one(i, states, goes_on)
        goes_on = found[0] if known else None
        states = found[known : known + len(states)]
        made.append(found[known + len(states) :])
        i += 1
    return (*states, *stacked(xp, made, lambda: one(0, states, goes_on)[known + len(states) :]))


def stacked(xp: Any, made: list[tuple[Array, ...]], one: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
    """What turns made, along a new first axis; of no turns, nothing of the shape that one would have made."""
    if made:
        return tuple(xp.stack(each, axis=0) for each in zip(*made, strict=True))
    return tuple(xp.expand_dims(each, axis=0)[:0] for each in one())


def whole(trips: Any) -> Any:
    """A count of turns as a Python number (or a framework's symbol); None and the largest integers are no bound."""
    if trips is None or (isinstance(trips, int) and trips >= 2**31 - 1):
        return None
    return int(trips) if hasattr(trips, "dtype") else trips
