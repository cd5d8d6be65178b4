"""Makes experts and a router of feed-forward blocks (sparse upcycling, arXiv 2212.05055).

A block f becomes N experts, which are equal at first, and a router. The router gives each expert a score for a token; a
softmax over the k best scores gives their gates, which add up to 1. So the sum of gate times f is f, whatever the
router chooses.

All experts are computed for all tokens, with the weights stacked along a first axis, and the gates of experts that were
not chosen are 0. ONNX has no operator that multiplies each token with the weights of another expert. A Gather of the
chosen weights would copy them for each token, and a loop over the experts could neither be trained nor compiled.

With granularity G each expert is cut into G parts along the hidden units (arXiv 2410.07524). Expert e G + g is part g
of expert e. The parts of an expert have one row of the router, so they are chosen together if k is a multiple of G.
Each gets 1 / G of the gate that the whole expert would get, and its second weight is G times as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.graphs import MICROSOFT, MOVES_OR_CASTS, FreshNames, is_initializer
from hyperclone_onnx.plan.origins import Drawn, Joined
from hyperclone_onnx.tensors.assembled import DrawnTensor, JoinedTensor
from hyperclone_onnx.tensors.expert_parts import Part, PartTensor, Stacking
from hyperclone_onnx.tensors.noise_level import mean_and_deviation_of
from hyperclone_onnx.tensors.parted import PartedTensor, Parting, redrawn_units
from hyperclone_onnx.transforms.feed_forward import FeedForward, Projection
from hyperclone_onnx.transforms.interface import ORIGINAL, Placed, place_of, remember
from hyperclone_onnx.transforms.registry import transform

ROUTER_DEVIATION = 0.02
"""The standard deviation of the router's weights, as in the published mixtures."""

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


_MADE = "hyperclone_onnx.experts"
"""The key under which a stored tensor that experts brought in remembers what it was made of."""

Kind = Literal["routed", "shared", "router"]


@dataclass(frozen=True)
class ExpertTensor:
    """What a stored tensor of a mixture is: that of the routed experts, of the shared one, or a router.

    Args:
        kind: which of the three.
        sources: the dense tensor that it was made of; for a router, the weights of its block, the last one last.
        stacking: how it was made of that tensor; None for a router.
        place: the place of that tensor, where the graph became deeper first.
    """

    kind: Kind
    sources: tuple[str, ...]
    stacking: Stacking | None = None
    place: Placed | None = None


def expert_tensors(graph: ir.Graph) -> dict[str, ExpertTensor]:
    """The stored tensors that experts brought into a transformed graph, by name. Constants are left out."""
    made = {name: value.meta.get(_MADE) for name, value in graph.initializers.items()}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _preserves(options: Mapping[str, Any]) -> bool:
    """Whether the experts are equal at first."""
    return not options.get("noise") and not options.get("redraw")


@transform("experts", preserves=_preserves)
def experts(
    model: ir.Model,
    *,
    experts: int,
    top_k: int,
    blocks: Sequence[Mapping[str, Any]],
    granularity: int = 1,
    shared: bool = False,
    seed: int = 0,
    noise: float = 0.0,
    redraw: float = 0.0,
    operator: str = "standard",
) -> ir.Model:
    """Make experts of feed-forward blocks of a graph.

    Args:
        model: the normalised graph, which is changed.
        experts: the number of experts, before they are cut into parts.
        top_k: how many of these are chosen for a token.
        blocks: the blocks (see `transforms.feed_forward`).
        granularity: the number of parts that each expert is cut into.
        shared: also keep the block as an expert that always runs. It gives one half of the sum.
        seed: the seed of the routers, and of what parts the experts.
        noise: the standard deviation of the noise on the weights of each routed expert, as a part of that of the
            weight.
        redraw: the ratio of the hidden units of each routed expert that are drawn anew (Drop-Upcycling, arXiv
            2502.19261), from the mean and the standard deviation of each weight.
        operator: "standard" for ONNX's own operators, or "microsoft" for ONNX Runtime's operator MoE.

    Raises:
        BadModel: the graph does not have one of the blocks.
    """
    remember(model.graph)
    mixture = _Mixture(experts, top_k, granularity, shared, seed, noise, redraw)
    builder = _Builder(model, mixture)
    for data in blocks:
        try:
            block = FeedForward.from_json(data)
        except (KeyError, TypeError, ValueError) as problem:
            raise BadModel(f"the plan describes a feed-forward block wrongly: {problem}") from problem
        builder.replace(block, operator)
    builder.drop_unused()
    return model


@dataclass(frozen=True)
class _Mixture:
    """The numbers of a mixture of experts."""

    experts: int
    top_k: int
    granularity: int
    shared: bool
    seed: int
    noise: float = 0.0
    redraw: float = 0.0

    @property
    def parts_experts(self) -> bool:
        """Whether the experts differ from the beginning."""
        return bool(self.noise or self.redraw)

    @property
    def number(self) -> int:
        """The number of experts in the graph."""
        return self.experts * self.granularity

    @property
    def chosen(self) -> int:
        """How many of them are chosen for a token."""
        return self.top_k * self.granularity


def scale_of_down(mixture: _Mixture) -> float:
    """What multiplies the second weight of each part of an expert: each part gets that much less of the gate."""
    return float(mixture.granularity)


@dataclass(frozen=True)
class _Form:
    """Whether a part of the graph is written for stacked experts, or for the expert that always runs."""

    stacked: bool
    scale: float = 1.0
    """Multiplies what comes out of the last product."""
    made: dict[str, ir.Value] = field(default_factory=dict)
    """The new value for each value of the block."""


class _Builder:
    """Writes experts into a graph."""

    def __init__(self, model: ir.Model, mixture: _Mixture) -> None:
        self.model, self.mixture = model, mixture
        self.fresh = FreshNames(model.graph)
        self.values: dict[str, ir.Value] = dict(model.graph.initializers)
        self.values.update((value.name or "", value) for value in model.graph.inputs)
        for node in model.graph.all_nodes():
            self.values.update((value.name or "", value) for value in node.outputs)
        self.stacks: dict[tuple[Any, ...], ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.stem = ""
        self.replaced: list[ir.Node] = []

    def replace(self, block: FeedForward, operator: str = "standard") -> None:
        """Put experts and a router in the place of a block."""
        reads, gives = self._value(block.reads), self._value(block.gives)
        end = gives.producer()
        if end is None or end.graph is None:
            raise BadModel(f"the plan names {block.gives!r} as the end of a feed-forward block, and it is none")
        graph = end.graph
        assert isinstance(graph, ir.Graph)
        self.nodes, self.stem = [], _stem(block)
        tokens, shape, order = self._tokens(block, reads)
        half = 0.5 if self.mixture.shared else 1.0
        form = _Form(True, half * scale_of_down(self.mixture))
        if operator == "microsoft":
            summed = self._in_one_node(block, tokens, form)
        else:
            gates = self._gates(block, tokens)
            weighed = self._node("Mul", [self._network(block, tokens, form), gates])
            summed = self._node("ReduceSum", [weighed, self._integers("axis", [0])], keepdims=0)
        if self.mixture.shared:
            summed = self._node("Add", [self._network(block, tokens, _Form(False, half)), summed])
        if shape is not None:
            summed = self._node("Reshape", [summed, shape])
        if order is not None:
            summed = self._node("Transpose", [summed], perm=order)
        graph.insert_before(end, self.nodes)
        self._take_place(graph, gives, summed)
        self.replaced.append(end)

    # -- the parts of a mixture -------------------------------------------------------------------------------

    def _tokens(self, block: FeedForward, reads: ir.Value) -> tuple[ir.Value, ir.Value | None, list[int] | None]:
        """The tokens that a block reads, one to a row; the shape to give the result, and the order of its axes."""
        value, back = reads, None
        if block.axis != block.rank - 1:
            others = [axis for axis in range(block.rank) if axis != block.axis]
            value = self._node("Transpose", [value], perm=[*others, block.axis])
            back = list(range(block.rank - 1))
            back.insert(block.axis, block.rank - 1)
        if block.rank == 2:
            return value, None, back
        shape = self._node("Shape", [value], dtype=ir.DataType.INT64)
        return self._node("Flatten", [value], axis=block.rank - 1), shape, back

    def _gates(self, block: FeedForward, tokens: ir.Value) -> ir.Value:
        """The gate of each expert for each token, shape (experts, tokens, 1): 0 where it is not chosen."""
        logits = self._node("MatMul", [tokens, self._router(block)], hint="router_logits")
        kind = logits.dtype
        if kind in HALF:  # few runtimes sort numbers of half precision, and trainers route in float32 too
            logits = self._node("Cast", [logits], dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
        best, which = self._nodes("TopK", [logits, self._integers("chosen", [self.mixture.chosen])], 2, axis=-1)
        assert logits.dtype is not None
        best.type, which.type = ir.TensorType(logits.dtype), ir.TensorType(ir.DataType.INT64)
        shares = self._node("Softmax", [best], axis=-1)
        shape = self._node("Shape", [logits], dtype=ir.DataType.INT64)
        zero = ir.Tensor(np.zeros(1, logits.dtype.numpy()), dtype=logits.dtype)
        zeros = self._node("ConstantOfShape", [shape], dtype=logits.dtype, value=zero)
        gates = self._node("ScatterElements", [zeros, which, shares], axis=-1)
        if kind in HALF:
            gates = self._node("Cast", [gates], dtype=kind, to=kind.value)
        gates = self._node("Transpose", [gates], perm=[1, 0])
        return self._node("Unsqueeze", [gates, self._integers("last", [-1])])

    def _in_one_node(self, block: FeedForward, tokens: ir.Value, form: _Form) -> ir.Value:
        """The sum of the chosen experts times their gates, by ONNX Runtime's operator, shape (tokens, features)."""
        logits = self._node("MatMul", [tokens, self._router(block)], hint="router_logits")
        parts = self._parts(block, form)
        first, first_bias = parts[0]
        if block.activation == "swiglu":
            gate, other = parts if block.gate == 0 else parts[::-1]
            first = self._in_turns(gate[0], other[0], 2, [0, -1, block.hidden])
            if gate[1] is not None and other[1] is not None:
                first_bias = self._in_turns(gate[1], other[1], 3, [0, 0, -1])
        second = self._weight(block, block.down, form, into=False)
        second = self._node("Transpose", [second], perm=[0, 2, 1])
        second_bias = None if block.down.bias is None else self._bias(block, block.down, form, into=False)
        inputs = [tokens, logits, first, self._flat(first_bias), second, self._flat(second_bias)]
        attributes: dict[str, Any] = {"k": self.mixture.chosen, "activation_type": block.activation}
        if block.activation == "swiglu":
            attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        node = ir.node(
            "MoE",
            inputs if block.down.bias is not None else inputs[:5],
            {**attributes, "normalize_routing_weights": 1},
            domain=MICROSOFT,
            name=self.fresh.node(f"{self.stem}.experts.MoE"),
        )
        node.outputs[0].name = self.fresh.value(f"{node.name}.out")
        node.outputs[0].type, node.outputs[0].meta[ORIGINAL] = logits.type, None
        self.nodes.append(node)
        self.model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return node.outputs[0]

    def _parts(self, block: FeedForward, form: _Form) -> list[tuple[ir.Value, ir.Value | None]]:
        """For each value of the width of the block a weight, (experts, units, features), and a bias.

        The bias has the shape (experts, 1, units).
        """
        parts: list[tuple[ir.Value, ir.Value | None]] = []
        for up in block.ups:
            weight = self._node("Transpose", [self._weight(block, up, form, into=True)], perm=[0, 2, 1])
            bias = None if up.bias is None else self._bias(block, up, form, into=True)
            weights = self._equal_parts(block, weight, up.parts, 1)
            biases = [None] * up.parts if bias is None else self._equal_parts(block, bias, up.parts, 2)
            parts += zip(weights, biases, strict=True)
        return parts

    def _equal_parts(self, block: FeedForward, value: ir.Value, parts: int, axis: int) -> list[ir.Value]:
        """A stored tensor of several widths, cut into them."""
        if parts == 1:
            return [value]
        widths = self._integers("widths", [block.ffn // self.mixture.granularity] * parts)
        cut = self._nodes("Split", [value, widths], parts, axis=axis)
        for part in cut:
            part.type = value.type
        return list(cut)

    def _in_turns(self, one: ir.Value, other: ir.Value, axis: int, shape: list[int]) -> ir.Value:
        """The hidden units of two tensors in turns: one of the first, one of the second, and so on."""
        both = [self._node("Unsqueeze", [value, self._integers("turns", [axis])]) for value in (one, other)]
        joined = self._node("Concat", both, axis=axis)
        return self._node("Reshape", [joined, self._integers("rows", shape)])

    def _flat(self, bias: ir.Value | None) -> ir.Value | None:
        """A bias without the axis of tokens."""
        return None if bias is None else self._node("Squeeze", [bias, self._integers("tokens", [1])])

    def _router(self, block: FeedForward) -> ir.Value:
        """The weights of a router, shape (features, experts). Blocks that share all weights share the router too."""
        weights = tuple(projection.weight for projection in (*block.ups, block.down))
        key = ("router", weights)
        if key not in self.stacks:
            kind = self._kind(block.ups[0])
            name = self.fresh.value(f"{self.stem}.router")
            shape = (block.hidden, self.mixture.experts)
            law = Drawn(name, shape, kind.name, "normal", ROUTER_DEVIATION, self.mixture.seed)
            tensor: ir.TensorProtocol = DrawnTensor(law)
            if self.mixture.granularity > 1:
                drawn = np.repeat(tensor.numpy(), self.mixture.granularity, axis=1)
                tensor = ir.Tensor(np.ascontiguousarray(drawn), dtype=kind, name=name)
            self.stacks[key] = self._stored(name, tensor)
            self.stacks[key].meta[_MADE] = ExpertTensor("router", weights)
        return self.stacks[key]

    def _network(self, block: FeedForward, tokens: ir.Value, form: _Form) -> ir.Value:
        """What the experts give for each token: shape (experts, tokens, features), without the first axis for one."""
        for up in block.ups:
            form.made[up.gives] = self._product(block, up, tokens, form, into=True)
        hidden = self._inside(block, self._value(block.down.reads), form)
        return self._product(block, block.down, hidden, form, into=False)

    def _inside(self, block: FeedForward, value: ir.Value, form: _Form) -> ir.Value:
        """The new value for a value among the hidden units: the same functions of the new hidden units."""
        name = value.name or ""
        if name in form.made:
            return form.made[name]
        if is_initializer(value):
            return self._vector(block, value, form) if name in block.vectors else value
        node = value.producer()
        if node is None or not self._depends(value, form):
            return value
        if name in block.split:
            form.made[name] = self._cut(block, node, value, form)
        elif node.op_type in ("Flatten", "Reshape", "Squeeze", "Unsqueeze") and not node.domain:
            form.made[name] = self._inside(block, _first(node), form)
        else:
            inputs = [None if given is None else self._operand(block, given, form) for given in node.inputs]
            form.made[name] = self._again(node, inputs)
        return form.made[name]

    def _operand(self, block: FeedForward, value: ir.Value, form: _Form) -> ir.Value:
        """An operand of a function of the hidden units: itself a value of theirs, a vector, or a number."""
        stored: ir.Value | None = value
        while stored is not None and not is_initializer(stored):
            producer = stored.producer()
            if producer is None or producer.domain or producer.op_type not in MOVES_OR_CASTS:
                return self._inside(block, value, form)
            stored = producer.inputs[0]
        if stored is not None and stored.name in block.vectors:
            return self._as(self._vector(block, stored, form), value.dtype)
        return self._inside(block, value, form)

    def _depends(self, value: ir.Value, form: _Form) -> bool:
        """Whether a value is computed from the hidden units. Single numbers are not, but for their type."""
        waiting, seen = [value], {value}
        while waiting:
            current = waiting.pop()
            if current.name in form.made:
                return True
            node = current.producer()
            for needed in node.inputs if node is not None else ():
                if needed is not None and needed not in seen:
                    seen.add(needed)
                    waiting.append(needed)
        return False

    def _again(self, node: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
        """The same function of new values."""
        if node.domain == MICROSOFT and node.op_type in ("BiasGelu", "FastGelu") and len(inputs) > 1:
            given, bias = inputs[0], inputs[1]
            assert given is not None
            total = given if bias is None else self._node("Add", [given, bias])
            kind = "Gelu" if node.op_type == "BiasGelu" else node.op_type
            return self._node(kind, [total], domain=MICROSOFT)
        dtype = node.outputs[0].dtype
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=self.fresh.node(f"{self.stem}.experts.{node.op_type}"),
        )
        self.nodes.append(new)
        for output, before in zip(new.outputs, node.outputs, strict=True):
            output.name = self.fresh.value(f"{before.name}.experts")
            output.meta[ORIGINAL] = None
            output.type = before.type
        if dtype is None and inputs[0] is not None:
            new.outputs[0].type = inputs[0].type
        return new.outputs[0]

    def _cut(self, block: FeedForward, node: ir.Node, value: ir.Value, form: _Form) -> ir.Value:
        """One of several parts of equal width that lie side by side."""
        number, parts = block.split[value.name or ""]
        whole = self._inside(block, _first(node), form)
        key = f"{whole.name}\0parts"
        if f"{key}0" not in form.made:
            width = block.ffn // self.mixture.granularity if form.stacked else block.ffn
            cut = self._nodes("Split", [whole, self._integers("widths", [width] * parts)], parts, axis=-1)
            for position, part in enumerate(cut):
                part.type = whole.type
                form.made[f"{key}{position}"] = part
        return form.made[f"{key}{number}"]

    def _product(
        self, block: FeedForward, projection: Projection, value: ir.Value, form: _Form, *, into: bool
    ) -> ir.Value:
        """A product with a weight, for all experts at once, with its bias."""
        weight = self._weight(block, projection, form, into=into)
        result = self._node("MatMul", [value, weight])
        scale = projection.scale
        if scale != 1.0:
            result = self._node("Mul", [result, self._number(scale, result.dtype)])
        if projection.bias is not None:
            result = self._node("Add", [result, self._bias(block, projection, form, into=into)])
        return result

    # -- stored tensors ---------------------------------------------------------------------------------------

    def _weight(self, block: FeedForward, projection: Projection, form: _Form, *, into: bool) -> ir.Value:
        """The weight of a product, (experts, features in, features out), or without the first axis for one expert."""
        value = self._value(projection.weight)
        wide = block.ffn * projection.parts
        axis = 0 if projection.transposed == into else 1
        shape = (wide, block.hidden) if axis == 0 else (block.hidden, wide)
        scale = 1.0 if into else form.scale
        stored = self._stack(value, shape, axis, projection.parts, scale, form, block.down.weight)
        stored = self._as(stored, self._kind(projection))
        if not projection.transposed:
            return stored
        return self._node("Transpose", [stored], perm=[0, 2, 1] if form.stacked else [1, 0])

    def _bias(self, block: FeedForward, projection: Projection, form: _Form, *, into: bool) -> ir.Value:
        assert projection.bias is not None
        value = self._value(projection.bias)
        if into:
            wide, parts = block.ffn * projection.parts, projection.parts
            bias = self._stack(value, (wide,), 0, parts, projection.bias_scale, form)
        else:
            # The gates of the parts of an expert add up to the gate of the whole, so each part has the whole bias.
            share = form.scale / (scale_of_down(self.mixture) if form.stacked else 1)
            bias = self._stack(value, (block.hidden,), None, 1, projection.bias_scale * share, form)
        return self._as(bias, self._kind(projection))

    def _vector(self, block: FeedForward, value: ir.Value, form: _Form) -> ir.Value:
        parts = block.vectors[value.name or ""]
        return self._stack(value, (block.ffn * parts,), 0, parts, 1.0, form)

    def _stack(
        self,
        value: ir.Value,
        shape: tuple[int, ...],
        axis: int | None,
        parts: int,
        scale: float,
        form: _Form,
        parted_as: str | None = None,
    ) -> ir.Value:
        """A stored tensor for all experts: (experts, ...) for a matrix, (experts, 1, ...) for a vector.

        Args:
            value: the stored tensor.
            shape: its shape without axes of the size 1.
            axis: the axis of the hidden units, None where it has none.
            parts: how many widths lie side by side on it.
            scale: multiplies the tensor.
            form: whether there are several experts.
            parted_as: the name of the block whose experts part in this tensor; None if they all keep it.
        """
        granularity = self.mixture.granularity if form.stacked and axis is not None else 1
        key = (value, shape, axis, parts, scale, form.stacked)
        if key in self.stacks:
            return self.stacks[key]
        tensor = value.const_value
        if tensor is None or tensor.size != math.prod(shape):
            raise BadModel(f"the plan takes {value.name!r} for a tensor of the shape {shape}, and it is none")
        if not form.stacked and scale == 1.0 and tuple(tensor.shape.numpy()) == shape:
            self.stacks[key] = value
            return value
        cut = tuple(size // granularity if place == axis else size for place, size in enumerate(shape))
        run = math.prod(cut) if axis is None else math.prod(cut[axis:]) // parts
        pieces = [PartTensor(tensor, Part(cut, number, granularity, run, scale)) for number in range(granularity)]
        if not form.stacked:
            stacking = Stacking(1, 1, run, scale)
            return self._remembered(key, f"{value.name}.shared", pieces[0], "shared", stacking)
        many: list[ir.TensorProtocol] = [*pieces] * (self.mixture.number // granularity)
        if len(shape) == 1:
            many = [PartTensor(piece, Part((1, *cut), run=math.prod(cut))) for piece in many]
        elif parted_as is not None and axis is not None and self.mixture.parts_experts:
            law, inner = _Law(tensor), math.prod(cut[axis + 1 :])
            units = cut[axis] // parts
            many = [
                PartedTensor(pieces[number % granularity], self._parting(value, parted_as, number, inner, units), law)
                for number in range(len(many))
            ]
        joined = JoinedTensor(Joined((value.name or "",) * len(many), 0, stacked=True), many)
        stacking = Stacking(len(many) // granularity, granularity, run, scale)
        return self._remembered(key, f"{value.name}.experts", joined, "routed", stacking)

    def _parting(self, value: ir.Value, block: str, expert: int, inner: int, units: int) -> Parting:
        mixture = self.mixture
        redrawn = redrawn_units(block, mixture.seed, expert, units, mixture.redraw) if mixture.redraw else ()
        return Parting(value.name or "", mixture.seed, expert, mixture.noise, redrawn, inner, units)

    def _remembered(
        self, key: tuple[Any, ...], hint: str, tensor: ir.TensorProtocol, kind: Kind, stacking: Stacking
    ) -> ir.Value:
        self.stacks[key] = self._stored(self.fresh.value(hint), tensor)
        self.stacks[key].meta[_MADE] = ExpertTensor(kind, (key[0].name or "",), stacking, place_of(key[0]))
        return self.stacks[key]

    def _stored(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        value.meta[ORIGINAL] = None
        self.model.graph.register_initializer(value)
        self.values[name] = value
        return value

    def _kind(self, projection: Projection) -> ir.DataType:
        """The type in which a product is computed."""
        kind = self._value(projection.reads).dtype or self._value(projection.weight).dtype
        if kind is None:
            raise BadModel(f"the type of {projection.reads!r} is not known")
        return kind

    # -- nodes ------------------------------------------------------------------------------------------------

    def _as(self, value: ir.Value, kind: ir.DataType | None) -> ir.Value:
        if kind is None or value.dtype == kind:
            return value
        return self._node("Cast", [value], dtype=kind, to=kind.value)

    def _number(self, number: float, kind: ir.DataType | None) -> ir.Value:
        kind = kind or ir.DataType.FLOAT
        key = ("number", number, kind)
        if key not in self.stacks:
            tensor = ir.Tensor(np.array(number, dtype=kind.numpy()), dtype=kind)
            self.stacks[key] = self._stored(self.fresh.value("experts.factor"), tensor)
        return self.stacks[key]

    def _integers(self, hint: str, numbers: Iterable[int]) -> ir.Value:
        listed = tuple(numbers)
        key = (hint, listed)
        if key not in self.stacks:
            tensor = ir.Tensor(np.array(listed, dtype=np.int64))
            self.stacks[key] = self._stored(self.fresh.value(f"experts.{hint}"), tensor)
        return self.stacks[key]

    def _node(
        self,
        kind: str,
        inputs: list[ir.Value],
        *,
        domain: str = "",
        dtype: ir.DataType | None = None,
        hint: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        (value,) = self._nodes(kind, inputs, 1, domain=domain, hint=hint, **attributes)
        known = dtype or next((given.dtype for given in inputs if given.dtype is not None), None)
        value.type = None if known is None else ir.TensorType(known)
        return value

    def _nodes(
        self,
        kind: str,
        inputs: list[ir.Value],
        outputs: int,
        *,
        domain: str = "",
        hint: str | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        name = self.fresh.node(f"{self.stem}.experts.{hint or kind}")
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for value in node.outputs:
            value.name = self.fresh.value(f"{self.stem}.{hint}" if hint else f"{name}.out")
            value.meta[ORIGINAL] = None
        self.nodes.append(node)
        return tuple(node.outputs)

    # -- the end ----------------------------------------------------------------------------------------------

    def _take_place(self, graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
        """Let everything read the new value instead of the old one, under its name."""
        for use in list(old.uses()):
            use.node.replace_input_with(use.idx, new)
        for position, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[position] = new
        new.shape, new.type = old.shape, old.type or new.type
        new.meta[ORIGINAL] = old.meta.get(ORIGINAL)
        new.name, old.name = old.name, self.fresh.value(f"{old.name}.dense")
        self.values[new.name or ""] = new

    def drop_unused(self) -> None:
        """Remove what only the replaced blocks read."""
        waiting = list(self.replaced)
        while waiting:
            node = waiting.pop()
            if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            before = [value.producer() for value in node.inputs if value is not None]
            stored = [value for value in node.inputs if value is not None and is_initializer(value)]
            node.graph.remove(node, safe=True)
            waiting += [producer for producer in before if producer is not None]
            for value in stored:
                if not value.uses() and not value.is_graph_output():
                    self.model.graph.initializers.pop(value.name or "", None)

    def _value(self, name: str) -> ir.Value:
        value = self.values.get(name)
        if value is None:
            raise BadModel(f"the plan makes experts of a block with {name!r}; this graph has no such value")
        return value


def hidden_function(model: ir.Model, block: FeedForward) -> ir.Model:
    """The function of the hidden units of a block as a model of its own, in float32.

    Its inputs are the values that the block's products give, in the order of `block.ups`, with the shape (1, units).

    Args:
        model: the graph, which is not changed.
        block: one of its blocks.
    """
    builder = _Builder(model.clone(), _Mixture(1, 1, 1, False, 0))
    form = _Form(False)
    inputs = []
    for number, up in enumerate(block.ups):
        shape = ir.Shape([1, block.ffn * up.parts])
        inputs.append(ir.Value(name=f"part{number}", type=ir.TensorType(ir.DataType.FLOAT), shape=shape))
        form.made[up.gives] = inputs[-1]
    result = builder._inside(block, builder._value(block.down.reads), form)
    nodes = builder.nodes
    used = {value for node in nodes for value in node.inputs if value is not None}
    stored = [_in_single(value) for value in used if is_initializer(value)]
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports=dict(model.graph.opset_imports), name="function")
    for value in stored:
        graph.register_initializer(value)
    result.shape, result.type = None, ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=10)


def _in_single(value: ir.Value) -> ir.Value:
    """A copy of a stored tensor for another graph, in the place of the original for all who read it there."""
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy()
    single = array.astype(np.float32) if tensor.dtype.is_floating_point() else array
    kind = ir.DataType.FLOAT if tensor.dtype.is_floating_point() else tensor.dtype
    copy = ir.Value(name=value.name, type=ir.TensorType(kind), const_value=ir.Tensor(np.asarray(single), dtype=kind))
    for use in list(value.uses()):
        if use.node.graph is None:
            use.node.replace_input_with(use.idx, copy)
    return copy


class _Law:
    """The mean and the standard deviation of a tensor, which is read when they are first asked for."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._tensor = tensor
        self._known: tuple[float, float] | None = None

    def __call__(self) -> tuple[float, float]:
        if self._known is None:
            self._known = mean_and_deviation_of(self._tensor)
        return self._known


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _stem(block: FeedForward) -> str:
    """How the names of what is new begin: as the names of the block's weights do, up to a point, or as its end's."""
    names = [projection.weight for projection in (*block.ups, block.down)]
    first, last = min(names), max(names)
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    common = first[:same] if len(names) > 1 else ""
    return common.rsplit(".", 1)[0] if "." in common else block.gives
