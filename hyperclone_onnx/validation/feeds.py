"""Random inputs that a model accepts, made from what inference knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.analysis.roles import source_input
from hyperclone_onnx.plan.maps import Maps, presented
from hyperclone_onnx.plan.plans import Interface
from hyperclone_onnx.rules.dimensions import Dimensions

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

LENGTHS: tuple[tuple[int, ...], ...] = ((2, 7, 3, 5), (1, 5, 2, 9), (3, 11, 1, 13), (2, 32, 32, 32), (1, 64, 64, 64))
"""Lengths for a model's symbols, in order of appearance (the first is mostly the batch). The last rows serve
models that want round numbers (images); a row on which the source does not run is passed over."""

CACHED: tuple[tuple[int, ...], ...] = ((2, 7, 3, 5), (3, 11, 4, 13), (2, 1, 6, 7), (1, 5, 2, 9))
"""Lengths where there is a cache, which is empty in the second row: a prompt, one new token for each of several
sequences, and several for one (ONNX Runtime's attention takes no more on the CPU)."""


def in_float32(feeds: Mapping[str, Array]) -> Feeds:
    """The same inputs, those in half precision widened."""
    return {
        name: array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iub" else array
        for name, array in feeds.items()
    }


@dataclass(frozen=True)
class Case:
    """One set of inputs, and what it is."""

    label: str
    feeds: Feeds


def cases(dimensions: Dimensions, seed: int = 0, lengths: Sequence[tuple[int, ...]] | None = None) -> Iterator[Case]:
    """Input sets with odd lengths: all-ones and padded masks, indices within their tables, empty caches too.

    Args:
        dimensions: of the model to feed.
        seed: draws them.
        lengths: for the model's symbols, in order of appearance, in the place of the odd ones: one set for each,
            without padding; caches are empty.
    """
    symbols = _symbols(dimensions)
    limits = _limits(dimensions)
    cached = _cached(dimensions)
    if lengths is not None:
        for number, wanted in enumerate(lengths):
            values = {name: wanted[min(i, len(wanted) - 1)] for i, name in enumerate(symbols)}
            values |= dict.fromkeys(cached, 0)
            rng = np.random.default_rng([seed, number])
            yield Case(_label(values), _make(dimensions, values, limits, rng, padded=False))
        return
    for number, each in enumerate((*CACHED, *LENGTHS[3:]) if cached else LENGTHS):
        values = {name: each[min(i, 3)] + 2 * max(0, i - 3) for i, name in enumerate(symbols)}
        if number == 1:
            values |= dict.fromkeys(cached, 0)
        rng = np.random.default_rng([seed, number])
        yield Case(_label(values), _make(dimensions, values, limits, rng, padded=number % 2 == 1))
        if not symbols:
            break


def _label(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "fixed sizes"


def _symbols(dimensions: Dimensions) -> list[str]:
    """The symbols of the graph's inputs that no other symbols determine, in order of appearance."""
    found: dict[str, None] = {}
    for value in dimensions.model.graph.inputs:
        for term in dimensions.axes.get(value) or ():
            for monomial, _ in dimensions.space.size(term).terms:
                for name in monomial:
                    found.setdefault(name)
    return list(found)


def _cached(dimensions: Dimensions) -> list[str]:
    """The lengths of caches: on several inputs of four axes, of keys and of values, and on no other input alone."""
    on: dict[str, list[bool]] = {}
    for value in dimensions.model.graph.inputs:
        axes = dimensions.axes.get(value) or ()
        of_heads = len(axes) >= 4 and value.dtype is not None and value.dtype.is_floating_point()
        for term in axes:
            name = dimensions.space.size(term).lone_symbol
            if name is not None:
                on.setdefault(name, []).append(of_heads)
    return [name for name, seen in on.items() if all(seen) and len(seen) > 1]


def _limits(dimensions: Dimensions) -> dict[ir.Value, int]:
    """For each integer input, the smallest table that its values index."""
    limits: dict[ir.Value, int] = {}
    for indices, term in dimensions.index_tables:
        origin = source_input(dimensions, indices)
        size = dimensions.space.static(term)
        if origin is not None and size is not None:
            limits[origin] = min(size, limits.get(origin, size))
    return limits


def _length(dimensions: Dimensions, term: Term, values: Mapping[str, int]) -> int:
    known: dict[str, Size] = {name: Size.of(value) for name, value in values.items()}
    return dimensions.space.size(term).substituted(known).static_or(1)


def _make(
    dimensions: Dimensions,
    values: Mapping[str, int],
    limits: Mapping[ir.Value, int],
    rng: np.random.Generator,
    padded: bool,
) -> Feeds:
    feeds: Feeds = {}
    for value in dimensions.model.graph.inputs:
        axes = dimensions.axes.get(value)
        if axes is None:
            continue
        shape = tuple(_length(dimensions, term, values) for term in axes)
        feeds[value.name or ""] = _fill(value, shape, limits.get(value), rng, padded)
    return feeds


def _fill(value: ir.Value, shape: tuple[int, ...], limit: int | None, rng: np.random.Generator, padded: bool) -> Array:
    dtype = value.dtype or ir.DataType.FLOAT
    kind = dtype.numpy()
    if dtype.is_floating_point():
        return np.asarray(rng.standard_normal(shape) * 0.5).astype(kind)
    if limit is not None:
        return rng.integers(0, limit, shape).astype(kind)
    # An integer that indexes nothing is a mask or a flag: ones, with some padding at the end.
    mask = np.ones(shape, dtype=kind)
    if padded and dtype == ir.DataType.BOOL and mask.size == 1:
        return np.zeros_like(mask)  # a switch, such as a merged decoder's use_cache_branch
    if padded and mask.ndim and mask.shape[-1] > 2 and mask.size > mask.shape[-1]:
        mask[-1, ..., -2:] = 0
    return mask


def grown(values: Feeds, interfaces: tuple[Interface, ...], maps: Maps) -> Feeds:
    """Inputs (or outputs) of the source as the grown model has them: repeated by the interface's maps."""
    result = dict(values)
    for interface in interfaces:
        array = result.get(interface.name)
        if array is None:
            continue
        for axis, factors in enumerate(interface.axes):
            if factors is not None and array.shape[axis] > 0:
                array = np.take(array, presented(factors, maps), axis=axis)
        result[interface.name] = array
    return result
