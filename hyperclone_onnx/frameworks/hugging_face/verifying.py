"""Check a written checkpoint, without the whole of it in memory.

Three checks, one after the other:

* *Loading.* transformers loads the folder, and its model has the numbers that are in the files.
* *Tensors.* The repeats of each tensor, as it is in the file, add up to the tensor of the source's checkpoint.
* *Outputs.* `growing` runs the model with its weights read from the files (see `streaming`). If its outputs differ from
  the source's, `first_wrong_layer` says where that begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hyperclone_onnx.errors import ModelsDiffer
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, values
from hyperclone_onnx.frameworks.hugging_face.checking import compare_with_source
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, Loaded, load, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, put_back, squeezed
from hyperclone_onnx.frameworks.hugging_face.sources import collapsed
from hyperclone_onnx.frameworks.hugging_face.streaming import as_tensor, in_float, layer_outputs
from hyperclone_onnx.frameworks.hugging_face.writing import Writer
from hyperclone_onnx.plan.maps import Indices

Array = npt.NDArray[Any]

ROUNDINGS = 4.0
"""The number of roundings of one share that the sum of a weight's shares may be off."""

LEAST_FLOAT16 = 2.0**-24
"""The smallest positive number of float16: the step of its smallest numbers."""


class WrongTensors(ModelsDiffer):
    """Tensors in the files are not what they should be, whatever the factors are."""


def check_loads(checkpoint: Checkpoint, folder: Path, loaded: Loaded) -> None:
    """Check that transformers loads the numbers that are in the files. Their pages stay in the files.

    Args:
        checkpoint: the source's checkpoint.
        folder: the grown checkpoint's folder.
        loaded: the model of that folder whose weights stay in its files.

    Raises:
        WrongTensors: transformers finds other tensors than we do, or other numbers in one.
    """
    if loaded.stored is None:
        return
    kinds = [array.dtype.name for array in loaded.stored.values() if array.dtype.kind not in "iub"]
    kind = max(set(kinds), key=kinds.count) if kinds else "float32"
    as_user = load(folder, checkpoint.model_class, dtype=getattr(torch, kind))
    lacking = as_user.missing - loaded.missing
    if lacking:
        raise WrongTensors(f"the grown checkpoint lacks {sorted(lacking)[0]}")
    tensors = stored_tensors(as_user.model)
    for name, array in loaded.stored.items():
        own = as_tensor(array())
        if not torch.equal(own.to(tensors[name].dtype), tensors[name].detach()):
            raise WrongTensors(f"transformers loads other numbers for {name} than the grown checkpoint's files have")


@dataclass
class TensorsChecked:
    """The tensors whose repeats were added up."""

    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    """One line for each tensor that differs."""


def check_tensors(written: Mapping[str, StoredArray], writer: Writer) -> TensorsChecked:
    """Add up the repeats of every tensor of a written checkpoint, and compare with the source's checkpoint.

    The tensors of a trained file are compared with the file's numbers instead. A tensor that the file does not have is
    compared with the source's tensor, repeated.

    Args:
        written: the tensors in the checkpoint's files.
        writer: what was written: how each tensor was made, and its factors.
    """
    assembly, done = writer.assembly, TensorsChecked()
    for name in assembly.given.names:
        if name not in written:
            done.wrong.append(f"{name} is not in the files")
            continue
        done.checked += 1
        if (name not in assembly.layouts or writer.trained) and not _same(written[name], writer.entry(name)):
            done.wrong.append(f"{name} has other numbers in the files than it was given")
    if not writer.trained:
        for initializer, makers in assembly.makers.items():
            done.wrong += _of_initializer(initializer, makers, written, writer)
    return done


def _same(array: StoredArray, wanted: Any) -> bool:
    """Whether a stored tensor has the wanted numbers."""
    want = np.asarray(wanted).astype(array.dtype, copy=False)
    return array.shape == want.shape and want.tobytes() == array().tobytes()


def _of_initializer(
    initializer: str, makers: Sequence[tuple[str, Layout]], written: Mapping[str, StoredArray], writer: Writer
) -> Iterator[str]:
    """Compare an initializer, as the tensors made from it have its repeats, with the source's checkpoint."""
    assembly, grown = writer.assembly, writer.assembly.grown
    recipe = grown.recipe(initializer)
    names = [name for name, _ in makers if name in written]
    wide = np.float64 if any(written[name].dtype == np.float64 for name in names) else np.float32
    if len(makers) == 1 and _is_plain(makers[0][1]) and initializer not in assembly.also:
        name, layout = makers[0]
        if name not in written:
            return
        (piece,) = writer.layout(name).pieces
        array = _floats(written[name], wide)
        if piece.scale != 1.0 or piece.offset:
            array = (array - wide(piece.offset)) / wide(piece.scale)
        axes = tuple(grown.axes(initializer)[axis] for axis in piece.permutation)
        own = layout.pieces[0]
        want = (_floats(assembly.given.floating[name], wide) - wide(own.offset)) / wide(own.scale)
    else:
        array = np.array(grown.tensors[initializer].numpy(), dtype=wide)
        for name in names:
            put_back(writer.layout(name), _floats(written[name], wide), initializer, array, grown.axis)
        axes = grown.axes(initializer)
        want = assembly.source(initializer, writer.stored, assembly.given.floating)
    largest = float(np.abs(array).max(initial=0.0))
    scale = 1.0 if recipe is None else recipe.scale
    half = all(written[name].dtype.itemsize == 2 for name in names)
    total, torn = collapsed(array, axes, scale)
    difference = np.abs(total - want.reshape(total.shape))
    eps = max((writer.eps_of(name) for name in names), default=0.0)
    shares = grown.shared(initializer)
    tolerance = ROUNDINGS * shares * (eps * largest + (LEAST_FLOAT16 if half else 0.0)) / abs(scale)
    off = max(float(difference.max(initial=0.0)), torn)
    if not off <= tolerance:
        where = ", ".join(map(str, np.unravel_index(int(difference.argmax()), total.shape))) if total.ndim else ""
        yield (
            f"{' and '.join(names)}: its repeats do not add up to the source's tensor, or its copies differ: by "
            f"{off:.1e}, and rounding explains {tolerance:.1e} (most at [{where}] of the source's)"
        )


def _is_plain(layout: Layout) -> bool:
    """Whether a tensor is one whole initializer, perhaps transposed."""
    return len(layout.pieces) == 1 and layout.pieces[0].window is None and layout.merged is None


def _floats(array: Array | StoredArray, wide: Any) -> Array:
    """The numbers of a tensor without its axes of size one, in float32 or float64."""
    read = values(array)
    numbers = read if wide is np.float64 else np.asarray(in_float(read).numpy())
    return squeezed(np.asarray(numbers, dtype=wide))


def first_wrong_layer(
    grown: Any,
    source: Any,
    feeds: Mapping[str, Any],
    orders: Mapping[tuple[int, int], Indices],
    tolerance: float,
) -> str | None:
    """The first layer whose output is not the source's, at any scale; None where there is none.

    Args:
        grown: the grown model.
        source: its source's model.
        feeds: inputs for both, as tensors.
        orders: for sizes before and after, the source index of each index.
        tolerance: the largest relative difference that rounding explains.
    """
    got, want = layer_outputs(grown, feeds), layer_outputs(source, feeds)
    for name, array in want.items():
        if name not in got:
            continue
        scale = float(np.abs(got[name]).max(initial=0.0)) / (float(np.abs(array).max(initial=0.0)) or 1.0) or 1.0
        (error,) = compare_with_source({name: got[name] / scale}, {name: array}, orders)
        if not error.relative <= tolerance:
            return f"{name} (relative error {error.relative:.1e})"
    return None
