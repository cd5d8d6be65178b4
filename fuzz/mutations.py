"""Random changes of a graph. A change is a function that takes a model and a generator, and changes the model in place.

A change returns False if the model has nothing that it could change. The changed model may be invalid, on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

Rng = np.random.Generator
Mutation = Callable[[onnx.ModelProto, Rng], bool | None]
MUTATIONS: list[Mutation] = []

ALIKE = [
    "Add Sub Mul Div Pow Max Min PRelu".split(),
    "Relu Tanh Sigmoid Neg Abs Sqrt Exp Identity Softplus Erf Gelu Sin Cos Reciprocal Floor Round".split(),
    "Softmax LogSoftmax Hardmax LpNormalization CumSum".split(),
    "ReduceMean ReduceSum ReduceMax ReduceL2 ReduceSumSquare ReduceProd ReduceMin ArgMax".split(),
    "MatMul Add Mul".split(),
    "Concat Add Mul Sum Max Mean".split(),
    "Transpose Identity Flatten".split(),
    "Less Greater Equal LessOrEqual GreaterOrEqual".split(),
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization".split(),
    "Gather GatherElements".split(),
]
"""Groups of operators that can replace one another."""


def mutation(function: Mutation) -> Mutation:
    """Add a change to the table."""
    MUTATIONS.append(function)
    return function


def pick(items: Sequence[Any], rng: Rng) -> Any:
    """A random item; None if there are no items."""
    return items[int(rng.integers(len(items)))] if len(items) else None


def graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The main graph, and the bodies of its nodes."""
    graphs = [model.graph]
    for graph in graphs:
        graphs += [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
    return graphs


def pick_graph(model: onnx.ModelProto, rng: Rng) -> onnx.GraphProto:
    """A random graph, most often the main graph."""
    every = graphs(model)
    return every[0] if rng.random() < 0.7 else pick(every, rng)


def pick_node(model: onnx.ModelProto, rng: Rng) -> tuple[onnx.GraphProto, NodeProto | None]:
    """A random node and its graph."""
    graph = pick_graph(model, rng)
    return graph, pick(graph.node, rng)


def replace_reads(graph: onnx.GraphProto, old: str, new: str, but: NodeProto | None = None) -> None:
    """Let all readers of a value read another value instead."""
    for node in graph.node:
        if node is not but:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new


@mutation
def drop_node(model: onnx.ModelProto, rng: Rng) -> bool:
    """Remove a node: the readers of its outputs read one of its inputs instead."""
    graph, node = pick_node(model, rng)
    if node is None or not node.input:
        return False
    stand_in = pick([name for name in node.input if name] or [""], rng)
    for output in node.output:
        replace_reads(graph, output, stand_in, node)
    if not any(output.name in node.output for output in graph.output) or rng.random() < 0.1:
        graph.node.remove(node)
    return True


@mutation
def swap_inputs(model: onnx.ModelProto, rng: Rng) -> bool:
    """Exchange two inputs of a node."""
    _, node = pick_node(model, rng)
    if node is None or len(node.input) < 2:
        return False
    i, j = rng.choice(len(node.input), 2, replace=False)
    node.input[i], node.input[j] = node.input[j], node.input[i]
    return True


@mutation
def rewire(model: onnx.ModelProto, rng: Rng) -> bool:
    """Let a node read another value, most often one that is computed before it."""
    graph, node = pick_node(model, rng)
    if node is None or not node.input:
        return False
    values = [name for other in graph.node for name in other.output] + [t.name for t in graph.initializer]
    if rng.random() < 0.9:
        values = [name for other in graph.node[: list(graph.node).index(node)] for name in other.output]
    new = pick(values, rng)
    if new is None:
        return False
    node.input[int(rng.integers(len(node.input)))] = new
    return True


@mutation
def change_operator(model: onnx.ModelProto, rng: Rng) -> bool:
    """Replace the operator of a node by a similar one."""
    graph = pick_graph(model, rng)
    choices = [(node, line) for node in graph.node for line in ALIKE if node.op_type in line]
    chosen = pick(choices, rng)
    if chosen is None:
        return False
    node, line = chosen
    node.op_type = pick([op_type for op_type in line if op_type != node.op_type], rng)
    return True


@mutation
def change_attribute(model: onnx.ModelProto, rng: Rng) -> bool:
    """Change or remove an attribute."""
    graph = pick_graph(model, rng)
    choices = [(node, a) for node in graph.node for a in node.attribute if a.type != AttributeProto.GRAPH]
    chosen = pick(choices, rng)
    if chosen is None:
        return False
    node, a = chosen
    if rng.random() < 0.1:
        node.attribute.remove(a)
    elif a.type == AttributeProto.INT:
        a.i = int(pick([a.i + 1, a.i - 1, -a.i, 0, 1, -1, 2, a.i * 2, 2**40], rng))
    elif a.type == AttributeProto.FLOAT:
        a.f = float(pick([a.f * 2, -a.f, 0.0, 1.0, a.f / 3], rng))
    elif a.type == AttributeProto.INTS and len(a.ints):
        i, j = rng.integers(len(a.ints), size=2)
        if rng.random() < 0.6:
            a.ints[i], a.ints[j] = a.ints[j], a.ints[i]
        elif rng.random() < 0.3:
            del a.ints[i]
        else:
            a.ints[i] = int(pick([a.ints[i] + 1, a.ints[i] - 1, 0, -1, a.ints[i] * 2], rng))
    elif a.type == AttributeProto.STRING:
        a.s = pick([b"", b"bilinear", b"tanh", a.s[::-1], b"\xff\x1b[2J"], rng)
    elif a.type == AttributeProto.TENSOR:
        return perturb(a.t, rng)
    else:
        return False
    return True


def perturb(tensor: TensorProto, rng: Rng) -> bool:
    """Change one number of a tensor."""
    array = numpy_helper.to_array(tensor).copy()
    if array.size == 0 or array.dtype.kind not in "iufb":
        return False
    flat = array.reshape(-1)
    i, j = rng.integers(flat.size, size=2)
    if flat.size > 1 and rng.random() < 0.5:
        flat[[i, j]] = flat[[j, i]]
    elif array.dtype.kind in "iu":
        with np.errstate(over="ignore"):
            flat[i] = pick([flat[i] + 1, flat[i] - 1, 0, 1, flat[i] * 2, flat[i] // 2, flat[i] * 0 - 1], rng)
    elif array.dtype.kind == "f":
        flat[i] = pick([flat[i] * 2, -flat[i], 0, 1, np.inf, np.nan], rng)
    else:
        flat[i] = not flat[i]
    replace_tensor(tensor, array)
    return True


def replace_tensor(tensor: TensorProto, array: np.ndarray[Any, Any]) -> None:
    """Replace the content of a stored tensor."""
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), tensor.name))


def weights(graph: onnx.GraphProto, least: int = 2) -> list[TensorProto]:
    """The stored float32 tensors with at least `least` elements."""
    return [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= least]


@mutation
def perturb_integers(model: onnx.ModelProto, rng: Rng) -> bool:
    """Change a stored shape, index, length or axis."""
    tensor = pick([t for t in model.graph.initializer if t.data_type in (6, 7, 9)], rng)
    return tensor is not None and perturb(tensor, rng)


@mutation
def perturb_weight(model: onnx.ModelProto, rng: Rng) -> bool:
    """Change a weight."""
    tensor = pick(weights(model.graph, 1), rng)
    return tensor is not None and perturb(tensor, rng)


@mutation
def resize_tensor(model: onnx.ModelProto, rng: Rng) -> bool:
    """Cut, lengthen, transpose or reshape a stored tensor."""
    tensor = pick(weights(model.graph), rng)
    if tensor is None:
        return False
    array = numpy_helper.to_array(tensor)
    way = rng.integers(5)
    axis = int(rng.integers(max(array.ndim, 1)))
    if way == 0 and array.ndim > 1:
        array = array.T
    elif way == 1:
        array = np.take(array, range(max(1, array.shape[axis] // 2)), axis=axis)
    elif way == 2:
        array = np.repeat(array, 2, axis=axis)
    elif way == 3:
        array = array[None]
    else:
        array = array.reshape(-1) if rng.random() < 0.5 else array.reshape(*array.shape, 1)
    replace_tensor(tensor, array)
    return True


@mutation
def retype_tensor(model: onnx.ModelProto, rng: Rng) -> bool:
    """Give a stored tensor, or all of them, another type."""
    kind = pick([np.float16, np.float64, np.int32, np.int64], rng)
    tensor = pick(model.graph.initializer, rng)
    if tensor is None or tensor.data_type not in (1, 6, 7):
        return False
    replace_tensor(tensor, numpy_helper.to_array(tensor).astype(kind))
    return True


@mutation
def swap_weights(model: onnx.ModelProto, rng: Rng) -> bool:
    """Exchange two uses of stored tensors."""
    stored = {t.name for t in model.graph.initializer}
    uses = [(node, i) for node in model.graph.node for i, name in enumerate(node.input) if name in stored]
    if len(uses) < 2:
        return False
    (a, i), (b, j) = (uses[k] for k in rng.choice(len(uses), 2, replace=False))
    a.input[i], b.input[j] = b.input[j], a.input[i]
    return True


@mutation
def tie_weights(model: onnx.ModelProto, rng: Rng) -> bool:
    """Let all uses of one stored tensor read another one of the same shape."""
    first = pick(weights(model.graph), rng)
    other = pick([t for t in weights(model.graph) if first is not None and list(t.dims) == list(first.dims)], rng)
    if first is None or other is None or other is first:
        return False
    for graph in graphs(model):
        replace_reads(graph, other.name, first.name)
    return True


@mutation
def transpose_tied(model: onnx.ModelProto, rng: Rng) -> bool:
    """Replace a weight by the transpose of another weight."""
    first = pick([t for t in weights(model.graph) if len(t.dims) == 2], rng)
    fits = [t for t in weights(model.graph) if first is not None and list(t.dims) == list(first.dims)[::-1]]
    other = pick([t for t in fits if t is not first], rng)
    if first is None or other is None:
        return False
    name = f"{first.name}.transposed"
    replace_reads(model.graph, other.name, name)
    model.graph.node.insert(0, helper.make_node("Transpose", [first.name], [name], perm=[1, 0]))
    return True


@mutation
def show_value(model: onnx.ModelProto, rng: Rng) -> bool:
    """Make a value inside the graph an output too."""
    node = pick(model.graph.node, rng)
    if node is None or not node.output[0] or any(o.name == node.output[0] for o in model.graph.output):
        return False
    known = {v.name: v for v in model.graph.value_info}
    output = known.get(node.output[0]) or onnx.ValueInfoProto(name=node.output[0])
    if not output.HasField("type"):
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.output.append(output)
    return True


@mutation
def drop_output(model: onnx.ModelProto, rng: Rng) -> bool:
    """Remove an output."""
    if len(model.graph.output) < 2:
        return False
    model.graph.output.remove(pick(model.graph.output, rng))
    return True


@mutation
def change_opset(model: onnx.ModelProto, rng: Rng) -> bool:
    """Change the version of the operators."""
    entry = pick(model.opset_import, rng)
    entry.version = int(pick([entry.version - 1, entry.version + 1, 11, 13, 17, 18, 21, 23], rng))
    return True


@mutation
def change_declared_shape(model: onnx.ModelProto, rng: Rng) -> bool:
    """Change a declared size, to another size, a name or nothing."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    dims = [d for v in values for d in v.type.tensor_type.shape.dim]
    dim = pick(dims, rng)
    if dim is None:
        return False
    if rng.random() < 0.5:
        dim.dim_param = pick(["batch", "sequence", "n", "a+b", "2*n", "\n\x1b[2J"], rng)
    elif rng.random() < 0.3:
        dim.Clear()
    else:
        dim.dim_value = int(pick([dim.dim_value + 1, 1, 2, 0, -1, 2**50], rng))
    return True


@mutation
def forget_shapes(model: onnx.ModelProto, rng: Rng) -> bool:
    """Remove the declarations of all values inside the graph."""
    del model.graph.value_info[:]
    return True


@mutation
def store_in_a_node(model: onnx.ModelProto, rng: Rng) -> bool:
    """Turn a stored tensor into a Constant."""
    tensor = pick(model.graph.initializer, rng)
    if tensor is None:
        return False
    copy = TensorProto()
    copy.CopyFrom(tensor)
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], [copy.name], value=copy))
    return True


@mutation
def offer_as_input(model: onnx.ModelProto, rng: Rng) -> bool:
    """Turn a stored tensor into the default value of an input."""
    tensor = pick(model.graph.initializer, rng)
    if tensor is None or any(value.name == tensor.name for value in model.graph.input):
        return False
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return True


@mutation
def swap_nodes(model: onnx.ModelProto, rng: Rng) -> bool:
    """Exchange the operators of two nodes."""
    graph = pick_graph(model, rng)
    if len(graph.node) < 2:
        return False
    i, j = rng.choice(len(graph.node), 2, replace=False)
    a, b = graph.node[i], graph.node[j]
    a.op_type, b.op_type = b.op_type, a.op_type
    return True


# -- inserted nodes ---------------------------------------------------------------------------------------


def stored(graph: onnx.GraphProto, rng: Rng, values: Any, dtype: Any = np.int64) -> str:
    """Store a new tensor, and return its name."""
    name = f"new.{len(graph.initializer)}.{int(rng.integers(1 << 30))}"
    graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
    return name


def width_of(graph: onnx.GraphProto, node: NodeProto) -> int | None:
    """The last size of a node's output, if a weight or the file gives it."""
    dims = {t.name: list(t.dims) for t in graph.initializer}
    if node.op_type == "MatMul" and len(dims.get(node.input[1], ())) == 2:
        return dims[node.input[1]][1]
    if node.op_type in ("LayerNormalization", "Add") and len(node.input) > 1:
        sizes = [dims[name][-1] for name in node.input if dims.get(name)]
        if sizes:
            return sizes[0]
    for value in graph.value_info:
        if value.name == node.output[0] and value.type.tensor_type.shape.dim:
            return value.type.tensor_type.shape.dim[-1].dim_value or None
    return None


@mutation
def insert(model: onnx.ModelProto, rng: Rng) -> bool:
    """Insert nodes behind a value, most often along its last axis."""
    graph = model.graph
    node = pick([n for n in graph.node if n.output and n.output[0]], rng)
    if node is None:
        return False
    width = width_of(graph, node)
    value, new = node.output[0], f"{node.output[0]}.changed.{int(rng.integers(1 << 30))}"

    def float_of(shape: Sequence[int], scale: float = 1.0) -> str:
        return stored(graph, rng, rng.standard_normal(shape) * scale, np.float32)

    new_nodes: list[NodeProto] = []

    def make(op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"{new}.{len(new_nodes)}"
        new_nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    way = int(rng.integers(18))
    last = stored(graph, rng, [-1])
    if way == 0:
        make(str(pick("Neg Tanh Relu Sigmoid Identity Abs Exp".split(), rng)), [value], new)
    elif way == 1:
        make("Softmax", [value], new, axis=int(pick([-1, -2, 1], rng)))
    elif way == 2:
        ends = stored(graph, rng, [-(2**60)])
        make("Slice", [value, stored(graph, rng, [-1]), ends, last, stored(graph, rng, [-1])], new)
    elif way == 3 and width:
        make("Gather", [value, stored(graph, rng, rng.permutation(width))], new, axis=-1)
    elif way == 4 and width and width > 1:
        cut = int(rng.integers(1, width))
        zero, mid, end = (stored(graph, rng, [n]) for n in (0, cut, width))
        left = make("Slice", [value, zero, mid, last])
        right = make("Slice", [value, mid, end, last])
        make("Concat", [right, left], new, axis=-1)
    elif way == 5 and width:
        make("Add", [value, float_of([width])], new)
    elif way == 6 and width:
        make("Mul", [value, float_of([width])], new)
    elif way == 7 and width:
        make("MatMul", [value, float_of([width, width], width**-0.5)], new)
    elif way == 8:
        total = make(str(pick("ReduceSum ReduceMean ReduceMax".split(), rng)), [value, last], keepdims=1)
        make(str(pick("Add Mul Sub".split(), rng)), [value, total], new)
    elif way == 9:
        make("CumSum", [value, stored(graph, rng, -1)], new)
    elif way == 10 and width and width % 2 == 0:
        zero, mid, end = (stored(graph, rng, [n]) for n in (0, width // 2, width))
        left = make("Slice", [value, zero, mid, last])
        right = make("Slice", [value, mid, end, last])
        both = make("Mul", [left, make("Sigmoid", [right])])
        make("Concat", [both, right], new, axis=-1)
    elif way == 11 and width:
        make("LayerNormalization", [value, float_of([width])], new, axis=-1)
    elif way == 12 and width:
        two = int(pick([2, 3, 4], rng))
        if width % two:
            return False
        split = make("Reshape", [value, stored(graph, rng, [0, 0, two, width // two])])
        turned = make("Transpose", [split], perm=[0, 1, 3, 2])
        make("Reshape", [turned, stored(graph, rng, [0, 0, width])], new)
    elif way == 13 and width:
        wide = make("Concat", [value, value], axis=-1)
        make("MatMul", [wide, float_of([2 * width, width], width**-0.5)], new)
    elif way == 14 and width:
        shape = make("Shape", [value])
        size = make("Cast", [make("Gather", [shape, stored(graph, rng, -1)])], to=TensorProto.FLOAT)
        make("Div", [value, size], new)
    elif way == 15 and width:
        make("Where", [stored(graph, rng, rng.random(width) < 0.5, np.bool_), value, float_of([])], new)
    elif way == 16 and width and width % 2 == 0:
        parts = [f"{new}.a", f"{new}.b"]
        new_nodes.append(helper.make_node("Split", [value, stored(graph, rng, [width // 2] * 2)], parts, axis=-1))
        make("Concat", [parts[1], make("Neg", [parts[0]])], new, axis=-1)
    elif way == 17 and width:
        normal = make("LpNormalization", [value], axis=-1, p=int(pick([1, 2], rng)))
        make("Mul", [normal, float_of([width])], new)
    if not new_nodes:
        return False
    place = list(graph.node).index(node) + 1
    replace_reads(graph, value, new)
    for new_node in reversed(new_nodes):
        graph.node.insert(place, new_node)
    return True


def mutate(model: onnx.ModelProto, rng: Rng) -> list[str]:
    """Make one to four random changes, and return their names."""
    done: list[str] = []
    for _ in range(int(rng.choice([1, 1, 2, 3, 4]))):
        for _ in range(10):
            # Inserted nodes show more errors, because they stand where growth is decided.
            change = insert if rng.random() < 0.35 else pick(MUTATIONS, rng)
            try:
                changed = change(model, rng)
            except (ValueError, TypeError, IndexError, OverflowError):  # an earlier change broke the graph
                changed = False
            if changed:
                done.append(change.__name__)
                break
    return done
