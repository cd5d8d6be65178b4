"""A part of a tensor whose numbers are changed for one expert: with noise, or with hidden units drawn anew.

A changed number depends only on the seed, the name of the tensor, the number of the expert and its place (see `noise`).
So the experts of a large block are streamed, and the same request gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.tensors.expert_parts import PartTensor
from hyperclone_onnx.tensors.noise import draw, key_of
from hyperclone_onnx.tensors.scratch import Scratch

Array = npt.NDArray[Any]
Law = Callable[[], tuple[float, float]]
"""Gives the mean and the standard deviation of a source tensor, and may read it for that."""


@dataclass(frozen=True)
class Parting:
    """How the numbers of an expert's tensor change.

    Args:
        name: the name of the tensor; it decides the drawn numbers, together with the seed and the expert.
        seed: the seed.
        expert: the number of the expert.
        noise: the standard deviation of the noise, as a part of the tensor's standard deviation.
        redrawn: the hidden units that are drawn anew.
        inner: the number of elements between two hidden units, in row-major order.
        units: the number of hidden units of the expert, that follow one another along their axis.
    """

    name: str
    seed: int
    expert: int
    noise: float = 0.0
    redrawn: tuple[int, ...] = ()
    inner: int = 1
    units: int = 1


class PartedTensor(ir.LazyTensor):
    """A part of a tensor for one expert, with numbers that differ from those of the source.

    Args:
        part: the part, as the source has it.
        parting: how its numbers change.
        law: gives the mean and the standard deviation of the whole source tensor.
    """

    def __init__(self, part: PartTensor, parting: Parting, law: Law) -> None:
        self.part, self.parting, self._law = part, parting, law
        self.kind = np.dtype(part.dtype.numpy())
        super().__init__(self._whole, dtype=part.dtype, shape=ir.Shape(part.part.shape), name=part.name)

    def _whole(self) -> ir.TensorProtocol:
        numbers = self.changed(0, self.part.numpy().reshape(-1), Scratch())
        return ir.Tensor(numbers.reshape(self.part.part.shape), dtype=self.part.dtype)

    def changed(self, start: int, numbers: Array, scratch: Scratch) -> Array:
        """The elements from a place on, from those that the part has there, shape (count,)."""
        parting, scale = self.parting, self.part.part.scale
        mean, deviation = self._law()
        width = self.part.part.shape[-1]
        first, last = start // width, -(-(start + len(numbers)) // width)
        skip = start - first * width

        def drawn(repeat: int) -> Array:
            key = key_of(parting.name, parting.seed, repeat)
            rows = draw(key, width, (first, last - first), (0, width), scratch)
            return rows.reshape(-1)[skip : skip + len(numbers)].astype(np.float64)

        result = numbers.astype(np.float64)
        if parting.noise:
            result += drawn(2 * parting.expert) * (parting.noise * deviation * scale)
        if parting.redrawn:
            units = (np.arange(start, start + len(numbers)) // parting.inner) % parting.units
            anew = self._is_redrawn[units]
            fresh = (drawn(2 * parting.expert + 1) * deviation + mean) * scale
            result[anew] = fresh[anew]
        return result.astype(self.kind)

    @cached_property
    def _is_redrawn(self) -> Array:
        mask = np.zeros(self.parting.units, dtype=bool)
        mask[list(self.parting.redrawn)] = True
        return mask


def redrawn_units(name: str, seed: int, expert: int, units: int, ratio: float) -> tuple[int, ...]:
    """The hidden units of an expert that are drawn anew: the given ratio of them, chosen by the seed.

    Args:
        name: the name of the block.
        seed: the seed.
        expert: the number of the expert.
        units: the number of its hidden units.
        ratio: the ratio, from 0 to 1.
    """
    count = math.floor(ratio * units + 0.5)
    scores = draw(key_of(f"{name}\0redrawn", seed, expert), units, (0, 1), (0, units), Scratch())[0]
    return tuple(sorted(np.argsort(scores, kind="stable")[:count].tolist()))
