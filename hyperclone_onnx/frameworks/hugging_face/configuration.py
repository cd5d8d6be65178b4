"""Which fields of a configuration grow: those with which the model's tensors have the shapes that are wanted.

Nothing is known of any field by its name. Candidates are the fields whose value is the size of something that grows;
each set of them is tried by building the model without weights and comparing every shape. A field that changes no shape
of a tensor (a number of heads, where one matrix makes them all) counts when it changes the shapes of activations.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, quiet, stored_tensors
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Maps, Named, ProductOf, grown_size
from hyperclone_onnx.plan.plans import Plan

Path = tuple[str | int, ...]
Shapes = Mapping[str, tuple[int, ...]]

MOST_BUILDS = 600
"""Models built without weights before the search for a configuration is given up."""


@dataclass(frozen=True)
class Change:
    """A field that changes: where it is, and its values."""

    path: Path
    before: Any
    after: int

    @property
    def name(self) -> str:
        """The field as one writes it."""
        return ".".join(str(part) for part in self.path)


def sizes(plan: Plan) -> dict[int, list[int]]:
    """For each size of something that grows, the sizes that it may have afterwards."""
    found: dict[int, list[int]] = {}
    maps = plan.maps

    def add(parts: Sequence[Axis]) -> None:
        before = grown_size(ProductOf(tuple(parts)), _unmapped(maps))
        after = grown_size(ProductOf(tuple(parts)), maps)
        if before != after and after not in found.setdefault(before, []):
            found[before].append(after)

    def walk(parts: Sequence[Axis]) -> None:
        for start, stop in itertools.combinations(range(len(parts) + 1), 2):
            add(parts[start:stop])
        for part in parts:
            match part:
                case ProductOf(inner):
                    walk(inner)
                case ConcatOf(inner):
                    for each in inner:
                        walk((each,))
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
    return found


def _unmapped(maps: Maps) -> Maps:
    from hyperclone_onnx.plan.maps import SourceMap

    return {name: SourceMap(each.size, tile=1) for name, each in maps.items()}


class Search:
    """The configurations of a checkpoint under which its model has the shapes wanted."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, wanted: Shapes, source: Shapes) -> None:
        self.checkpoint = checkpoint
        self.wanted = wanted
        self.source = source
        self.sizes = sizes(plan)
        self.ratios = sorted({each.grown // each.size for each in plan.maps.values() if each.grown % each.size == 0})
        self.fields = checkpoint.config.to_dict()
        self.built: dict[tuple[Change, ...], Shapes | None] = {}

    def shapes(self, changes: Sequence[Change]) -> Shapes | None:
        """The shapes of the model's tensors under some changes; None where it cannot be built."""
        key = tuple(sorted(changes, key=lambda each: each.name))
        if key not in self.built:
            self.built[key] = self._build(key)
        return self.built[key]

    def _build(self, changes: Sequence[Change]) -> Shapes | None:
        try:
            with torch.device("meta"):
                model = built(self.checkpoint, changes)
        except Exception:  # a model whose sizes do not fit one another raises whatever it likes
            return None
        return {name: tuple(each.shape) for name, each in stored_tensors(model).items()}

    def wrong(self, changes: Sequence[Change]) -> int:
        """How many tensors have not the shape wanted."""
        shapes = self.shapes(changes)
        if shapes is None or shapes.keys() != self.source.keys():
            return len(self.wanted) + 1
        return sum(shapes[name] != shape for name, shape in self.wanted.items())

    def run(self) -> list[Change]:
        """Changes under which every shape is the one wanted, those included that change none.

        Raises:
            Refused: there are none.
        """
        options = {path: self.sizes[value] for path, value in integers(self.fields) if value in self.sizes}
        found = self._fitting(options)
        for path, values in options.items():
            if not any(each.path == path for each in found):
                more = [*found, self._change(path, values[0])]
                found = more if self.wrong(more) == 0 else found
        return found

    def _fitting(self, options: Mapping[Path, Sequence[int]]) -> list[Change]:
        for chosen in self._starts(options):
            if self.wrong(chosen) == 0:
                return chosen
        best: list[Change] = []
        for usual in (True, False):
            offered = {path: list(values) for path, values in options.items()}
            if not usual:
                offered = _joined(options, self._unusual(best))
            # From all of them changed: what no shape shows stays changed, and is tried.
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
        """Change one field after the other, or two together, as long as that makes fewer shapes wrong."""
        chosen, wrong = start, self.wrong(start)
        improved = True
        while improved and wrong and len(self.built) < MOST_BUILDS:
            improved = False
            for count in (1, 2):
                for paths in itertools.combinations(options, count):
                    for values in itertools.product(*((None, *options[path]) for path in paths)):
                        kept = [each for each in chosen if each.path not in paths]
                        new = [self._change(p, v) for p, v in zip(paths, values, strict=True) if v is not None]
                        found = self.wrong([*kept, *new])
                        if found < wrong:
                            chosen, wrong, improved = [*kept, *new], found, True
                    if len(self.built) >= MOST_BUILDS:
                        return chosen
                if improved or not wrong:
                    break
        return chosen

    def _exhaust(self, options: Mapping[Path, Sequence[int]]) -> list[Change]:
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
        """Values for fields that are not set, and whole multiples of those that are (a width in units of another)."""
        shapes = self.shapes(best) or {}
        differing = {
            after
            for name, shape in self.wanted.items()
            for before, after in zip(shapes.get(name, ()), shape, strict=False)
            if before != after
        }
        found: dict[Path, list[int]] = {}
        for path, value in flattened(self.fields):
            if value is None:
                found[path] = sorted(differing)
            elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= max(differing, default=0):
                found[path] = [value * ratio for ratio in self.ratios if ratio > 1]
        alive = {}
        for path, values in found.items():
            others = [each for each in best if each.path != path]
            changed = self.shapes([*others, self._change(path, values[0])]) if values else None
            if changed is not None and changed != shapes:
                alive[path] = values
        return alive

    def _none(self, best: list[Change]) -> str:
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
    """The checkpoint's model with some fields of its configuration changed; its parameters hold anything."""
    with quiet():
        return checkpoint.model_class(changed_config(checkpoint, changes)).eval()


def changed_config(checkpoint: Checkpoint, changes: Sequence[Change]) -> Any:
    """The configuration with some fields changed, as transformers reads it."""
    config = type(checkpoint.config).from_dict(changed_fields(checkpoint.config.to_dict(), changes))
    config._attn_implementation = "eager"
    return config


def changed_fields(fields: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Fields with some of them changed, nested ones too."""
    result = copy.deepcopy(dict(fields))
    for change in changes:
        place: Any = result
        part: Any
        for part in change.path[:-1]:
            place = place[part] if isinstance(place, list) else place.setdefault(part, {})
        place[change.path[-1]] = change.after
    return result


def flattened(fields: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested dicts and lists."""
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
    """The configuration file of the grown model: the source's own, the changed fields under their own names."""
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
        if len(change.path) > 1:  # a list or a nested configuration may be written shorter than it is read
            _fill(raw, full, change.path)
    return changed_fields(raw, changes)


def _fill(raw: Any, full: Any, path: Path) -> None:
    part: Any
    for part in path[:-1]:
        if isinstance(raw, dict) and part not in raw:
            raw[part] = copy.deepcopy(full[part])
        raw, full = raw[part], full[part]
