"""Takes the rounding out of quantised graphs: the same sums and products, in real numbers.

Some models round activations to 8 bits while they run. Then an error in the last bit of a float can change a code by a
whole step. This happens in the grown model, and also in the source on another machine. Without that rounding, equal
graphs are equal to float precision again, and wrong graphs are still wrong. Stored codes stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import tape

from hyperclone_onnx.graphs import FreshNames, is_initializer, stem

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"


class Unsupported(Exception):
    """Raised for a quantised operator that we cannot write without rounding."""


def rounds(model: ir.Model) -> bool:
    """Whether a model rounds computed values to few bits."""
    return any(_rounds(node) for node in model.graph.all_nodes())


def _rounds(node: ir.Node) -> bool:
    if node.op_type == "MatMulNBits":
        return "accuracy_level" in node.attributes and node.attributes["accuracy_level"].as_int() == 4
    return node.op_type in _FORMS and node.op_type != "DequantizeLinear"


def unrounded(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """A copy of the model that computes with numbers of `dtype` instead of codes.

    Raises:
        Unsupported: the model has a quantised operator without such a form.
    """
    copy = model.clone()
    fresh = FreshNames(copy.graph)
    for graph in (copy.graph, *copy.graph.subgraphs()):
        for node in list(graph):
            if node.op_type == "MatMulNBits" and _rounds(node):
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
            elif node.op_type in _FORMS:
                _replace(copy, graph, node, dtype, fresh)
    outputs = set(copy.graph.outputs)
    for node in copy.graph.all_nodes():
        for value in node.outputs:
            if value not in outputs:
                value.type, value.shape = None, None
    return copy


def _replace(model: ir.Model, graph: ir.Graph, node: ir.Node, dtype: ir.DataType, fresh: FreshNames) -> None:
    form = _Form(node, dtype, fresh)
    results = _FORMS[node.op_type](form)
    graph.insert_before(node, form.tape.nodes)
    for number, made in enumerate(form.tape.nodes):
        made.name = fresh.node(f"{stem(node)}.real.{number}")
        for value in made.outputs:
            value.name = value.name or fresh.value(f"{made.name}.out")
    for value in form.stored:
        model.graph.register_initializer(value)
    for old, new in zip(node.outputs, results, strict=False):
        name, leaves = old.name, old.is_graph_output()
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if leaves:
            old.name, new.name = fresh.value(f"{name}.codes"), name
            new.type, new.shape = ir.TensorType(dtype), old.shape
        if node.op_type in _SUMS:
            _go_on(model, new, dtype, fresh)
    graph.remove(node, safe=True)


def _go_on(model: ir.Model, value: ir.Value, dtype: ir.DataType, fresh: FreshNames) -> None:
    """Do the arithmetic on sums of integers in real numbers too: convert its stored operands."""
    for user in dict.fromkeys(use.node for use in value.uses()):
        if user.op_type not in ("Add", "Sub", "Mul", "Div") or user.domain:
            continue
        for number, other in enumerate(user.inputs):
            tensor = other.const_value if other is not None and is_initializer(other) else None
            if tensor is not None and tensor.dtype.is_integer():
                real = _stored(fresh.value(f"{stem(user)}.real.{number}"), tensor.numpy(), dtype)
                model.graph.register_initializer(real)
                user.replace_input_with(number, real)
        _go_on(model, user.outputs[0], dtype, fresh)


def _stored(name: str, array: Any, dtype: ir.DataType) -> ir.Value:
    """An initializer that holds these numbers, not yet in a graph."""
    tensor = ir.tensor(np.asarray(array, dtype=dtype.numpy()), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)  # type: ignore[arg-type]


class _Form:
    """Builds the nodes that replace one quantised node and compute in real numbers."""

    def __init__(self, node: ir.Node, dtype: ir.DataType, fresh: FreshNames) -> None:
        self.node = node
        self.dtype = dtype
        self._fresh = fresh
        self.tape = tape.Tape()
        self.stored: list[ir.Value] = []

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def value(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None
        return value

    def array(self, index: int) -> Array | None:
        """A stored input in real numbers, None if it is not stored."""
        value = self.node.inputs[index] if self.has(index) else None
        tensor = None if value is None or not is_initializer(value) else value.const_value
        return None if tensor is None else np.asarray(tensor.numpy()).astype(self.dtype.numpy())

    def constant(self, array: Any) -> ir.Value:
        value = _stored(self._new_name(), array, self.dtype)
        self.stored.append(value)
        return value

    def _new_name(self) -> str:
        return self._fresh.value(f"{stem(self.node)}.real.stored")

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        result = self.tape.op(op_type, list(inputs), attributes, domain=domain)
        assert isinstance(result, ir.Value)
        return result

    def real(self, index: int) -> ir.Value:
        """An input converted to real numbers, without scale or zero point."""
        value = self.value(index)
        tensor = value.const_value if is_initializer(value) else None
        if tensor is None:
            return self.op("Cast", value, to=int(self.dtype))
        codes, dtype, name = tensor, self.dtype, self._new_name()
        shape = ir.Shape(codes.shape.numpy())
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(codes.numpy().astype(dtype.numpy()), name=name), dtype=dtype, shape=shape, name=name
        )
        self.stored.append(ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy))
        return self.stored[-1]

    def parameter(self, index: int, trailing: int) -> ir.Value:
        """A scale or zero point: one number, or a vector along the axis before the last `trailing` ones."""
        array = self.array(index)
        if array is None:
            return self.real(index)
        return self.constant(array.reshape(()) if array.size == 1 else array.reshape(-1, *[1] * trailing))

    def centred(self, index: int, zero: int, trailing: int = 0) -> ir.Value:
        """Codes minus their zero point."""
        codes = self.real(index)
        return self.op("Sub", codes, self.parameter(zero, trailing)) if self.has(zero) else codes

    def dequantised(self, index: int, trailing: int = 0) -> ir.Value:
        """(codes - zero point) * scale. The three inputs follow each other: codes, scale, zero point."""
        return self.op("Mul", self.centred(index, index + 2, trailing), self.parameter(index + 1, trailing))

    def quantised(self, value: ir.Value, scale: int, zero: int) -> ir.Value:
        """Returns value / scale + zero point, without the rounding that follows in the source."""
        codes = self.op("Div", value, self.parameter(scale, 0))
        return self.op("Add", codes, self.parameter(zero, 0)) if self.has(zero) else codes

    def attributes(self, *names: str) -> dict[str, Any]:
        """Those of the named attributes that the node has."""
        return {name: self.node.attributes[name].value for name in names if name in self.node.attributes}


Results = tuple[ir.Value, ...]


def _dynamic_linear(form: _Form) -> Results:
    return form.real(0), form.constant(1.0), form.constant(0.0)


def _trailing(form: _Form) -> int:
    """The number of axes behind the axis of a vector of scales.

    Raises:
        Unsupported: the rank of the values is not known.
    """
    scale = form.value(1)
    if scale.shape is not None and scale.shape.numpy() in ((), (1,)):
        return 0
    shape = form.value(0).shape
    if shape is None or not is_initializer(scale) or len(scale.shape or ()) != 1:
        raise Unsupported(f"{form.node.op_type} {form.node.name!r} with scales in blocks, or of unknown rank")
    attribute = form.node.attributes.get("axis")
    return len(shape) - 1 - (1 if attribute is None else attribute.as_int()) % len(shape)


def _quantize_linear(form: _Form) -> Results:
    trailing = _trailing(form)
    codes = form.op("Div", form.real(0), form.parameter(1, trailing))
    return (form.op("Add", codes, form.parameter(2, trailing)) if form.has(2) else codes,)


def _dequantize_linear(form: _Form) -> Results:
    codes, scale = form.array(0), form.array(1)
    if codes is None or scale is None or scale.ndim < 2:
        return (form.dequantised(0, _trailing(form)),)
    # In blocks: each scale belongs to `block_size` codes along an axis.
    axis, size = form.node.attributes["axis"].as_int(), form.node.attributes["block_size"].as_int()
    window = [slice(0, n) for n in codes.shape]
    zero = form.array(2)
    spread = [np.repeat(array, size, axis)[tuple(window)] for array in (scale, zero) if array is not None]
    return (form.constant((codes - (spread[1] if zero is not None else 0)) * spread[0]),)


_SUMS = ("MatMulInteger", "ConvInteger")
"""Operators whose results are integers but no codes: other nodes add to them or divide them before the scale."""


def _matmul_integer(form: _Form) -> Results:
    return (form.op("MatMul", form.centred(0, 2, 1), form.centred(1, 3)),)


def _conv_attributes(form: _Form) -> dict[str, Any]:
    return form.attributes("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _conv_integer(form: _Form) -> Results:
    rank = len(form.value(1).shape or ())
    return (form.op("Conv", form.centred(0, 2), form.centred(1, 3, rank - 1), **_conv_attributes(form)),)


def _qlinear_matmul(form: _Form) -> Results:
    product = form.op("MatMul", form.dequantised(0, 1), form.dequantised(3))
    return (form.quantised(product, 6, 7),)


def _qlinear_conv(form: _Form) -> Results:
    if "channels_last" in form.node.attributes and form.node.attributes["channels_last"].as_int():
        raise Unsupported("QLinearConv with channels last")
    rank = len(form.value(3).shape or ())
    operands = [form.dequantised(0), form.dequantised(3, rank - 1)]
    if form.has(8):
        scale = form.op("Mul", form.parameter(1, 0), form.parameter(4, 0))
        operands.append(form.op("Mul", form.real(8), scale))
    return (form.quantised(form.op("Conv", *operands, **_conv_attributes(form)), 6, 7),)


def _biased(form: _Form, product: ir.Value, bias: int) -> Results:
    return (form.op("Add", product, form.real(bias)) if form.has(bias) else product,)


def _dynamic_quantize_matmul(form: _Form) -> Results:
    weight = form.op("Mul", form.centred(1, 3), form.parameter(2, 0))
    return _biased(form, form.op("MatMul", form.real(0), weight), 4)


def _matmul_integer_to_float(form: _Form) -> Results:
    a = form.op("Mul", form.centred(0, 4, 1), form.parameter(2, 1))
    return _biased(form, form.op("MatMul", a, form.op("Mul", form.centred(1, 5), form.parameter(3, 0))), 6)


def _qgemm(form: _Form) -> Results:
    transposed = form.attributes("transB").get("transB", 0)
    alpha = form.attributes("alpha").get("alpha", 1.0)
    a, b = form.dequantised(0), form.dequantised(3, 1 if transposed else 0)
    product = form.op("Gemm", a, b, alpha=alpha, **form.attributes("transA", "transB"))
    if form.has(6):
        scale = form.op("Mul", form.parameter(1, 0), form.parameter(4, 0))
        bias = form.op("Mul", form.op("Mul", form.real(6), scale), form.constant(alpha))
        product = form.op("Add", product, bias)
    return (form.quantised(product, 7, 8) if form.has(7) else product,)


def _qattention(form: _Form) -> Results:
    x = form.op("Mul", form.centred(0, 6), form.parameter(3, 0))
    w = form.op("Mul", form.centred(1, 7), form.parameter(4, 0))
    rest = [form.node.inputs[5] if form.has(5) else None, form.node.inputs[8] if form.has(8) else None]
    made = form.tape.op_multi_out(
        "Attention",
        [x, w, form.value(2), *rest],
        form.attributes("num_heads", "unidirectional", "scale", "mask_filter_value", "do_rotary"),
        domain=MICROSOFT,
        num_outputs=len(form.node.outputs),
    )
    return tuple(made)


def _binary(op_type: str) -> Callable[[_Form], Results]:
    return lambda form: (form.quantised(form.op(op_type, form.dequantised(0), form.dequantised(3)), 6, 7),)


def _unary(op_type: str, *names: str) -> Callable[[_Form], Results]:
    def unary(form: _Form) -> Results:
        return (form.quantised(form.op(op_type, form.dequantised(0), **form.attributes(*names)), 3, 4),)

    return unary


def _qlinear_where(form: _Form) -> Results:
    return (form.quantised(form.op("Where", form.value(0), form.dequantised(1), form.dequantised(4)), 7, 8),)


def _qlinear_concat(form: _Form) -> Results:
    parts = [form.dequantised(start) for start in range(2, len(form.node.inputs), 3)]
    return (form.quantised(form.op("Concat", *parts, **form.attributes("axis")), 0, 1),)


_FORMS: dict[str, Callable[[_Form], Results]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_linear,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "MatMulInteger": _matmul_integer,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "QAttention": _qattention,
    "QGemm": _qgemm,
    "QLinearAdd": _binary("Add"),
    "QLinearConcat": _qlinear_concat,
    "QLinearConv": _qlinear_conv,
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "QLinearMatMul": _qlinear_matmul,
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _unary("Softmax", "axis"),
    "QLinearWhere": _qlinear_where,
    "QuantizeLinear": _quantize_linear,
}
