"""Defines a set of inputs, and converts it for a grown model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.plan.maps import Maps, presented
from hyperclone_onnx.plan.plans import Interface

Array = npt.NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """One set of inputs, with a label that describes it."""

    label: str
    feeds: Feeds


def grown(values: Mapping[str, Array], interfaces: Iterable[Interface], maps: Maps) -> Feeds:
    """Inputs or outputs of the source, repeated as the grown model has them."""
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


def is_half(array: Array) -> bool:
    """Whether an array holds floats of 16 bits; for numpy, bfloat16 is a type of another kind."""
    return array.dtype.itemsize == 2 and array.dtype.kind not in "iub"


def in_float32(feeds: Mapping[str, Array]) -> Feeds:
    """The same inputs, with half precision converted to float32."""
    return {name: array.astype(np.float32) if is_half(array) else array for name, array in feeds.items()}
