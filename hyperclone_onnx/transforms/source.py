"""Reads the source of a growth from its file, normalises it and transforms it, for every command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, Refused
from hyperclone_onnx.plan.plans import TransformStep
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.checker import refuse_if_malformed
from hyperclone_onnx.reading.in_memory import IN_MEMORY, NAME, GivenModel, path_of, taken
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.system.stamps import Stamp
from hyperclone_onnx.transforms import experts, identity, layers, more_experts, separate  # noqa: F401  (registers them)
from hyperclone_onnx.transforms.registry import transformed


@dataclass(frozen=True)
class Source:
    """A transformed source graph, and the files that it was read from."""

    path: Path
    model: ir.Model
    stamps: Mapping[Path, Stamp]
    """For each file, the stamp that tells whether the file was changed."""
    transforms: tuple[TransformStep, ...] = ()


def source_of(given: GivenModel, transforms: Iterable[TransformStep] = ()) -> Source:
    """Read a source, normalise its graph, and apply the transforms that a plan records.

    Args:
        given: the model file, or a model in memory, which is not changed.
        transforms: the steps, in order.

    Raises:
        BadModel: the file is not a readable, complete ONNX model, or was changed while being read, or this release
            does not have one of the transforms.
        Refused: the opset of the model is too old, or a transform cannot be applied to it.
    """
    steps = tuple(transforms)
    if isinstance(given, IN_MEMORY):
        file, model, stamps = Path(NAME), taken(given), dict[Path, Stamp]()
    else:
        file = path_of(given)
        model, stamps = _read(file)
    try:
        model = transformed(normalise(model), steps)
    except (BadModel, Refused) as problem:
        raise type(problem)(f"{file}: {problem}") from problem
    except (MemoryError, OSError):
        raise
    except Exception as problem:
        refuse_if_malformed(given, str(file), problem)
        raise
    return Source(file, model, stamps, steps)


def _read(file: Path) -> tuple[ir.Model, dict[Path, Stamp]]:
    """The model in a file, and the stamps of all files that it is read from."""
    before = loading.stamps({file.resolve()}) if file.is_file() else {}
    model = loading.load(file)
    loading.check_unchanged(before)
    return model, loading.stamps(loading.source_files(file, model))
