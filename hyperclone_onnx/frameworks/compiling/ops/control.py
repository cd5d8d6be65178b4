"""Loops that run a body repeatedly: Scan by a namespace's `scan`, and Loop in Python."""

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
    """ONNX's Scan: states, results = turn(*states, *slices) along an axis of each scanned array, results stacked."""
    slices = []
    for x, axis, turned in zip(scanned, axes, backwards, strict=False):
        along = xp.moveaxis(x, axis, 0)
        slices.append(xp.flip(along, axis=0) if turned else along)

    def step(carry: tuple[Array, ...], now: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        outputs = turn(*carry, *now)
        return outputs[: len(carry)], outputs[len(carry) :]

    carry, results = xp.scan(step, states, tuple(slices), slices[0].shape[0])
    stacks = []
    for x, axis, turned in zip(results, axes[len(scanned) :], backwards[len(scanned) :], strict=True):
        stacks.append(xp.moveaxis(xp.flip(x, axis=0) if turned else x, 0, axis))
    return (*carry, *stacks)


def scan_in_turns(
    xp: Any, step: Callable[..., Any], carry: tuple[Array, ...], slices: tuple[Array, ...], length: int
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """carry, results = step(carry, slices[i]) for each i, in Python; the results are stacked."""
    turns = []
    for i in range(length):
        carry, results = step(carry, tuple(x[i] for x in slices))
        turns.append(results)
    empty = tuple(xp.zeros(x.shape[1:], dtype=x.dtype, device=xp.device_of(x)) for x in slices)
    return carry, stacked(xp, turns, lambda: step(carry, empty)[1])


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
    """ONNX's Loop, turn by turn in Python. Return the last states, and the stacked results of all turns.

    A turn takes its number (a Python number if `numbered`), the condition and the states. It returns the condition of
    the next turn, the new states and its results. If `condition` is None the Loop always goes on, and turns return no
    condition.
    """
    bound, turns, i = whole(trips), [], 0

    def one(i: int, states: tuple[Any, ...], goes_on: Array | None) -> tuple[Any, ...]:
        on = xp.lift(True, 9, device) if goes_on is None else goes_on
        return turn(i if numbered else xp.lift(i, 7, device), on, *states)

    conditions = int(condition is not None)  # how many outputs of a turn are conditions
    goes_on = condition
    while (bound is None or i < bound) and (goes_on is None or bool(goes_on)):
        outputs = one(i, states, goes_on)
        goes_on = outputs[0] if conditions else None
        states = outputs[conditions : conditions + len(states)]
        turns.append(outputs[conditions + len(states) :])
        i += 1
    return (*states, *stacked(xp, turns, lambda: one(0, states, goes_on)[conditions + len(states) :]))


def stacked(xp: Any, made: list[tuple[Array, ...]], one: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
    """Stack the results of all turns (`made`) along a new first axis.

    If there was no turn, we run `one` to learn the shapes of its results, and return stacks of length 0.
    """
    if made:
        return tuple(xp.stack(results, axis=0) for results in zip(*made, strict=True))
    return tuple(xp.expand_dims(result, axis=0)[:0] for result in one())


def whole(trips: Any) -> Any:
    """The count of turns as a Python number or a symbol. None, and counts from 2^31 - 1 on, mean no bound."""
    if trips is None or (isinstance(trips, int) and trips >= 2**31 - 1):
        return None
    return int(trips) if hasattr(trips, "dtype") else trips
