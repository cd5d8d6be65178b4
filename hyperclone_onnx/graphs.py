"""Questions about an `onnx_ir` graph that several packages ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import onnx_ir as ir

DEFAULT_DOMAIN = ""
"""The domain of ONNX's own operators; ``ai.onnx`` is another spelling of it (`canonical_domain`)."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

MOVES_ELEMENTS = frozenset(["Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
"""Operators of the default domain that put the elements of one input into another shape or order, and no more."""

MOVES_OR_CASTS = MOVES_ELEMENTS | {"Cast"}
"""The same, and conversions to another element type."""


RANDOM = frozenset(
    ["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]
)
"""Operators of the default domain that draw random numbers."""


def canonical_domain(domain: str) -> str:
    """The spelling of a domain that we use everywhere.

    >>> canonical_domain("ai.onnx"), canonical_domain("com.microsoft")
    ('', 'com.microsoft')
    """
    return DEFAULT_DOMAIN if domain == "ai.onnx" else domain


def opset_of(graph: ir.Graph, domain: str = DEFAULT_DOMAIN) -> int:
    """The version of a domain that a graph imports, 1 where it does not import the domain."""
    return graph.opset_imports.get(domain, 1)


def eps_of(dtype: ir.DataType) -> float:
    """The gap between 1 and the next larger number of a floating-point type.

    >>> eps_of(ir.DataType.BFLOAT16)
    0.0078125
    """
    return float(ml_dtypes.finfo(dtype.numpy()).eps)  # type: ignore[no-untyped-call]


def weight_bytes(model: ir.Model) -> int:
    """The bytes of all tensors that the main graph of a model stores."""
    stored = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in stored if tensor is not None)


def is_initializer(value: ir.Value) -> bool:
    """Whether a value is stored in the model. Other values are inputs, or are computed."""
    return value.const_value is not None and value.producer() is None


def describe(node: ir.Node) -> str:
    """The name of a node in messages: ``MatMul '/layer.0/q_proj'``."""
    domain = f"{node.domain}." if node.domain else ""
    return f"{domain}{node.op_type} {node.name!r}" if node.name else f"{domain}{node.op_type}"


class FreshNames:
    """Names for new values and new nodes of a graph, which nothing in it, nor in the bodies inside it, has.

    >>> x = ir.Input("x")
    >>> fresh = FreshNames(ir.Graph([x], [], nodes=[ir.node("Relu", [x], name="x.scale")]))
    >>> fresh.value("x"), fresh.value("x"), fresh.value("x.scale"), fresh.node("x.scale")
    ('x.1', 'x.2', 'x.scale', 'x.scale.1')
    """

    def __init__(self, graph: ir.Graph, reserved: Iterable[str] = ()) -> None:
        """Begin with all names that the graph has, and with names of values that are reserved."""
        values: set[str | None] = set(reserved)
        nodes: set[str | None] = set()
        for part in (graph, *graph.subgraphs()):
            values.update((*part.initializers, *(value.name for value in part.inputs)))
            for node in part:
                nodes.add(node.name)
                values.update(value.name for value in node.outputs)
        self._values, self._nodes = _Names(values), _Names(nodes)

    def value(self, hint: str) -> str:
        """The hint itself, or the first of ``hint.1``, ``hint.2``, ... that no value has; it is taken from now on."""
        return self._values.take(hint)

    def node(self, hint: str) -> str:
        """The same, such that no node has it."""
        return self._nodes.take(hint)


class _Names:
    def __init__(self, taken: set[str | None]) -> None:
        self._taken = taken
        self._numbers: dict[str, int] = {}

    def take(self, hint: str) -> str:
        name, number = hint, self._numbers.get(hint, 0)
        while name in self._taken:
            number += 1
            name = f"{hint}.{number}"
        self._numbers[hint] = number
        self._taken.add(name)
        return name


def stem(node: ir.Node) -> str:
    """How names that are made for a node begin: with its own name or, where it has none, with its operator's."""
    return node.name or node.op_type


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node has as attributes: the branches of an If, the body of a Loop or a Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def captured_values(node: ir.Node) -> Iterator[ir.Value]:
    """The values of enclosing graphs that a node's subgraphs read."""
    for body in bodies_of(node):
        inner = list(body.all_nodes())
        own = {output for inner_node in inner for output in inner_node.outputs} | set(body.inputs)
        for inner_node in inner:
            yield from (value for value in inner_node.inputs if value is not None and value not in own)
        yield from (value for value in body.outputs if value is not None and value not in own)
