"""Layers that repeat become blocks: found by their tensors' names, proven by equal structure.

Names such as ``model.layers.3.mlp.weight`` say that layers are there and which tensors they hold. Where one layer ends
is where a single activation is alive; from there each layer is walked backwards together with the one before it, call
by call, until both arrive at their entries. Only what is equal in every layer becomes a block: anything else leaves
the program as it is.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hyperclone_onnx.frameworks.compiling.program import (
    BlockCall,
    Body,
    Call,
    Lifted,
    Local,
    Operand,
    Program,
    Step,
    Stored,
    Weight,
)
from hyperclone_onnx.frameworks.compiling.source import operands, reads, variables

K = TypeVar("K")
V = TypeVar("V")

_LAYER = re.compile(r"(?P<prefix>[^0-9]*?)\.(?P<index>\d+)\.(?P<rest>.+)")


def block_paths(program: Program) -> Iterator[tuple[str, int]]:
    """The path of each block call, and which of the program's blocks it calls."""
    for step in program.body.steps:
        if isinstance(step, BlockCall):
            yield step.path, step.block


def with_blocks(program: Program) -> Program:
    """The program with its repeated layers as blocks; the same program where none can be proven."""
    for prefix, count in _layer_groups(program):
        layers = _Layers(program, prefix, count)
        for choice in range(layers.choices()):
            try:
                program = layers.made(choice)
                break
            except _NoBlocks:
                continue
    return program


def _layer_groups(program: Program) -> list[tuple[str, int]]:
    """The prefixes that end in consecutive numbers from 0, two at least."""
    found: dict[str, set[int]] = defaultdict(set)
    for weight in program.weights:
        match = _LAYER.match(weight.path)
        if match and weight.role != "constant":
            found[match["prefix"]].add(int(match["index"]))
    return [(prefix, len(seen)) for prefix, seen in found.items() if len(seen) > 1 and seen == set(range(len(seen)))]


class _NoBlocks(Exception):
    """The layers are not equal, or do not hang on a single activation."""


@dataclass
class _Pairs:
    """What corresponds to what in two consecutive layers: from the earlier one to the later one."""

    values: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)


class _Layers:
    def __init__(self, program: Program, prefix: str, count: int) -> None:
        self.program = program
        self.prefix = prefix
        self.count = count
        self.steps = program.body.steps
        self.weights = program.by_path()
        self.maker = {name: i for i, step in enumerate(self.steps) for name in step.outputs if name}
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.users: dict[str, set[int]] = defaultdict(set)
        for i, step in enumerate(self.steps):
            for name in reads(step):
                self.readers[name].append(i)
            for operand in operands(step):
                if isinstance(operand, Stored):
                    self.users[operand.path].add(i)
        self.leaving = {name for operand in program.body.outputs for name in variables(operand)}
        self.sizes = {
            name
            for step in self.steps
            if isinstance(step, Call) and (step.host or step.op_type in ("Shape", "Size"))
            for name in step.outputs
            if name
        }
        self.learned = self._depend_on_weights()

    def _depend_on_weights(self) -> set[str]:
        found: set[str] = set()
        for step in self.steps:
            stored = [each for each in operands(step) if isinstance(each, Stored)]
            if any(self.weights[each.path].role != "constant" for each in stored) or any(
                name in found for name in reads(step)
            ):
                found.update(name for name in step.outputs if name)
        return found

    # -- where layers meet ----------------------------------------------------------------------------------

    def _places(self, index: int) -> list[int]:
        start = f"{self.prefix}.{index}."
        found = sorted(
            i
            for path, users in self.users.items()
            if path.startswith(start) and self.weights[path].role != "constant"
            for i in users
        )
        if not found:
            raise _NoBlocks
        return found

    def _cuts(self) -> list[list[str]]:
        """The activations that each layer but the first may begin with: where one alone is alive, in order."""
        places = [self._places(index) for index in range(self.count)]
        # What is made before the first layer and read in the last passes all cuts by.
        passing = {
            name
            for step in self.steps[: places[0][0]]
            for name in step.outputs
            if name and self.readers[name] and self.readers[name][-1] >= places[-1][0]
        }
        cuts = []
        for before, after in itertools.pairwise(places):
            alive = [self._alive(passing, at) for at in range(before[-1], after[0])]
            cuts.append(list(dict.fromkeys(names[0] for names in alive if len(names) == 1)))
        return cuts

    def choices(self) -> int:
        """How many ways there are to cut the layers apart."""
        try:
            return min(len(each) for each in self._cuts())
        except _NoBlocks:
            return 0

    def _alive(self, passing: set[str], at: int) -> list[str]:
        return [
            name
            for step in self.steps[: at + 1]
            for name in step.outputs
            if name and name in self.learned and name not in self.sizes and name not in passing
            if self.readers[name] and self.readers[name][-1] > at
        ]

    # -- two layers side by side ----------------------------------------------------------------------------

    def _paired(self, later: str, earlier: str, entry: str) -> _Pairs:
        """Walk two layers backwards from their last activations until the later one arrives at its entry."""
        pairs = _Pairs()
        self._pair_values(later, earlier, entry, pairs)
        if entry not in pairs.inputs.values():
            raise _NoBlocks
        return pairs

    def _pair_values(self, later: str, earlier: str, entry: str, pairs: _Pairs) -> None:
        pending = [(later, earlier)]
        while pending:
            late, early = pending.pop()
            if late in (entry, early) or late not in self.learned:
                if early in pairs.values or (late not in self.learned) != (early not in self.learned):
                    raise _NoBlocks
                _agree(pairs.inputs, early, late)
                continue
            if early in pairs.inputs:
                raise _NoBlocks
            if pairs.values.get(early) == late:
                continue
            _agree(pairs.values, early, late)
            if late not in self.maker or early not in self.maker:
                raise _NoBlocks
            number, other = self.maker[late], self.maker[early]
            step, twin = self.steps[number], self.steps[other]
            if not isinstance(step, Call) or not isinstance(twin, Call) or not _alike(step, twin):
                raise _NoBlocks
            if step.outputs.index(late) != twin.outputs.index(early):
                raise _NoBlocks
            _agree(pairs.steps, other, number)
            self._pair_outputs(step, twin, pairs)
            for one, two in zip(step.inputs, twin.inputs, strict=True):
                pending += self._pair_operands(one, two, pairs)

    def _pair_outputs(self, late: Call, early: Call, pairs: _Pairs) -> None:
        """What else two calls make: a cache beside an activation."""
        for one, two in zip(late.outputs, early.outputs, strict=True):
            if (one is None) != (two is None):
                raise _NoBlocks
            if one is not None and two is not None:
                _agree(pairs.values, two, one)

    def _pair_operands(self, late: Operand | None, early: Operand | None, pairs: _Pairs) -> list[tuple[str, str]]:
        if isinstance(late, Stored) and isinstance(early, Stored):
            one, two = self.weights[late.path], self.weights[early.path]
            if (one.shape, one.element_type) != (two.shape, two.element_type) or not self._same_part(one, two):
                raise _NoBlocks
            _agree(pairs.weights, early.path, late.path)
            return []
        if isinstance(late, Lifted) and isinstance(early, Lifted) and late.element_type == early.element_type:
            return self._pair_operands(late.value, early.value, pairs)
        if isinstance(late, Local) and isinstance(early, Local):
            return [(late.name, early.name)]
        if late != early:
            raise _NoBlocks
        return []

    def _same_part(self, late: Weight, early: Weight) -> bool:
        """Whether two tensors have the same name in their layers; tensors without a layer's name may be anything."""
        parts = [_LAYER.match(each.path) for each in (late, early)]
        inside = [part is not None and part["prefix"] == self.prefix for part in parts]
        if late.path == early.path or not any(inside):
            return True
        one, two = parts
        return (
            all(inside)
            and one is not None
            and two is not None
            and (one["rest"] == two["rest"] and int(one["index"]) == int(two["index"]) + 1)
        )

    def _all_pairs(self, cuts: Sequence[str]) -> list[_Pairs]:
        """The pairs of layers (1, 0), (2, 1), ...; the last layer's end is where it matches the one before."""
        found = [self._paired(late, early, entry) for early, late, entry in zip(cuts, cuts[1:], cuts, strict=False)]
        end = self._places(self.count - 1)[-1]
        for step in self.steps[end:]:
            for name in step.outputs:
                try:
                    if name and name in self.learned:
                        return [*found, self._paired(name, cuts[-1], cuts[-1])]
                except _NoBlocks:
                    continue
        raise _NoBlocks

    # -- one body for all -----------------------------------------------------------------------------------

    def made(self, choice: int) -> Program:
        """The program with these layers as blocks, cut apart in one of the ways."""
        pairs = self._all_pairs([each[choice] for each in self._cuts()])
        layers = _chained([each.values for each in pairs])
        inputs = _chained([each.inputs for each in pairs])
        weights = _chained([each.weights for each in pairs])
        members = [set(layer.values()) for layer in _chained([each.steps for each in pairs])]
        for index, layer in enumerate(members):
            if not set(self._places(index)) <= layer or any(layer & other for other in members[:index]):
                raise _NoBlocks
        template = [self.steps[i] for i in sorted(members[0])]
        owned = self._owned(weights, members)
        read = [name for step in template for name in reads(step) if name in inputs[0]]
        given = sorted(inputs[0], key=lambda name: (name not in self.learned, name in self.sizes, read.index(name)))
        stored = list(dict.fromkeys(e.path for step in template for e in operands(step) if isinstance(e, Stored)))
        results = [name for step in template for name in step.outputs if name and self._leaves(name, layers, members)]
        names = self._relative_names(template, [path for path in stored if path in owned])
        shared = {path: f"shared_{i}" for i, path in enumerate(path for path in stored if path not in owned)}
        body = Body(
            (*given, *shared.values()),
            tuple(_renamed(step, names, shared) for step in template),
            tuple(Local(name) for name in results),
        )
        calls = [
            BlockCall(
                f"{self.prefix}.{index}",
                len(self.program.blocks),
                (*(Local(inputs[index][name]) for name in given), *(Stored(weights[index][p]) for p in shared)),
                tuple(self._result(layers[index][name], members[index]) for name in results),
            )
            for index in range(self.count)
        ]
        moved = {
            weights[index][path]: f"{self.prefix}.{index}.{name}"
            for index in range(self.count)
            for path, name in names.items()
        }
        if len(set(moved.values()) | {p for p in self.weights if p not in moved}) != len(self.weights):
            raise _NoBlocks
        return replace(
            self.program,
            body=replace(self.program.body, steps=self._ordered(calls, members)),
            weights=tuple(replace(w, path=moved.get(w.path, w.path)) for w in self.program.weights),
            blocks=(*self.program.blocks, body),
        )

    def _owned(self, weights: Sequence[Mapping[str, str]], members: Sequence[set[int]]) -> set[str]:
        """The template's tensors that, in every layer, that layer alone reads."""
        return {
            path
            for path in weights[0]
            if all(
                self.weights[layer[path]].role != "constant" and self.users[layer[path]] <= inside
                for layer, inside in zip(weights, members, strict=True)
            )
        }

    def _leaves(self, name: str, layers: Sequence[Mapping[str, str]], members: Sequence[set[int]]) -> bool:
        return any(
            name in layer and self._result(layer[name], inside) is not None
            for layer, inside in zip(layers, members, strict=True)
        )

    def _result(self, name: str, inside: set[int]) -> str | None:
        outside = any(reader not in inside for reader in self.readers[name])
        return name if outside or name in self.leaving else None

    def _relative_names(self, template: Sequence[Step], paths: Sequence[str]) -> dict[str, str]:
        """What each tensor is called within its layer: its own name, that of the bias beside it, or a number."""
        start = f"{self.prefix}.0."
        names = {path: path.removeprefix(start) for path in paths if path.startswith(start)}
        for number, path in enumerate(path for path in paths if path not in names):
            sibling = self._beside(path, template)
            taken = set(names.values())
            names[path] = sibling if sibling and sibling not in taken else f"weight_{number}"
        return names

    def _beside(self, path: str, template: Sequence[Step]) -> str | None:
        start = f"{self.prefix}.0."
        for step in template:
            if (
                not isinstance(step, Call)
                or step.op_type not in ("MatMul", "Gemm", "Linear")
                or Stored(path) not in step.inputs
            ):
                continue
            readers = [step, *(self.steps[i] for name in step.outputs if name for i in self.readers[name])]
            for reader in readers:
                for operand in operands(reader):
                    if isinstance(operand, Stored) and operand.path.startswith(start) and operand.path.endswith("bias"):
                        return operand.path.removeprefix(start).removesuffix("bias") + "weight"
        return None

    def _ordered(self, calls: Sequence[BlockCall], members: Sequence[set[int]]) -> tuple[Step, ...]:
        """The steps with each layer's in one, in an order that makes every value before it is read."""
        owner = {step: index for index, layer in enumerate(members) for step in layer}
        units: dict[int, Step] = {i: step for i, step in enumerate(self.steps) if i not in owner}
        units |= {min(layer): call for layer, call in zip(members, calls, strict=True)}
        maker = {name: i for i, step in units.items() for name in step.outputs if name}
        missing: dict[int, set[int]] = {}
        readers: dict[int, list[int]] = defaultdict(list)
        for i, step in units.items():
            missing[i] = {maker[name] for name in reads(step) if name in maker}
            for each in missing[i]:
                readers[each].append(i)
        ready = [i for i, needed in missing.items() if not needed]
        heapq.heapify(ready)
        found: list[Step] = []
        while ready:
            i = heapq.heappop(ready)
            found.append(units[i])
            for reader in readers[i]:
                missing[reader].discard(i)
                if not missing[reader]:
                    heapq.heappush(ready, reader)
        if len(found) != len(units):
            raise _NoBlocks
        return tuple(found)


def _agree(known: dict[K, V], key: K, value: V) -> None:
    """Note a correspondence, which must be the only one of its key."""
    if known.setdefault(key, value) != value:
        raise _NoBlocks


def _chained(pairs: Sequence[Mapping[K, K]]) -> list[dict[K, K]]:
    """For each layer, what corresponds in it to what is in the first."""
    layers = [{key: key for key in pairs[0]}]
    for pair in pairs:
        last = layers[-1]
        if set(pair) != set(last.values()):
            raise _NoBlocks
        layers.append({key: pair[value] for key, value in last.items()})
    return layers


def _alike(one: Call, other: Call) -> bool:
    return (one.domain, one.op_type, one.attributes, one.host, len(one.inputs), len(one.outputs)) == (
        other.domain,
        other.op_type,
        other.attributes,
        other.host,
        len(other.inputs),
        len(other.outputs),
    )


def _renamed(step: Step, names: Mapping[str, str], shared: Mapping[str, str]) -> Step:
    def renamed(operand: Operand | None) -> Operand | None:
        if not isinstance(operand, Stored):
            return operand
        return Stored(names[operand.path]) if operand.path in names else Local(shared[operand.path])

    assert isinstance(step, Call)
    return replace(step, inputs=tuple(renamed(each) for each in step.inputs))
