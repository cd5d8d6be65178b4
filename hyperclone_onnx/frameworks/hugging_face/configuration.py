"""Search for the configuration whose model has tensors of the wanted shapes.

The search knows no field by its name. Candidates are the fields whose value equals a size that grows. To try a set of
changes, we build the model without weights and compare all shapes.

Some fields change no tensor's shape (the number of heads, where one matrix computes all heads). The search changes them
too; `measuring.effective` then decides which of them matter.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.initialization import no_init_weights

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, implementations, quiet, stored_tensors
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Maps, Named, ProductOf, grown_size
from hyperclone_onnx.plan.plans import Plan

Path = tuple[str | int, ...]
Shapes = Mapping[str, tuple[int, ...]]

MOST_BUILDS = 600
"""The search stops after it has built this many models without weights."""


@dataclass(frozen=True)
class Change:
    """A field that changes: the keys that lead to it, and its values before and after."""

    path: Path
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """The field's keys joined by dots, as in ``text_config.hidden_size``."""
        return ".".join(str(part) for part in self.path)


def sizes(plan: Plan) -> dict[int, list[int]]:
    """The sizes that grow in a plan, each with the sizes that it may have afterwards.

    A size may belong to several things that grow by different factors. Products and sums of neighbouring parts of an
    axis count too, because a field may hold the size of several heads, or of joined queries, keys and values.
    """
    grown_sizes: dict[int, list[int]] = {}
    maps = plan.maps

    def add(parts: Sequence[Axis]) -> None:
        before = grown_size(ProductOf(tuple(parts)), _unmapped(maps))
        after = grown_size(ProductOf(tuple(parts)), maps)
        if before != after and after not in grown_sizes.setdefault(before, []):
            grown_sizes[before].append(after)

    def walk(parts: Sequence[Axis]) -> None:
        for start, stop in itertools.combinations(range(len(parts) + 1), 2):
            add(parts[start:stop])
        for part in parts:
            match part:
                case ProductOf(inner):
                    walk(inner)
                case ConcatOf(inner):
                    for segment in inner:
                        walk((segment,))
                    for start, stop in itertools.combinations(range(len(inner) + 1), 2):
                        add((ConcatOf(inner[start:stop]),))
                case _:
                    pass

    seen: set[tuple[Axis, ...]] = set()
    for recipe in plan.tensors.values():
        for axis in recipe.axes:
            if axis not in seen:
                seen.add(axis)
                walk(axis)
    for name in maps:
        add((Named(name),))
    return grown_sizes


def _unmapped(maps: Maps) -> Maps:
    """Maps with which every dimension keeps its size."""
    from hyperclone_onnx.plan.maps import SourceMap

    return {name: SourceMap(source_map.size, tile=1) for name, source_map in maps.items()}


class Search:
    """A search for the changes of a checkpoint's configuration with which its model has the wanted shapes.

    Args:
        checkpoint: the source's checkpoint.
        plan: the plan by which the ONNX file grew. It gives the sizes that grow.
        wanted: the grown shapes that are certain, by the name of the tensor.
        source: the shapes of all stored tensors of the source's model.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, wanted: Shapes, source: Shapes) -> None:
        self.checkpoint = checkpoint
        self.wanted = wanted
        self.source = source
        self.sizes = sizes(plan)
        self.ratios = sorted({dim.grown // dim.size for dim in plan.maps.values() if dim.grown % dim.size == 0})
        self.fields = checkpoint.config.to_dict()
        self.built: dict[tuple[Change, ...], Shapes | None] = {}

    def shapes(self, changes: Sequence[Change]) -> Shapes | None:
        """The shapes of the model's tensors with some changes; None where the model cannot be built.

        The order of the changes does not matter. Each set of changes is built once.
        """
        key = tuple(sorted(changes, key=lambda change: change.name))
        if key not in self.built:
            self.built[key] = built_shapes(self.checkpoint, key)
        return self.built[key]

    def wrong(self, changes: Sequence[Change]) -> int:
        """The number of tensors whose shape is not the wanted one; more than all where the model is no candidate."""
        shapes = self.shapes(changes)
        if shapes is None or shapes.keys() != self.source.keys():
            return len(self.wanted) + 1
        return sum(shapes[name] != shape for name, shape in self.wanted.items())

    def run(self) -> list[Change]:
        """Changes with which every tensor has the wanted shape, as many of them as possible.

        Changes that affect no tensor's shape are included, because they may affect activations.

        Raises:
            Refused: the search ended without such changes.
        """
        options = self._options()
        changes = self._fitting(options)
        for path, values in options.items():
            if not any(change.path == path for change in changes):
                more = [*changes, self._change(path, values[0])]
                changes = more if self.wrong(more) == 0 else changes
        return changes

    def others(self, changes: Sequence[Change]) -> Iterator[list[Change]]:
        """Other changes with which every tensor has the wanted shape: in each, one field of `changes` stays as it was.

        Shapes alone do not tell more heads from larger ones, if a number of heads is also the size of a head.
        """
        every = self._options()
        for change in changes:
            options = {path: values for path, values in every.items() if path != change.path}
            for start in self._starts(options):
                chosen = self._descend(start, options)
                if self.wrong(chosen) == 0:
                    yield chosen
                    break

    def _options(self) -> dict[Path, list[int]]:
        """The values that each field may take: of fields whose value is a size that grows."""
        return {path: self.sizes[value] for path, value in integers(self.fields) if value in self.sizes}

    def _fitting(self, options: Mapping[Path, Sequence[int]]) -> list[Change]:
        """Changes with which every tensor has the wanted shape; usual values first, then unusual ones too."""
        for chosen in self._starts(options):
            if self.wrong(chosen) == 0:
                return chosen
        best: list[Change] = []
        for usual in (True, False):
            offered = {path: list(values) for path, values in options.items()}
            if not usual:
                offered = _joined(options, self._unusual(best))
            # We start with all fields changed, so that fields that affect no shape stay changed and are tried later.
            for start in (*self._starts(options), best):
                best = min(best, self._descend(start, offered), key=self.wrong)
                if self.wrong(best) == 0:
                    return best
            best = min(best, self._exhaust(offered), key=self.wrong)
            if self.wrong(best) == 0:
                return best
        raise Refused(self._none(best))

    def _starts(self, options: Mapping[Path, Sequence[int]]) -> Iterator[list[Change]]:
        yield [self._change(path, values[0]) for path, values in options.items()]
        yield [self._change(path, values[-1]) for path, values in options.items()]

    def _change(self, path: Path, after: int) -> Change:
        return Change(path, value_at(self.fields, path), after)

    def _descend(self, start: list[Change], options: Mapping[Path, Sequence[int]]) -> list[Change]:
        """Change one field at a time, or two together, as long as fewer shapes become wrong."""
        chosen, wrong = start, self.wrong(start)
        improved = True
        while improved and wrong and len(self.built) < MOST_BUILDS:
            improved = False
            for count in (1, 2):
                for paths in itertools.combinations(options, count):
                    for values in itertools.product(*((None, *options[path]) for path in paths)):
                        kept = [change for change in chosen if change.path not in paths]
                        new = [self._change(p, v) for p, v in zip(paths, values, strict=True) if v is not None]
                        remaining = self.wrong([*kept, *new])
                        if remaining < wrong:
                            chosen, wrong, improved = [*kept, *new], remaining, True
                    if len(self.built) >= MOST_BUILDS:
                        return chosen
                if improved or not wrong:
                    break
        return chosen

    def _exhaust(self, options: Mapping[Path, Sequence[int]]) -> list[Change]:
        """Try all combinations, until one fits or too many models were built; the best one."""
        combinations = itertools.product(*((None, *values) for values in options.values()))
        best: list[Change] = []
        for values in combinations:
            if len(self.built) >= MOST_BUILDS:
                break
            changes = [self._change(p, v) for p, v in zip(options, values, strict=True) if v is not None]
            best = min(best, changes, key=self.wrong)
            if self.wrong(best) == 0:
                break
        return best

    def _unusual(self, best: list[Change]) -> dict[Path, list[int]]:
        """Less likely values of fields, for those fields that then change a shape.

        A field that is not set may take a size that is still wrong. A field with a whole number may take a multiple of
        it, because the field may hold a width in units of another width.
        """
        shapes = self.shapes(best) or {}
        differing = {
            after
            for name, shape in self.wanted.items()
            for before, after in zip(shapes.get(name, ()), shape, strict=False)
            if before != after
        }
        candidates: dict[Path, list[int]] = {}
        for path, value in flattened(self.fields):
            if value is None:
                candidates[path] = sorted(differing)
            elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= max(differing, default=0):
                candidates[path] = [value * ratio for ratio in self.ratios if ratio > 1]
        relevant = {}
        for path, values in candidates.items():
            others = [change for change in best if change.path != path]
            changed = self.shapes([*others, self._change(path, values[0])]) if values else None
            if changed is not None and changed != shapes:
                relevant[path] = values
        return relevant

    def _none(self, best: list[Change]) -> str:
        """The message where no configuration has the wanted shapes: the first wrong tensor under the best changes."""
        shapes = self.shapes(best) or {}
        kind = type(self.checkpoint.config).__name__
        name, shape = next(
            ((name, shape) for name, shape in self.wanted.items() if shapes.get(name) != shape), ("", ())
        )
        return (
            f"{self.checkpoint.folder}: {kind} cannot say these sizes: with none of its settings has {name} the shape "
            f"{list(shape)} (nearest: {list(shapes.get(name, ()))}): grow other dimensions with --set"
        )


def _joined(first: Mapping[Path, Sequence[int]], second: Mapping[Path, Sequence[int]]) -> dict[Path, list[int]]:
    return {path: [*first.get(path, ()), *second.get(path, ())] for path in {**first, **second}}


def built(checkpoint: Checkpoint, changes: Sequence[Change]) -> Any:
    """The checkpoint's model with some fields of its configuration changed.

    The values of its parameters are unspecified: the caller fills them.
    """
    with quiet(), no_init_weights():
        model = checkpoint.model_class(changed_config(checkpoint, changes)).eval()
    model.tie_weights()
    return model


def built_shapes(checkpoint: Checkpoint, changes: Sequence[Change]) -> Shapes | None:
    """The shapes of a model's tensors with some changes of its configuration; None where it cannot be built."""
    try:
        with torch.device("meta"):
            model = built(checkpoint, changes)
    except Exception:  # a model whose sizes do not fit together may raise any exception
        return None
    return {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}


def changed_config(checkpoint: Checkpoint, changes: Sequence[Change]) -> Any:
    """The configuration with some fields changed, as an object of transformers."""
    config = type(checkpoint.config).from_dict(changed_fields(checkpoint.config.to_dict(), changes))
    for name, form in implementations(checkpoint.model_class).items():
        setattr(config, f"_{name}", form)
    return config


def changed_fields(fields: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """A copy of a configuration's fields with some of them changed, nested ones too.

    A change of an entry that a list does not have is left out: a model with fewer layers has shorter lists
    (`shortening`).
    """
    result = copy.deepcopy(dict(fields))
    for change in changes:
        place: Any = result
        part: Any
        for part in change.path[:-1]:
            place = place[part] if isinstance(place, list) else place.setdefault(part, {})
        last: Any = change.path[-1]
        if not isinstance(place, list) or last < len(place):
            place[last] = change.after
    return result


def flattened(fields: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested dicts and lists with the keys that lead to it, except versions and label names."""
    items: Any = ()
    if isinstance(fields, Mapping):
        items = fields.items()
    elif isinstance(fields, list | tuple):
        items = enumerate(fields)
    else:
        yield path, fields
    for key, value in items:
        if key not in ("transformers_version", "id2label", "label2id"):
            yield from flattened(value, (*path, key))


def integers(fields: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    """The fields that are whole numbers."""
    for path, value in flattened(fields):
        if isinstance(value, int) and not isinstance(value, bool):
            yield path, value


def value_at(fields: Any, path: Path) -> Any:
    """The value at the end of a path."""
    for part in path:
        fields = fields[part]
    return fields


def written_config(checkpoint: Checkpoint, changes: Sequence[Change]) -> dict[str, Any]:
    """The fields of the grown model's configuration file: the source's file with the changed fields.

    The source's file may use an alias of a field (``hidden_size`` for GPT-2's ``n_embd``), and may leave out fields
    that have their default. A field that changed is written under its own name, which `Change.path` gives.
    """
    raw = copy.deepcopy(dict(checkpoint.raw))
    full = checkpoint.config.to_dict()
    aliases = getattr(checkpoint.config, "attribute_map", {}) or {}
    for change in changes:
        top = change.path[0]
        for alias, name in aliases.items():
            if name == top and alias in raw and alias != name:
                raw[name] = raw.pop(alias)
        if len(change.path) > 1 and top not in raw:
            raw[str(top)] = copy.deepcopy(full[str(top)])
    for change in changes:
        if len(change.path) > 1:  # the file may leave out entries of a nested configuration that have their default
            _fill(raw, full, change.path)
    return changed_fields(raw, changes)


def _fill(raw: Any, full: Any, path: Path) -> None:
    """Copy into `raw` the entries that it lacks along a path, from `full`."""
    part: Any
    for part in path[:-1]:
        if isinstance(raw, dict) and part not in raw:
            raw[part] = copy.deepcopy(full[part])
        raw, full = raw[part], full[part]
