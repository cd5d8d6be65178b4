"""Turn the repeated layers of a program into blocks.

The names of tensors only suggest where the layers are: ``model.layers.3.mlp.weight`` belongs to layer 3. The structure
must prove it. A layer ends at a point of the program where a single activation is alive. From this point we walk each
layer backwards together with the layer before it, call by call, until both walks arrive at the entries of their layers.
If the walk finds a difference between two layers, the program stays as it is.
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
    """The path of each block call, and the index of the block that it calls."""
    for step in program.body.steps:
        if isinstance(step, BlockCall):
            yield step.path, step.block


def with_blocks(program: Program) -> Program:
    """Return the program with its repeated layers as blocks, or the same program if no layers are proven equal."""
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
    """The prefixes of layers and how many layers each has: two or more, numbered from 0 without a gap."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for weight in program.weights:
        match = _LAYER.match(weight.path)
        if match and weight.role != "constant":
            numbers[match["prefix"]].add(int(match["index"]))
    return [
        (prefix, len(group)) for prefix, group in numbers.items() if len(group) > 1 and group == set(range(len(group)))
    ]


class _NoBlocks(Exception):
    """The layers are not equal, or more than one activation passes from one layer to the next."""


@dataclass
class _Pairs:
    """The correspondence of two consecutive layers: each dict maps an item of the earlier layer to one of the later."""

    values: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)


class _Layers:
    """The layers of one prefix, and the steps that make and read each value of the program."""

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
        """The variables that are computed from weights, directly or through other variables."""
        dependent: set[str] = set()
        for step in self.steps:
            stored = [operand for operand in operands(step) if isinstance(operand, Stored)]
            if any(self.weights[operand.path].role != "constant" for operand in stored) or any(
                name in dependent for name in reads(step)
            ):
                dependent.update(name for name in step.outputs if name)
        return dependent

    # -- where layers meet ----------------------------------------------------------------------------------

    def _places(self, index: int) -> list[int]:
        """The steps that read a weight of this layer, in order."""
        start = f"{self.prefix}.{index}."
        places = sorted(
            i
            for path, users in self.users.items()
            if path.startswith(start) and self.weights[path].role != "constant"
            for i in users
        )
        if not places:
            raise _NoBlocks
        return places

    def _cuts(self) -> list[list[str]]:
        """For each layer but the first: the activations that it may begin with. At such a point no other is alive."""
        places = [self._places(index) for index in range(self.count)]
        # A value from before the first layer that the last layer reads is alive at every cut, so it tells us nothing.
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
        """The number of ways to cut the layers apart."""
        try:
            return min(len(activations) for activations in self._cuts())
        except _NoBlocks:
            return 0

    def _alive(self, passing: set[str], at: int) -> list[str]:
        """The activations that exist after step `at` and that a later step reads."""
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
            for operand, counterpart in zip(step.inputs, twin.inputs, strict=True):
                pending += self._pair_operands(operand, counterpart, pairs)

    def _pair_outputs(self, late: Call, early: Call, pairs: _Pairs) -> None:
        """Pair all outputs of two calls: some calls return a cache beside the activation."""
        for late_name, early_name in zip(late.outputs, early.outputs, strict=True):
            if (late_name is None) != (early_name is None):
                raise _NoBlocks
            if late_name is not None and early_name is not None:
                _agree(pairs.values, early_name, late_name)

    def _pair_operands(self, late: Operand | None, early: Operand | None, pairs: _Pairs) -> list[tuple[str, str]]:
        if isinstance(late, Stored) and isinstance(early, Stored):
            late_weight, early_weight = self.weights[late.path], self.weights[early.path]
            if (late_weight.shape, late_weight.element_type) != (
                early_weight.shape,
                early_weight.element_type,
            ) or not self._same_part(late_weight, early_weight):
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
        """Whether two tensors have the same name within their layers. Tensors outside the layers may have any name."""
        parts = [_LAYER.match(weight.path) for weight in (late, early)]
        inside = [part is not None and part["prefix"] == self.prefix for part in parts]
        if late.path == early.path or not any(inside):
            return True
        late_part, early_part = parts
        return (
            all(inside)
            and late_part is not None
            and early_part is not None
            and (late_part["rest"] == early_part["rest"] and int(late_part["index"]) == int(early_part["index"]) + 1)
        )

    def _all_pairs(self, cuts: Sequence[str]) -> list[_Pairs]:
        """The pairs of layers (1, 0), (2, 1), ...

        No cut marks the end of the last layer: it is the first activation from which a walk matches the layer before.
        """
        pairs = [self._paired(late, early, entry) for early, late, entry in zip(cuts, cuts[1:], cuts, strict=False)]
        end = self._places(self.count - 1)[-1]
        for step in self.steps[end:]:
            for name in step.outputs:
                try:
                    if name and name in self.learned:
                        return [*pairs, self._paired(name, cuts[-1], cuts[-1])]
                except _NoBlocks:
                    continue
        raise _NoBlocks

    # -- one body for all layers ----------------------------------------------------------------------------

    def made(self, choice: int) -> Program:
        """The program with these layers as blocks. `choice` is the number of the way to cut them apart."""
        pairs = self._all_pairs([activations[choice] for activations in self._cuts()])
        layers = _chained([pair.values for pair in pairs])
        inputs = _chained([pair.inputs for pair in pairs])
        weights = _chained([pair.weights for pair in pairs])
        members = [set(layer.values()) for layer in _chained([pair.steps for pair in pairs])]
        for index, layer in enumerate(members):
            if not set(self._places(index)) <= layer or any(layer & other for other in members[:index]):
                raise _NoBlocks
        template = [self.steps[i] for i in sorted(members[0])]
        own_paths = self._owned(weights, members)
        reading_order = [name for step in template for name in reads(step) if name in inputs[0]]
        entries = sorted(
            inputs[0], key=lambda name: (name not in self.learned, name in self.sizes, reading_order.index(name))
        )
        stored = list(dict.fromkeys(e.path for step in template for e in operands(step) if isinstance(e, Stored)))
        results = [name for step in template for name in step.outputs if name and self._leaves(name, layers, members)]
        names = self._relative_names(template, [path for path in stored if path in own_paths])
        shared = {path: f"shared_{i}" for i, path in enumerate(path for path in stored if path not in own_paths)}
        body = Body(
            (*entries, *shared.values()),
            tuple(_renamed(step, names, shared) for step in template),
            tuple(Local(name) for name in results),
        )
        calls = [
            BlockCall(
                f"{self.prefix}.{index}",
                len(self.program.blocks),
                (*(Local(inputs[index][name]) for name in entries), *(Stored(weights[index][p]) for p in shared)),
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
        """The tensors of the first layer whose counterpart in each layer is read by that layer alone."""
        return {
            path
            for path in weights[0]
            if all(
                self.weights[layer[path]].role != "constant" and self.users[layer[path]] <= inside
                for layer, inside in zip(weights, members, strict=True)
            )
        }

    def _leaves(self, name: str, layers: Sequence[Mapping[str, str]], members: Sequence[set[int]]) -> bool:
        """Whether a variable of the first layer, or its counterpart in another layer, is read outside its layer."""
        return any(
            name in layer and self._result(layer[name], inside) is not None
            for layer, inside in zip(layers, members, strict=True)
        )

    def _result(self, name: str, inside: set[int]) -> str | None:
        """The variable if steps outside the layer read it, or if it is an output of the program; otherwise None."""
        outside = any(reader not in inside for reader in self.readers[name])
        return name if outside or name in self.leaving else None

    def _relative_names(self, template: Sequence[Step], paths: Sequence[str]) -> dict[str, str]:
        """The name of each tensor within its layer.

        A tensor without a layer's name takes the name of the bias that is added to its product, or a number.
        """
        start = f"{self.prefix}.0."
        names = {path: path.removeprefix(start) for path in paths if path.startswith(start)}
        for number, path in enumerate(path for path in paths if path not in names):
            sibling = self._beside(path, template)
            used = set(names.values())
            names[path] = sibling if sibling and sibling not in used else f"weight_{number}"
        return names

    def _beside(self, path: str, template: Sequence[Step]) -> str | None:
        """The name for a matrix that its layer's bias suggests: ``mlp.weight`` for ``mlp.bias``."""
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
        """The steps with one block call for each layer, in an order that makes every value before it is read."""
        owner = {step: index for index, layer in enumerate(members) for step in layer}
        units: dict[int, Step] = {i: step for i, step in enumerate(self.steps) if i not in owner}
        units |= {min(layer): call for layer, call in zip(members, calls, strict=True)}
        maker = {name: i for i, step in units.items() for name in step.outputs if name}
        missing: dict[int, set[int]] = {}
        readers: dict[int, list[int]] = defaultdict(list)
        for i, step in units.items():
            missing[i] = {maker[name] for name in reads(step) if name in maker}
            for producer in missing[i]:
                readers[producer].append(i)
        ready = [i for i, needed in missing.items() if not needed]
        heapq.heapify(ready)
        ordered: list[Step] = []
        while ready:
            i = heapq.heappop(ready)
            ordered.append(units[i])
            for reader in readers[i]:
                missing[reader].discard(i)
                if not missing[reader]:
                    heapq.heappush(ready, reader)
        if len(ordered) != len(units):
            raise _NoBlocks
        return tuple(ordered)


def _agree(known: dict[K, V], key: K, value: V) -> None:
    """Record that a key corresponds to a value. A key must not correspond to two values."""
    if known.setdefault(key, value) != value:
        raise _NoBlocks


def _chained(pairs: Sequence[Mapping[K, K]]) -> list[dict[K, K]]:
    """For each layer, a dict from the items of the first layer to the corresponding items of this layer."""
    layers = [{key: key for key in pairs[0]}]
    for pair in pairs:
        last = layers[-1]
        if set(pair) != set(last.values()):
            raise _NoBlocks
        layers.append({key: pair[value] for key, value in last.items()})
    return layers


def _alike(one: Call, other: Call) -> bool:
    """Whether two calls are the same but for the values that they read and make."""
    return (one.domain, one.op_type, one.attributes, one.host, len(one.inputs), len(one.outputs)) == (
        other.domain,
        other.op_type,
        other.attributes,
        other.host,
        len(other.inputs),
        len(other.outputs),
    )


def _renamed(step: Step, names: Mapping[str, str], shared: Mapping[str, str]) -> Step:
    """The step as it is in the block's body: its tensors under their names within the layer, or as inputs."""

    def renamed(operand: Operand | None) -> Operand | None:
        if not isinstance(operand, Stored):
            return operand
        return Stored(names[operand.path]) if operand.path in names else Local(shared[operand.path])

    assert isinstance(step, Call)
    return replace(step, inputs=tuple(renamed(operand) for operand in step.inputs))
