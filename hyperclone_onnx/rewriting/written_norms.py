"""Writes norms as simple operators whose averages are weighted.

A fused norm averages over all indices of an axis alike. Where growth repeats the indices unequally, each average must
count each source index once. So the norm is written as the specification of its operator defines it, with a product
with weights in front of each average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.graphs import MICROSOFT, FreshNames

Array = npt.NDArray[Any]

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Store(Protocol):
    """Stores an array in the graph under a name, in a type."""

    def __call__(self, hint: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Store it. The name is `hint`, or begins with it."""


class NormWriter:
    """Writes the nodes that stand in the place of one node.

    Args:
        node: the node that averages.
        over: the axes that it averages over, as negative numbers.
        shares: by axis, how much of its source index each index is. They add up to the size in the source.
        store: stores a constant.
        fresh: names for new nodes and values.
        opset: the version of ONNX's own operators in the graph.
        dtype: the type of all floating-point values, in the place of their own type.
    """

    def __init__(
        self,
        node: ir.Node,
        over: Sequence[int],
        shares: Mapping[int, Array],
        store: Store,
        fresh: FreshNames,
        opset: int,
        dtype: ir.DataType | None = None,
    ) -> None:
        assert isinstance(node.graph, ir.Graph), "functions are inlined"
        self.node, self.graph, self.over, self.opset = node, node.graph, over, opset
        self.store, self.fresh, self.dtype = store, fresh, dtype
        self.sizes = {axis: len(array) for axis, array in shares.items()}
        self.made: list[ir.Node] = []
        # ONNX's inference does not know the types behind operators of other domains, but stored tensors have theirs.
        types = (value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.dtype)
        self.type = next((dtype for dtype in types if dtype.is_floating_point()), ir.DataType.FLOAT)
        self.wide = ir.DataType.FLOAT if self.type in _HALF else self.type
        """The type in which averages are computed: at least float32, as the operators' specifications say."""
        divides = (node.domain, node.op_type) in SUMS
        self.weights = [
            self.number(
                "average", (array if divides else array * (len(array) / array.sum())).reshape(-1, *[1] * (-axis - 1))
            )
            for axis, array in shares.items()
        ]
        """What multiplies the summands of a sum, or of an average, along each axis."""
        self._axes: ir.Value | None = None

    def write(self) -> None:
        """Write the nodes, and put them in the place of the node."""
        FORMS[self.node.domain, self.node.op_type](self)

    # -- values ------------------------------------------------------------------------------------------------

    def input(self, slot: int) -> ir.Value | None:
        """An input of the node; None where it is absent."""
        return self.node.inputs[slot] if slot < len(self.node.inputs) else None

    def given(self, slot: int) -> ir.Value:
        """An input that the operator must have."""
        value = self.input(slot)
        assert value is not None
        return value

    def is_read(self, index: int) -> bool:
        """Whether the node has an output that something reads."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].uses() or outputs[index].is_graph_output())

    def real(self, name: str, default: float) -> float:
        """An attribute of the node."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_float()

    def number(self, name: str, array: Array | float) -> ir.Value:
        """A constant in the type in which averages are computed."""
        dtype = self.dtype or self.wide
        return self.store(f"{self.node.name}.{name}", np.asarray(array).astype(dtype.numpy()), dtype)

    def integers(self, name: str, numbers: Sequence[int], dtype: type[Any] = np.int64) -> ir.Value:
        """A constant vector of integers."""
        return self.store(f"{self.node.name}.{name}", np.asarray(numbers, dtype=dtype))

    def step(
        self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: int | Sequence[int]
    ) -> ir.Value:
        """A new node; its output has the type in which averages are computed, or another one."""
        hint = f"{self.node.name}.{op_type}"
        self.made.append(ir.node(op_type, list(inputs), attributes, name=self.fresh.node(hint)))
        result = self.made[-1].outputs[0]
        result.name, result.type = self.fresh.value(hint), ir.TensorType(dtype or self.wide)
        return result

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """A floating-point value in a type."""
        if self.dtype is not None or dtype is None or (value.dtype or self.type) == dtype:
            return value
        return self.step("Cast", value, dtype=dtype, to=int(dtype))

    def mean(self, value: ir.Value) -> ir.Value:
        """The weighted average. The averaged axes stay, with size 1."""
        return self.reduce("ReduceMean", self.weighted(value), since=18)

    def weighted(self, value: ir.Value) -> ir.Value:
        """A value times the weights."""
        for weights in self.weights:
            value = self.step("Mul", value, weights)
        return value

    def reduce(self, op_type: str, value: ir.Value, since: int) -> ir.Value:
        """Reduce the axes that the node averages over. They stay, with size 1.

        Args:
            op_type: the operator.
            value: what it reduces.
            since: the opset in which the axes of this operator became an input.
        """
        if self.opset < since:
            return self.step(op_type, value, axes=list(self.over), keepdims=1)
        if self._axes is None:
            self._axes = self.integers("axes", self.over)
        return self.step(op_type, value, self._axes, keepdims=1)

    def add(self, total: ir.Value, other: ir.Value | None) -> ir.Value:
        """A sum in the type in which averages are computed; the first value where there is no other."""
        total = self.cast(total, self.wide)
        return total if other is None else self.step("Add", total, self.cast(other, self.wide))

    # -- results -----------------------------------------------------------------------------------------------

    def normalise(
        self, x: ir.Value, gain: int | None, bias: int | None, epsilon: float, *, centred: bool = True
    ) -> tuple[ir.Value, ir.Value | None, ir.Value]:
        """(x - mean x) / sqrt(mean of its squares + epsilon) gain + bias; then the mean and the divisor."""
        mean = self.mean(x) if centred else None
        centre = x if mean is None else self.step("Sub", x, mean)
        variance = self.mean(self.step("Mul", centre, centre))
        divisor = self.step("Sqrt", self.step("Add", variance, self.number("epsilon", epsilon)))
        normal = self.step("Div", centre, divisor)
        return self.affine(normal, gain, bias), mean, divisor

    def affine(self, normal: ir.Value, gain: int | None, bias: int | None) -> ir.Value:
        """A normalised value in the type of the output, times the gain, plus the bias."""
        dtype = self.node.outputs[0].dtype or self.type
        result = self.cast(normal, dtype)
        for op_type, slot in (("Mul", gain), ("Add", bias)):
            operand = None if slot is None else self.input(slot)
            if operand is not None:
                result = self.step(op_type, result, operand, dtype=dtype)
        return result

    def replace(self, results: Mapping[int, ir.Value]) -> None:
        """Put the new nodes in the place of the node: results take the names and the readers of its outputs."""
        self.graph.insert_before(self.node, self.made)
        for index, result in results.items():
            old = self.node.outputs[index]
            name, old.name = old.name, None
            result.name, result.type, result.shape = name, old.type or result.type, old.shape
            result.meta.update(old.meta)
            result.metadata_props.update(old.metadata_props)
            old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def with_moments(
        self, result: ir.Value, mean: ir.Value | None, divisor: ir.Value, slots: tuple[int | None, int]
    ) -> dict[int, ir.Value]:
        """The result as output 0; the mean and the inverse of the divisor as other outputs, where they are read."""
        results = {0: result}
        if mean is not None and slots[0] is not None and self.is_read(slots[0]):
            results[slots[0]] = self.cast(mean, self.node.outputs[slots[0]].dtype)
        if self.is_read(slots[1]):
            inverse = self.step("Reciprocal", divisor)
            results[slots[1]] = self.cast(inverse, self.node.outputs[slots[1]].dtype)
        return results


SUMS = {("", "Softmax"), ("", "LpNormalization")}
"""The operators that divide by a sum and not by an average."""

Form = Callable[[NormWriter], None]
FORMS: dict[tuple[str, str], Form] = {}
"""By (domain, operator): how its averages are weighted."""


def _form(*op_types: str, domain: str = "") -> Callable[[Form], Form]:
    def register(form: Form) -> Form:
        FORMS.update({(domain, op_type): form for op_type in op_types})
        return form

    return register


@_form("ReduceMean")
def _reduce_mean(w: NormWriter) -> None:
    """Write mean_j w_j x_j."""
    x = w.weighted(w.cast(w.given(0), w.wide))
    attributes = {name: attribute.value for name, attribute in w.node.attributes.items()}
    axes = [value for value in w.node.inputs[1:] if value is not None]
    w.replace({0: w.cast(w.step("ReduceMean", x, *axes, **attributes), w.type)})


@_form("LayerNormalization")
def _layer_norm(w: NormWriter) -> None:
    """Write (x - mean x) / sqrt(var x + epsilon) gain + bias."""
    x = w.cast(w.given(0), w.wide)
    result, mean, divisor = w.normalise(x, 1, 2, w.real("epsilon", 1e-5))
    w.replace(w.with_moments(result, mean, divisor, (1, 2)))


@_form("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(w: NormWriter) -> None:
    """Write x / sqrt(mean x^2 + epsilon) gain."""
    x = w.cast(w.given(0), w.wide)
    result, _, divisor = w.normalise(x, 1, None, w.real("epsilon", 1e-5), centred=False)
    w.replace(w.with_moments(result, None, divisor, (None, 1)))


@_form("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_norm(w: NormWriter) -> None:
    """Write the norm of x + skip + bias; the last output is that sum."""
    centred = w.node.op_type == "SkipLayerNormalization"
    beta, bias = (3, 4) if centred else (None, 3)
    total = w.add(w.add(w.given(0), w.given(1)), w.input(bias))
    result, mean, divisor = w.normalise(total, 2, beta, w.real("epsilon", 1e-12), centred=centred)
    results = w.with_moments(result, mean, divisor, (1, 2))
    if w.is_read(3):
        results[3] = w.cast(total, w.type)
    w.replace(results)


@_form("EmbedLayerNormalization", domain=MICROSOFT)
def _embed_norm(w: NormWriter) -> None:
    """Write the norm of words[ids] + positions[places] + kinds[segments], and the numbers of tokens that are shown."""
    ids, positions = w.given(0), w.input(8)
    if positions is None:
        length = w.step(
            "Gather", w.step("Shape", ids, dtype=ir.DataType.INT64), w.integers("one", [1]), dtype=ir.DataType.INT64
        )
        zero = w.integers("zero", [0])
        places = w.step("Slice", w.given(3), zero, length, zero, dtype=w.type)
    else:
        places = w.step("Gather", w.given(3), positions, dtype=w.type)
    total = w.add(w.add(w.step("Gather", w.given(2), ids, dtype=w.type), places), None)
    kinds, segments = w.input(4), w.input(1)
    if kinds is not None and segments is not None:
        total = w.add(total, w.step("Gather", kinds, segments, dtype=w.type))
    result, _, _ = w.normalise(total, 5, 6, w.real("epsilon", 1e-12))
    results = {0: result}
    if w.is_read(1):
        results[1] = _shown_tokens(w, ids)
    if w.is_read(2):
        results[2] = w.cast(total, w.type)
    w.replace(results)


def _shown_tokens(w: NormWriter, ids: ir.Value) -> ir.Value:
    """For each sequence, the number of tokens whose mask is 1; 0 where there is no mask."""
    mask = w.input(7)
    if mask is None:
        counted = w.step("Sub", ids, ids, dtype=ir.DataType.INT32)
    else:
        one = w.integers("shown", [1], np.int32)
        shown = w.step("Equal", mask, one, dtype=ir.DataType.BOOL)
        counted = w.step("Cast", shown, dtype=ir.DataType.INT32, to=int(ir.DataType.INT32))
    if w.opset < 13:
        return w.step("ReduceSum", counted, dtype=ir.DataType.INT32, axes=[1], keepdims=0)
    return w.step("ReduceSum", counted, w.integers("last", [1]), dtype=ir.DataType.INT32, keepdims=0)


@_form("MeanVarianceNormalization")
def _mean_variance_norm(w: NormWriter) -> None:
    """Write (x - mean x) / (sqrt(mean x^2 - (mean x)^2) + 1e-9), as the operator's function is defined."""
    x = w.cast(w.given(0), w.wide)
    mean = w.mean(x)
    variance = w.step("Sub", w.mean(w.step("Mul", x, x)), w.step("Mul", mean, mean))
    divisor = w.step("Add", w.step("Sqrt", variance), w.number("epsilon", 1e-9))
    w.replace({0: w.affine(w.step("Div", w.step("Sub", x, mean), divisor), None, None)})


@_form("GroupNormalization")
def _group_norm(w: NormWriter) -> None:
    """Write each group of channels of each sample normalised, times gain, plus bias (of groups before opset 21).

    The averaged axes are those of a value of the shape (batch, groups, channels of a group, places).
    """
    groups = w.node.attributes["num_groups"].as_int()
    x, channels, places = w.given(0), w.sizes.get(-2), w.sizes.get(-1)
    whole = None if channels is None else groups * channels
    inner = [0, groups, *_one_free(channels, places)]
    shape = w.step("Shape", x, dtype=ir.DataType.INT64)
    grouped = w.step("Reshape", w.cast(x, w.wide), w.integers("groups", inner))
    normal, _, _ = w.normalise(grouped, None, None, w.real("epsilon", 1e-5))
    by_group = w.opset < 21
    flat = w.integers("channels", [0, groups, -1] if by_group else [0, *_one_free(whole, places)])
    result = w.step("Reshape", normal, flat, dtype=w.type)
    for op_type, slot in (("Mul", 1), ("Add", 2)):
        operand = w.step("Unsqueeze", w.given(slot), w.integers("last", [1]), dtype=w.type)
        result = w.step(op_type, result, operand, dtype=w.type)
    w.replace({0: w.step("Reshape", result, shape, dtype=w.type)})


def _one_free(channels: int | None, places: int | None) -> tuple[int, int]:
    """The last two sizes of a Reshape's result: at most one is left to the Reshape. One of the two is known."""
    return (channels, -1) if channels is not None else (-1, -1 if places is None else places)


@_form("Softmax")
def _softmax(w: NormWriter) -> None:
    """Write exp(x) / sum_j w_j exp(x_j). The largest number is subtracted first."""
    x = w.cast(w.given(0), w.wide)
    powers = w.step("Exp", w.step("Sub", x, w.reduce("ReduceMax", x, since=18)))
    total = w.reduce("ReduceSum", w.weighted(powers), since=13)
    w.replace({0: w.cast(w.step("Div", powers, total), w.type)})


@_form("LpNormalization")
def _lp_norm(w: NormWriter) -> None:
    """Write x / (sum_j w_j |x_j|^p)^(1/p), which is 0 where the norm is 0."""
    x = w.cast(w.given(0), w.wide)
    power = w.node.attributes.get("p")
    is_first = power is not None and power.as_int() == 1
    total = w.reduce("ReduceSum", w.weighted(w.step("Abs", x) if is_first else w.step("Mul", x, x)), since=13)
    norm = total if is_first else w.step("Sqrt", total)
    tiny = w.number("epsilon", float(np.finfo(np.float32).tiny))
    w.replace({0: w.cast(w.step("Div", x, w.step("Max", norm, tiny)), w.type)})
