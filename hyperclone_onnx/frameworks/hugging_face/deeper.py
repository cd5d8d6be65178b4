"""The checkpoint of a model that has more layers than the one that was given.

In: the checkpoint, how its tensors match the small file's initializers, and the places of the deeper graph's stored
tensors. Out: the same for the deeper model, which then grows in width as any checkpoint does.

The layers of a checkpoint are entries of a list of modules (``model.layers.7.``). The list is found by content: its
entries are made from the initializers of one unit after the other. The fields that say the layers are found by what
they do: with them, transformers builds a model that has the deeper model's tensors and computes the same.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, values
from hyperclone_onnx.frameworks.hugging_face.assembly import Given
from hyperclone_onnx.frameworks.hugging_face.checking import Feeding, Outputs, outputs, relative_error
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, Loaded, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.configuration import (
    Change,
    Path,
    Shapes,
    built,
    built_shapes,
    changed_config,
    changed_fields,
    integers,
    value_at,
    written_config,
)
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, laid_out, squeezed_shape
from hyperclone_onnx.frameworks.hugging_face.matching import Matches
from hyperclone_onnx.frameworks.hugging_face.measuring import CASES, fill, readers
from hyperclone_onnx.frameworks.hugging_face.sources import Source
from hyperclone_onnx.plan.maps import Indices
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.transforms.interface import Placed
from hyperclone_onnx.transforms.registry import changing

Array = npt.NDArray[Any]

MOST_BUILDS = 400
"""The search for the fields that say the layers stops after it has built this many models without weights."""

MOST_FIELDS = 3
"""The most whole numbers that say the layers together."""

AGREE = 0.9
"""The part of a list's tensors that must be made from the initializers of one unit after the other."""


@dataclass(frozen=True)
class Layers:
    """The layers of one stack in a checkpoint."""

    lists: tuple[str, ...]
    """The beginnings of the names of its tensors, up to the number of the layer: ``model.layers.``"""
    base: int
    """The number of the stack's first layer in these lists."""
    period: int
    """The number of layers in a unit."""
    sources: tuple[int, ...]
    """For each unit of the deeper stack the unit of the source that it is, or is a copy of."""
    units: int
    """The number of units in the source."""
    length: int
    """The number of layers in the lists of the source, those outside of the stack too."""

    @property
    def deeper_length(self) -> int:
        """The number of layers in the lists of the deeper model."""
        return self.length + (len(self.sources) - self.units) * self.period

    def source_of(self, layer: int) -> int:
        """The source's layer that a layer of the deeper model is, or is a copy of."""
        unit, rest = divmod(layer - self.base, self.period)
        if unit < 0:
            return layer
        if unit >= len(self.sources):
            return layer - (len(self.sources) - self.units) * self.period
        return self.base + self.sources[unit] * self.period + rest

    def unit_of(self, layer: int) -> int | None:
        """The unit of the deeper stack that has a layer; None for a layer outside of the stack."""
        unit = (layer - self.base) // self.period
        return unit if 0 <= unit < len(self.sources) else None

    def places_of(self, name: str) -> Iterator[tuple[str, int | None]]:
        """The names in the deeper model of a tensor of the source, each with the unit that has it."""
        for prefix in self.lists:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and number.isdecimal():
                for layer in range(self.deeper_length):
                    if self.source_of(layer) == int(number):
                        yield f"{prefix}{layer}.{rest}", self.unit_of(layer)
                return
        yield name, None


@dataclass(frozen=True)
class Deeper:
    """A deeper checkpoint: its configuration, its tensors, and how they match the deeper file's initializers."""

    checkpoint: Checkpoint
    given: Given
    matches: Matches
    changes: tuple[Change, ...]
    """The fields of the configuration that say the layers."""


def deeper(
    checkpoint: Checkpoint,
    given: Given,
    matches: Matches,
    plan: Plan,
    places: Mapping[str, Placed],
    stored: Mapping[str, Source],
    fed: Feeding,
) -> Deeper:
    """Make a checkpoint as deep as a grown file.

    Args:
        checkpoint: the source's checkpoint.
        given: its model and tensors. The model is released.
        matches: how the tensors match the initializers of the source's file.
        plan: the plan of the grown file.
        places: the places of the deeper graph's stored tensors.
        stored: the initializers of the deeper graph, before growth in width.
        fed: inputs on which the deeper model is compared with the source's.

    Raises:
        Refused: the checkpoint's layers cannot be told, or its configuration cannot say the new ones.
    """
    stacks = {name: _layers(checkpoint, name, plan, places, matches, given.shapes) for name in _stacks(places)}
    names = _deeper_names(stacks, given.shapes)
    matched = Matches({name: _layouts(source, unit, matches, places) for name, (source, unit) in names.items()})
    matched.layouts = {name: layouts for name, layouts in matched.layouts.items() if layouts}
    tensors = _Tensors(given, {name: source for name, (source, _) in names.items()}, matched, places, stored)
    wanted = {name: given.shapes[source] for name, (source, _) in names.items()}
    expected = None if changing(plan.transforms) else _outputs(given.model, fed)
    given.release()
    search = _Search(checkpoint, list(stacks.values()), wanted)
    changes = search.run(lambda changes: expected is None or tensors.compute(checkpoint, changes, expected, fed))
    made = Checkpoint(
        checkpoint.folder,
        written_config(checkpoint, changes),
        changed_config(checkpoint, changes),
        checkpoint.model_class,
        tensors.sources,
    )
    return Deeper(made, tensors.given(checkpoint, changes), matched, tuple(changes))


def _stacks(places: Mapping[str, Placed]) -> list[str]:
    return list(dict.fromkeys(placed.stack for placed in places.values()))


# -- where the layers are -------------------------------------------------------------------------------------


def _layers(
    checkpoint: Checkpoint, name: str, plan: Plan, places: Mapping[str, Placed], matches: Matches, shapes: Shapes
) -> Layers:
    """Find the lists of modules whose entries are made from one unit of a stack after the other."""
    placed = [place for place in places.values() if place.stack == name]
    unit_of = {place.source: place.source_unit for place in placed if not place.is_new}
    units = max(unit_of.values(), default=-1) + 1
    period = next(
        stack["period"] for step in plan.transforms for stack in step.options.get("stacks", ()) if stack["name"] == name
    )
    votes: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    for tensor, layouts in matches.layouts.items():
        made_from = {unit_of.get(piece.initializer) for piece in layouts[0].pieces}
        unit = next(iter(made_from))
        if len(made_from) == 1 and unit is not None:
            for prefix, number in _numbers(tensor):
                votes[prefix][number, unit] += 1
    bases = {prefix: _base(counts, units, period) for prefix, counts in votes.items()}
    lists = {prefix: base for prefix, base in bases.items() if base is not None}
    lengths = {len({number for tensor in shapes for p, number in _numbers(tensor) if p == prefix}) for prefix in lists}
    if not lists or len(set(lists.values())) > 1 or len(lengths) > 1:
        raise Refused(
            f"{checkpoint.folder}: the layers of {name!r} are no list of modules in this checkpoint, so that it cannot "
            "have more of them. Hand the file to PyTorch, JAX or safetensors instead"
        )
    sources = dict(sorted((place.unit, place.source_unit) for place in placed))
    return Layers(tuple(lists), next(iter(lists.values())), period, tuple(sources.values()), units, next(iter(lengths)))


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Each number in a tensor's name that stands between dots, with what is before it."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if place and part.isdecimal():
            yield ".".join(parts[:place]) + ".", int(part)


def _base(votes: Counter[tuple[int, int]], units: int, period: int) -> int | None:
    """The number in a list of modules with which a stack begins; None where the list does not have the stack.

    Args:
        votes: how many tensors of a list have a number and are made from the initializers of a unit.
        units: the number of units.
        period: the number of layers in a unit.
    """
    if {unit for _, unit in votes} != set(range(units)) or not votes:
        return None

    def fitting(base: int) -> int:
        return sum(count for (number, unit), count in votes.items() if 0 <= number - unit * period - base < period)

    bases = sorted({number - unit * period for number, unit in votes})
    best = max(bases, key=fitting)
    return best if fitting(best) >= AGREE * votes.total() else None


def _deeper_names(stacks: Mapping[str, Layers], names: Shapes) -> dict[str, tuple[str, tuple[str, int] | None]]:
    """For each tensor of the deeper model the source's tensor, and the stack and unit that has it."""
    result: dict[str, tuple[str, tuple[str, int] | None]] = {}
    for name in names:
        of_stack = next(
            (stack for stack, layers in stacks.items() if name.startswith(layers.lists)), next(iter(stacks))
        )
        for new, unit in stacks[of_stack].places_of(name):
            result[new] = name, None if unit is None else (of_stack, unit)
    return result


def _layouts(source: str, unit: tuple[str, int] | None, matches: Matches, places: Mapping[str, Placed]) -> list[Layout]:
    """The layouts of a tensor of the deeper model: those of the source's tensor, with the initializers of its unit.

    Tensors of several layers may have equal content. A tensor is made from the initializers of its own layer.
    """
    layouts = matches.layouts.get(source, [])
    own: dict[str, str] = {}
    stays: dict[str, str] = {}
    of_layers = set()
    for name, placed in places.items():
        if not placed.is_new:
            of_layers.add(placed.source)
            stays[placed.source] = name
        if unit == (placed.stack, placed.unit):
            own[placed.source] = name
    renamed = []
    for names in (own, {**stays, **own}):
        for layout in layouts:
            if all(piece.initializer in names or piece.initializer not in of_layers for piece in layout.pieces):
                pieces = (
                    replace(piece, initializer=names.get(piece.initializer, piece.initializer))
                    for piece in layout.pieces
                )
                renamed.append(replace(layout, pieces=tuple(pieces)))
        if renamed:
            break
    return renamed


# -- the tensors ----------------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of the deeper checkpoint."""

    def __init__(
        self,
        given: Given,
        sources: Mapping[str, str],
        matches: Matches,
        places: Mapping[str, Placed],
        stored: Mapping[str, Source],
    ) -> None:
        self.sources = sources
        """The source's tensor of each tensor."""
        self.missing = frozenset(name for name, source in sources.items() if source in given.loaded.missing)
        self.floating: dict[str, Array | StoredArray] = {}
        self.others: dict[str, Array] = {}
        for name, source in sources.items():
            if source in given.floating:
                layout = next(iter(matches.layouts.get(name, ())), None)
                is_new = layout is not None and any(_is_new(piece.initializer, places) for piece in layout.pieces)
                array = given.floating[source]
                self.floating[name] = _made(layout, stored, values(array)) if layout and is_new else array
            elif source in given.others:
                self.others[name] = given.others[source]
        self.double = any(array.dtype == np.float64 for array in self.floating.values())

    def model(self, checkpoint: Checkpoint, changes: Sequence[Change]) -> Any:
        """The deeper model in memory, with these tensors."""
        model = built(checkpoint, changes)
        model = model.double() if self.double else model.float()
        fill(model, readers(self.floating, self.others))
        return model

    def compute(
        self, checkpoint: Checkpoint, changes: Sequence[Change], expected: Sequence[tuple[Any, Outputs]], fed: Feeding
    ) -> bool:
        """Whether the deeper model computes what the source's computes."""
        try:
            model = self.model(checkpoint, changes).float()
            computed = [(outputs(model, case), wanted) for case, wanted in expected]
        except Exception:  # a model whose settings do not fit together may raise any exception
            return False
        return all(
            name in got and relative_error(got[name], array) <= fed.tolerance()[0]
            for got, wanted in computed
            for name, array in wanted.items()
            if not _is_of_layers(name, wanted, got)
        )

    def given(self, checkpoint: Checkpoint, changes: Sequence[Change]) -> Given:
        """The deeper model and its tensors."""
        model = self.model(checkpoint, changes)
        names = [name for name in stored_tensors(model) if name in self.floating or name in self.others]
        return Given(Loaded(model, self.missing), self.floating, self.others, names)


def _is_of_layers(name: str, wanted: Outputs, got: Outputs) -> bool:
    """Whether an output is one of several that a model gives for each layer, which have other numbers when deeper."""
    return len(got) > len(wanted) and name not in got


def _is_new(initializer: str, places: Mapping[str, Placed]) -> bool:
    return initializer in places and places[initializer].adds_nothing


def _made(layout: Layout, stored: Mapping[str, Source], like: Array) -> Array:
    """A tensor as the deeper graph's initializers make it. Where these are the source's own, it is the source's."""

    def whole(initializer: str, axis: int) -> Indices:
        return np.arange(squeezed_shape(stored[initializer].stored)[axis], dtype=np.int64)

    made = laid_out(layout, lambda initializer: stored[initializer].array, whole).astype(like.dtype)
    tolerance = max(stored[piece.initializer].tolerance * abs(piece.scale) for piece in layout.pieces)
    near = made.shape == like.shape and bool((np.abs(made - like) <= tolerance + 1e-6 * np.abs(like)).all())
    return like if near else made


def _outputs(model: Any, fed: Feeding) -> list[tuple[Any, Outputs]]:
    """The outputs of a model on the first input sets that it accepts."""
    model = model.float()
    computed: list[tuple[Any, Outputs]] = []
    for case in fed.cases:
        try:
            computed.append((case, outputs(model, case)))
        except (RuntimeError, ValueError, IndexError):
            continue
        if len(computed) == CASES:
            break
    return computed


# -- the configuration ----------------------------------------------------------------------------------------


class _Search:
    """A search for the fields that say the layers.

    Args:
        checkpoint: the source's checkpoint.
        stacks: the layers of each stack that becomes deeper.
        wanted: the shapes of the deeper model's tensors.
    """

    def __init__(self, checkpoint: Checkpoint, stacks: Sequence[Layers], wanted: Shapes) -> None:
        self.checkpoint = checkpoint
        self.stacks = stacks
        self.wanted = wanted
        self.fields = checkpoint.config.to_dict()
        self.built: dict[tuple[tuple[Path, str], ...], Shapes | None] = {}

    def run(self, computes: Callable[[Sequence[Change]], bool]) -> list[Change]:
        """The changes with which the model has the wanted tensors and computes what it should.

        Args:
            computes: whether a model with these changes computes what it should.

        Raises:
            Refused: no changes were found.
        """
        changes = self._fitting()
        if not computes(changes):
            changes = self._computing(changes, computes)
        for change in [change for change in changes if isinstance(change.after, list)]:
            fewer = [other for other in changes if other is not change]
            if self.wrong(fewer) == 0 and computes(fewer):
                changes = fewer
        return [*changes, *self._derived(changes)]

    def wrong(self, changes: Sequence[Change]) -> int:
        """The number of tensors that are missing, too many or of another shape."""
        key = tuple(sorted((change.path, repr(change.after)) for change in changes))
        if key not in self.built:
            self.built[key] = built_shapes(self.checkpoint, changes)
        shapes = self.built[key]
        if shapes is None:
            return len(self.wanted) + 1
        return sum(shapes.get(name) != self.wanted.get(name) for name in {**shapes, **self.wanted})

    def _fitting(self) -> list[Change]:
        """Changes with which the model has the wanted tensors: numbers of layers first, then lists beside them."""
        numbers = [change for change in self._numbers() if self._matters(change)]
        best: list[Change] = []
        for count in range(1, MOST_FIELDS + 1):
            for chosen in itertools.combinations(numbers, count):
                if len({change.path for change in chosen}) < count or len(self.built) > MOST_BUILDS:
                    continue
                for more in self._list_choices(chosen):
                    changes = [*chosen, *more]
                    best = min(best, changes, key=self.wrong)
                    if self.wrong(best) == 0:
                        return best
        best = self._improved(best, self.wrong)
        if self.wrong(best):
            raise Refused(self._none())
        return best

    def _computing(self, changes: list[Change], computes: Callable[[Sequence[Change]], bool]) -> list[Change]:
        """Changes with which the model also computes what it should, if there are some."""
        for more in (*self._list_choices(changes), *([option] for option in self._positions(changes))):
            paths = {change.path for change in more}
            trial = [*(change for change in changes if change.path not in paths), *more]
            if self.wrong(trial) == 0 and computes(trial):
                return trial
        raise Refused(
            f"{self.checkpoint.folder}: with more layers its configuration makes another model: the kind of a layer "
            "follows from its number, and a new layer would be of another kind than the one that it is a copy of. "
            "Hand the file to PyTorch, JAX or safetensors instead, or place the layers with --layers-at"
        )

    def _improved(self, changes: list[Change], wrong: Callable[[Sequence[Change]], int]) -> list[Change]:
        """The changes, with those positions of layers changed with which fewer tensors are wrong."""
        for option in self._positions(changes):
            if len(self.built) <= MOST_BUILDS and wrong([*changes, option]) < wrong(changes):
                changes = [*changes, option]
        return changes

    def _matters(self, change: Change) -> bool:
        """Whether a number, changed alone or with all lists, changes the model's tensors at all."""
        unchanged = self.wrong([])
        return any(self.wrong([change, *more]) != unchanged for more in self._list_choices([change]))

    def _numbers(self) -> list[Change]:
        """Numbers of layers, or of units: the fields that may become the deeper model's."""
        options = []
        for path, value in integers(self.fields):
            for layers in self.stacks:
                if value == layers.length:
                    options.append(Change(path, value, layers.deeper_length))
                elif value == layers.units and layers.period > 1:
                    options.append(Change(path, value, len(layers.sources)))
        return list(dict.fromkeys(options))

    def _list_choices(self, beside: Sequence[Change]) -> list[list[Change]]:
        """Lists with an entry for each layer: none of them, those beside the given fields, all of them."""
        taken = {change.path for change in beside}
        lists: list[Change] = []
        for layers in self.stacks:
            for path, value in _lists(self.fields):
                if len(value) == layers.length and path not in taken and all(path != change.path for change in lists):
                    after = [value[layers.source_of(layer)] for layer in range(layers.deeper_length)]
                    lists.append(Change(path, value, after))
        homes = {path[:-1] for path in taken}
        near = [change for change in lists if change.path[:-1] in homes]
        choices = [[], near, lists]
        return [choice for number, choice in enumerate(choices) if choice not in choices[:number]]

    def _positions(self, beside: Sequence[Change]) -> Iterator[Change]:
        """Fields that name layers by their numbers: lists of numbers, and numbers of layers from the first one on."""
        taken = {change.path for change in beside}
        for layers in self.stacks:
            sources = [layers.source_of(layer) for layer in range(layers.deeper_length)]
            for path, value in _lists(self.fields):
                plain = all(type(number) is int and 0 <= number < layers.length for number in value)
                if path not in taken and value and plain and len(set(value)) == len(value):
                    after = [layer for layer, source in enumerate(sources) if source in value]
                    yield Change(path, value, after)
            for path, number in integers(self.fields):
                if path not in taken and 0 < number <= layers.length:
                    yield Change(path, number, sum(source < number for source in sources))

    def _derived(self, changes: Sequence[Change]) -> Iterator[Change]:
        """Fields of the file that follow from the changed ones where they are left out: other names for a number."""
        taken = {change.path for change in changes}
        for path, value in integers(self.fields):
            if path in taken or len(path) > 1 or path[0] not in self.checkpoint.raw:
                continue
            before, after = (self._without(path, these) for these in ((), changes))
            if before == value and isinstance(after, int) and after != value:
                yield Change(path, value, after)

    def _without(self, path: Path, changes: Sequence[Change]) -> Any:
        """The value of a field that is left out."""
        fields = changed_fields(self.fields, changes)
        fields.pop(str(path[0]), None)
        try:
            return value_at(type(self.checkpoint.config).from_dict(fields).to_dict(), path)
        except Exception:  # a configuration without the field may raise any exception
            return None

    def _none(self) -> str:
        kind = type(self.checkpoint.config).__name__
        counts = ", ".join(f"{layers.length} -> {layers.deeper_length}" for layers in self.stacks)
        return (
            f"{self.checkpoint.folder}: {kind} cannot say these layers ({counts}): with none of its settings has the "
            "model their tensors. Hand the file to PyTorch, JAX or safetensors instead"
        )


def _lists(fields: Any, path: Path = ()) -> Iterator[tuple[Path, list[Any]]]:
    """Every list in nested fields, with the keys that lead to it."""
    if isinstance(fields, list | tuple) and path:
        yield path, list(fields)
    items = fields.items() if isinstance(fields, Mapping) else enumerate(fields) if isinstance(fields, list) else ()
    for key, value in items:
        yield from _lists(value, (*path, key))
