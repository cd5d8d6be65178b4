"""Checks the protobuf of a model before anything else reads it: its names are unique, and its sizes are possible.

ONNX's specification demands all of this, but a file may have been made to break the programs that read it. Each check
walks over the graphs once, and its recursion is no deeper than the nesting of the graphs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx

from hyperclone_onnx.errors import BadModel, Refused
from hyperclone_onnx.graphs import canonical_domain

MOST_NODES = 500_000
"""More nodes than any model has. Functions that call each other twice can unfold into more than memory holds."""

MOST_MESSAGES = 5_000_000
"""More parts than the graphs of any model have."""

LARGEST = 2**63 - 1


def check_structure(file: str, model: onnx.ModelProto) -> None:
    """Refuse a model whose graphs contradict themselves or are too large.

    Raises:
        BadModel: a name is defined twice or not at all, nodes form a cycle, a size is impossible, a function calls
            itself.
        Refused: an output is a map.
    """
    _check_amount(file, model)
    _refuse_maps(file, model.graph)
    _check_functions(file, model)
    _Scope(file, model.graph, "the graph").check()
    for function in model.functions:
        _Scope(file, function, f"function {function.name!r}").check()


def _refuse_maps(file: str, graph: onnx.GraphProto) -> None:
    """A classifier of scikit-learn gives probabilities as a sequence of maps, unless the converter is told not to."""
    for value in (*graph.input, *graph.output):
        if value.type.HasField("map_type") or value.type.sequence_type.elem_type.HasField("map_type"):
            raise Refused(
                f"{file}: {value.name!r} is a map, and only tensors are compared: convert the model again without "
                "ZipMap (skl2onnx: options={'zipmap': False})"
            )


# -- how much ---------------------------------------------------------------------------------------------


def _check_amount(file: str, model: onnx.ModelProto) -> None:
    parts = 0
    for graph in _graphs(model):
        for node in graph.node:
            parts += 1 + len(node.input) + len(node.output) + len(node.attribute)
        values = (*getattr(graph, "input", ()), *getattr(graph, "output", ()), *graph.value_info)
        for value in values if isinstance(graph, onnx.GraphProto) else ():
            parts += 1 + len(value.type.tensor_type.shape.dim)
        if parts > MOST_MESSAGES:
            raise BadModel(f"{file}: a graph of more than {MOST_MESSAGES:,} parts: this is no model")


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """Every graph and function body, and the bodies of their nodes."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(inner for node in graph.node for inner in _bodies(node))


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


Key = tuple[str, str, str]


def _check_functions(file: str, model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, or that unfold into too many nodes."""
    functions: dict[Key, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (canonical_domain(function.domain), function.name, function.overload)
        if key in functions:
            raise BadModel(f"{file}: function {function.name!r} is defined twice")
        functions[key] = function
    sizes: dict[Key, int] = {}
    state: dict[Key, bool] = {}
    waiting = [(key, False) for key in functions]
    while waiting:  # depth first, without recursion: chains may be long
        key, done = waiting.pop()
        calls = _calls(functions[key], functions)
        if done:
            state[key] = True
            sizes[key] = sum(sizes.get(called, 1) * count for called, count in calls.items())
        elif key not in state:
            state[key] = False
            waiting.append((key, True))
            for called in calls:
                if state.get(called) is False:
                    raise BadModel(f"{file}: function {called[1]!r} calls itself")
                if called in functions and called not in state:
                    waiting.append((called, False))
    total = sum(sizes.get(called, 1) * count for called, count in _calls(model.graph, functions).items())
    if total > MOST_NODES:
        raise BadModel(f"{file}: its functions unfold into {total:.3g} nodes: this is no model")


def _calls(body: Any, functions: Iterable[Key]) -> Counter[Key]:
    """How often each operator occurs in a body and in the bodies of its nodes."""
    counts: Counter[Key] = Counter()
    waiting = [body]
    while waiting:
        for node in waiting.pop().node:
            counts[canonical_domain(node.domain), node.op_type, node.overload] += 1
            waiting.extend(_bodies(node))
    return counts


# -- names ------------------------------------------------------------------------------------------------


_FIELDS = {onnx.AttributeProto.TENSOR: "t", onnx.AttributeProto.GRAPH: "g", onnx.AttributeProto.TYPE_PROTO: "tp"}
"""The field that holds the value of an attribute that is a message. Numbers and texts always have a value."""


class _Scope:
    """One graph, or the body of a function, with the names that it can see."""

    def __init__(self, file: str, body: Any, where: str) -> None:
        self.file, self.body, self.where = file, body, where
        self.is_graph = isinstance(body, onnx.GraphProto)

    def check(self, outer: Sequence[set[str]] = ()) -> None:
        """Refuse names that are defined twice or not at all, in this graph and in the bodies of its nodes.

        Args:
            outer: the names of the graphs around this one. A body may define one of them anew (see `shadowing`).
        """
        own = self._definitions()
        visible = [*outer, own]
        for node in self.body.node:
            self._check_text(node, node.op_type, node.domain, node.name, *node.input, *node.output)
            for name in node.input:
                if name and not any(name in names for names in visible):
                    raise BadModel(f"{self.file}: {_named(node)} reads {name!r}, which is not defined")
            for attribute in node.attribute:
                self._check_attribute(node, attribute)
            for body in _bodies(node):
                _Scope(self.file, body, f"the body of {_named(node)}").check(visible)
        for output in self.body.output:
            name = output.name if self.is_graph else output
            if not any(name in names for names in visible):
                raise BadModel(f"{self.file}: output {name!r} of {self.where} is not defined")
        self._check_order()

    def _definitions(self) -> set[str]:
        inputs = [value.name if self.is_graph else value for value in self.body.input]
        outputs = [name for node in self.body.node for name in node.output if name]
        stored = [tensor.name for tensor in self.body.initializer] if self.is_graph else []
        for name in (*inputs, *stored):
            if not isinstance(name, str):
                raise BadModel(f"{self.file}: {self.where} has a name that is no UTF-8 text: {name!r}")
        for name in stored:
            if not name:
                raise BadModel(f"{self.file}: a stored tensor of {self.where} has no name")
        for tensor in self.body.initializer if self.is_graph else ():
            self._check_tensor(tensor, tensor.name)
        # A stored tensor may have the name of an input: it is the default of that input.
        for kind, names in (("inputs", inputs), ("stored tensors", stored)):
            for name, count in Counter(names).items():
                if count > 1:
                    raise BadModel(f"{self.file}: two {kind} of {self.where} are named {name!r}")
        for name, count in Counter([*{*inputs, *stored}, *outputs]).items():
            if count > 1:
                raise BadModel(f"{self.file}: {name!r} is defined more than once in {self.where}")
        return {*inputs, *stored, *outputs}

    def _check_text(self, node: onnx.NodeProto, *names: Any) -> None:
        """Refuse a text that is not UTF-8. Protobuf gives it as bytes."""
        for name in names:
            if not isinstance(name, str):
                raise BadModel(f"{self.file}: {_named(node)} has a name that is no UTF-8 text: {name!r}")

    def _check_attribute(self, node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
        self._check_text(node, attribute.name, attribute.ref_attr_name)
        field = _FIELDS.get(attribute.type)
        untyped = not attribute.name or attribute.type == onnx.AttributeProto.UNDEFINED
        if not attribute.ref_attr_name and (untyped or (field is not None and not attribute.HasField(field))):
            raise BadModel(f"{self.file}: attribute {attribute.name!r} of {_named(node)} has no name, type or value")
        for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
            self._check_tensor(tensor, f"{attribute.name} of {_named(node)}")

    def _check_tensor(self, tensor: onnx.TensorProto, name: str) -> None:
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise BadModel(f"{self.file}: tensor {name!r} has no type")
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > LARGEST:
            shape = " x ".join(map(str, tensor.dims[:8]))
            raise BadModel(f"{self.file}: tensor {name!r} has an impossible shape: {shape}")

    def _check_order(self) -> None:
        """Refuse cycles. The order of nodes may be wrong: they are sorted later."""
        producer = {name: number for number, node in enumerate(self.body.node) for name in node.output if name}
        needs = [{producer[name] for name in _reads(node) if name in producer} for node in self.body.node]
        readers: dict[int, list[int]] = {}
        for number, producers in enumerate(needs):
            for before in producers:
                readers.setdefault(before, []).append(number)
        ready = [number for number, producers in enumerate(needs) if not producers]
        left = [len(producers) for producers in needs]
        done = 0
        while ready:
            done += 1
            for number in readers.get(ready.pop(), ()):
                left[number] -= 1
                if not left[number]:
                    ready.append(number)
        if done < len(needs):
            stuck = next(node for node, count in zip(self.body.node, left, strict=True) if count)
            raise BadModel(f"{self.file}: a cycle of nodes: an input of {_named(stuck)} depends on its own output")


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, also those that its bodies read from outside."""
    yield from node.input
    read: set[str] = set()
    defined: set[str] = set()
    waiting = list(_bodies(node))
    while waiting:
        body = waiting.pop()
        defined.update(value.name for value in (*body.input, *body.initializer))
        read.update(output.name for output in body.output)
        for inner in body.node:
            defined.update(inner.output)
            read.update(inner.input)
            waiting.extend(_bodies(inner))
    yield from read - defined


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} of {list(node.output)[:1]}"
