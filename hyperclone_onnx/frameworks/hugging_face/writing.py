"""Write a grown checkpoint: weights, configuration, manifest, and the files that are copied."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import dtype_named
from hyperclone_onnx.frameworks.continuation import Continuation, continuations
from hyperclone_onnx.frameworks.hugging_face.assembly import Assembly
from hyperclone_onnx.frameworks.hugging_face.checking import Rounding, is_half
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, written_config
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, grown_shape
from hyperclone_onnx.frameworks.hugging_face.reading import manifest
from hyperclone_onnx.frameworks.hugging_face.report import Report
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation
from hyperclone_onnx.frameworks.hugging_face.sources import Source
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.progress import Progress
from hyperclone_onnx.writing.safetensors_files import write_safetensors

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Writer:
    """What is written, and how much of it is rounded."""

    checkpoint: Checkpoint
    assembly: Assembly
    stored: Mapping[str, Source]
    """The initializers as the source has them."""
    folded: Mapping[str, Compensation]
    """The factors that the tensors get."""
    trained: bool
    """Whether the file was trained after it was grown."""
    dtype: str | None
    """The type that the caller asks for; None for the types of the source's checkpoint."""
    deeper: Sequence[Change] = ()
    """The changes of the configuration that say the layers. The checkpoint's fields have them already."""

    def type_of(self, name: str) -> np.dtype[Any]:
        """The type in which a floating tensor is written."""
        return self.checkpoint.type_of(name) if self.dtype is None else dtype_named(self.dtype)

    def write(
        self,
        folder: Path,
        changes: Sequence[Change],
        largest_file: int,
        report: Report,
        progress: Progress | None = None,
    ) -> None:
        """Write everything into a folder, and fill the report."""
        assembly, given = self.assembly, self.assembly.given
        entries: dict[str, Any] = {}
        for name in given.names:
            entries[name] = self.entry(name)
            if name in assembly.layouts:
                report.matched[name] = assembly.layouts[name].described()
                if all(assembly.grown.recipe(piece.initializer) is None for piece in assembly.layouts[name].pieces):
                    report.unchanged[name] = "no axis of it grows"
            elif name in assembly.repeated:
                repeated = assembly.repeated[name]
                if repeated.grows:
                    report.repeated[name] = f"{list(repeated.array.shape)} -> {list(entries[name].shape)}"
                else:
                    report.unchanged[name] = "it is not in the file, and keeps its size"
            else:
                report.unchanged[name] = "whole numbers"
            if name in self.folded:
                fold = self.folded[name]
                plus = f" of it plus {fold.offset:g}" if fold.offset else ""
                report.compensations[name] = f"times {fold.factor:.8g}{plus}"
        files = write_safetensors(entries, folder, largest_file, metadata={"format": "pt"}, progress=progress)
        report.parameters = len(entries), sum(math.prod(entry.shape) for entry in entries.values())
        report.weights = [file.name for file in files]
        report.dtype = self.dtype or self.checkpoint.main_type.name
        self._write_config(folder, changes, report)
        report.copied = self.checkpoint.copy_files(folder)
        self._write_manifest(folder, {name: np.asarray(entries[name]) for name in assembly.repeated})
        _note_sizes(folder, report)
        report.notes += [
            f"{name} was left out: its weights do not belong to the model" for name in self.checkpoint.other_weights
        ]

    def entry(self, name: str) -> Any:
        """A tensor of the checkpoint, as it is written. One that is made from initializers is made when it is read."""
        assembly = self.assembly
        if name in assembly.layouts:
            return assembly.written(self.layout(name), self.stored, self.type_of(name), self.trained)
        if name in assembly.repeated:
            fold = self.folded.get(name, Compensation(1.0))
            return assembly.repeated[name].made(fold.factor, fold.offset).astype(self.type_of(name))
        return assembly.given.others[name]

    def layout(self, name: str) -> Layout:
        """How a tensor is made from initializers, with the factor that it gets."""
        return self._layout(name, self.assembly.layouts[name])

    def _layout(self, name: str, layout: Layout) -> Layout:
        fold = self.folded.get(name)
        return layout if fold is None else layout.scaled(fold.factor, fold.offset)

    def _write_config(self, folder: Path, changes: Sequence[Change], report: Report) -> None:
        fields = written_config(self.checkpoint, changes)
        report.config = {change.name: (change.before, change.after) for change in (*self.deeper, *changes)}
        for key in ("dtype", "torch_dtype"):
            if self.dtype is not None and key in fields and fields[key] != self.dtype:
                report.config[key] = (fields[key], self.dtype)
                fields[key] = self.dtype
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def _write_manifest(self, folder: Path, elsewhere: Mapping[str, Array]) -> None:
        assembly = self.assembly
        layouts = {name: self._layout(name, layout) for name, layout in assembly.layouts.items()}
        also = {
            initializer: (name, self._layout(name, layout)) for initializer, (name, layout) in assembly.also.items()
        }
        data = manifest(assembly.grown, layouts, also, elsewhere, self._continuations(elsewhere))
        (folder / HUGGING_FACE).write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")

    def _continuations(self, elsewhere: Mapping[str, Array]) -> dict[str, Continuation]:
        """How each tensor follows the source's in training. It has the factors that are folded into it, too."""
        layouts, grown = self.assembly.layouts, self.assembly.grown
        names = {piece.initializer for layout in layouts.values() for piece in layout.pieces}
        known = continuations(grown.plan, names)
        result = {name: Continuation(reason="the ONNX file does not have it") for name in elsewhere}
        for name, layout in layouts.items():
            pieces = {replace(known[piece.initializer], shapes=None) for piece in layout.pieces}
            tensor, fold = known[layout.pieces[0].initializer], self.folded.get(name, Compensation(1.0))
            reason = tensor.reason
            if len(pieces) > 1:
                reason = reason or "it is made of several tensors, which grew in different ways"
            elif fold.offset and fold.factor != 1.0:
                reason = reason or "weight decay pulls its stored numbers to another point"
            shapes = tensor.shapes and (layout.shape, grown_shape(layout, grown.axis))
            result[name] = replace(
                tensor,
                weight=tensor.weight * abs(fold.factor),
                gradient=tensor.gradient / abs(fold.factor),
                shapes=shapes,
                reason=reason,
            )
        return result

    def _folds(self, name: str) -> list[float]:
        """The numbers by which a tensor is multiplied. NaN stands for an added number."""
        fold = self.folded.get(name)
        return [] if fold is None else [fold.factor, fold.offset and math.nan]

    def is_rounded(self, name: str) -> bool:
        """Whether half precision would round a tensor that is made from initializers."""
        recipes = [self.assembly.grown.recipe(piece.initializer) for piece in self.assembly.layouts[name].pieces]
        factors = [1.0 if recipe is None else recipe.scale for recipe in recipes]
        narrowed = _coarser(self.type_of(name), self.checkpoint.type_of(name))
        return narrowed or not all(map(_is_exact, (*factors, *self._folds(name))))

    def eps_of(self, name: str) -> float:
        """The relative rounding of one share of a tensor that is made from initializers.

        Shares in half precision add up exactly, unless the tensor is rounded besides. They are added up in float32.
        """
        dtype = self.type_of(name)
        return _eps(np.dtype(np.float32)) if is_half(dtype) and not self.is_rounded(name) else _eps(dtype)

    def rounding(self) -> Rounding:
        """How far half precision moves the written numbers from the source's and from the file's."""
        source: list[float] = []
        file: list[float] = []
        assembly, grown = self.assembly, self.assembly.grown
        for name, layout in assembly.layouts.items():
            dtype = self.type_of(name)
            stored = [grown.tensors[piece.initializer].dtype.numpy() for piece in layout.pieces]
            folds = self._folds(name)
            if is_half(dtype) and self.is_rounded(name):
                source.append(_eps(dtype))
            if is_half(dtype) and not all(map(_is_exact, folds)):
                file.append(_eps(dtype))
            file += [_eps(kind) for kind in {dtype, *stored} if is_half(kind) and {kind} != {dtype, *stored}]
        used = {piece.initializer for layout in assembly.layouts.values() for piece in layout.pieces}
        for name, tensor in grown.tensors.items():
            if name not in used and name not in assembly.also and is_half(tensor.dtype.numpy()):
                file.append(_eps(tensor.dtype.numpy()))
        return Rounding(tuple(source), tuple(file))


def _is_exact(factor: float) -> bool:
    """Whether a product with this factor is never rounded: powers of two, and the 0 of an offset that is not there."""
    return abs(math.frexp(factor)[0]) in (0.0, 0.5)


def _coarser(a: np.dtype[Any], b: np.dtype[Any]) -> bool:
    """Whether one type rounds numbers of the other."""
    return a != b and _eps(a) > _eps(b)


def _eps(dtype: np.dtype[Any]) -> float:
    return eps_of(ir.DataType.from_numpy(dtype))


def _note_sizes(folder: Path, report: Report) -> None:
    """Note in the report which copied JSON files still state a size that has grown (a pooling layer's width)."""
    changed = {before: after for before, after in report.config.values() if isinstance(before, int)}
    for name in report.copied:
        path = folder / name
        if path.suffix != ".json" or path.stat().st_size > 1 << 16:
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        for key, value in data.items() if isinstance(data, dict) else ():
            if type(value) is int and value in changed and "dim" in key:
                report.notes.append(
                    f"{name} is copied as it is: its {key} is {value}, {changed[value]} in the grown model"
                )
