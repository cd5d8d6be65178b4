"""Walks a graph once. At each node, the rule of its operator relates the axes of inputs and outputs.

Each use of an initializer gets its own axes. Exporters store equal tensors once (the gains of new norms, a tied
embedding), and this must not make their dimensions one. Where an operator has no rule, or its rule cannot relate the
axes of a node, we pin all axes of the node.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.algebra import shape_values
from hyperclone_onnx.algebra.dims import Dim, Product, Space, Term
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.graphs import MOVES_OR_CASTS, captured_values, describe, is_initializer, opset_of
from hyperclone_onnx.rules import registry
from hyperclone_onnx.rules.dimensions import Axes, Dimensions, Fact, Use
from hyperclone_onnx.rules.op import CannotTell, Op, declared_shape


def infer(model: ir.Model) -> Dimensions:
    """The dimensions of a normalised model.

    Raises:
        Refused: a node does not fit the specification of its operator.
    """
    dimensions = _with_all_learnt(model)
    ambiguous = _names_of_two_lengths(model, dimensions)
    if ambiguous:
        _separate_axes(model, ambiguous)
        dimensions = _with_all_learnt(model)
    if any(_contradicts_file(dimensions, value) for value in dimensions.axes if value.producer() is not None):
        # If one shape is wrong, we believe none: a tool has changed the graph, but not the shapes.
        for value in (value for node in model.graph.all_nodes() for value in node.outputs):
            value.shape = None
        dimensions = _with_all_learnt(model)
    return dimensions


@dataclass(frozen=True)
class _Learnt:
    """Facts that a walk shows too late for earlier nodes. The next walk begins with them.

    `lengths` are the lengths that nodes prove for symbols in the shapes of inputs. `gates` is as in `Dimensions`.
    """

    lengths: Mapping[str, Size]
    gates: frozenset[ir.Node]


def _with_all_learnt(model: ir.Model) -> Dimensions:
    """Walk over the model until a walk shows nothing new.

    An input may declare its width by a name, and only a later node shows that it is 24. For the nodes before, the axis
    has an unknown length. Also, only a norm after a softmax shows that the softmax runs over features.
    """
    learnt = _Learnt({}, frozenset())
    sizes = [size for value in model.graph.inputs for size in declared_shape(value) or () if size is not None]
    symbols = sorted({name for size in sizes for name in size.symbols})
    while True:
        dimensions = _related(model, learnt)
        lengths = {name: _proven(dimensions, name) for name in symbols if name not in learnt.lengths}
        new = {name: size for name, size in lengths.items() if size is not None}
        gates = _gates(dimensions)
        if not new and gates <= learnt.gates:
            return dimensions
        learnt = _Learnt({**learnt.lengths, **new}, learnt.gates | gates)


def _proven(dimensions: Dimensions, symbol: str) -> Size | None:
    """The length of a symbol, from an equation, or if it is broadcast with axes of one length only.

    A symbol that is broadcast with an axis of 24 is 24 or 1. An axis that is always 1 gets no name.
    """
    lengths = dimensions.stretched.get(symbol, set())
    return dimensions.space.proven(symbol) or (Size.of(*lengths) if len(lengths) == 1 else None)


def _gates(dimensions: Dimensions) -> frozenset[ir.Node]:
    """The softmax nodes over features: weights are contracted with the whole axis, and a norm averages over it.

    Keys and choices are no features: keys are contracted with values, and no norm averages over choices.
    """
    if not any(node.op_type == "Softmax" and not node.domain for _, node in dimensions.facts[Fact.SOFTMAX]):
        return frozenset()
    features = _atoms_with(dimensions, Fact.CONTRACTED_WITH_WEIGHT) & _atoms_with(dimensions, Fact.NORMALISED)
    features -= _atoms_with(dimensions, Fact.CONTRACTED_WITH_ACTIVATION)
    features -= _atoms_with(dimensions, Fact.SPATIAL) | _atoms_with(dimensions, Fact.INDEXED)
    runs: dict[ir.Node, list[Term]] = defaultdict(list)
    for term, node in dimensions.facts[Fact.SOFTMAX]:
        if node.op_type == "Softmax" and not node.domain:
            runs[node].append(term)
    space = dimensions.space
    atoms = {node: {atom for term in terms for atom in space.atoms(term)} for node, terms in runs.items()}
    return frozenset(node for node, axes in atoms.items() if axes and axes <= features)


def _related(model: ir.Model, learnt: _Learnt) -> Dimensions:
    """Walk over a model once, with the shapes that it declares and the facts of earlier walks."""
    dimensions = Dimensions(model, Space(), gates=learnt.gates)
    _read_inputs(dimensions, learnt.lengths)
    for value in model.graph.initializers.values():
        dimensions.constants.add(value)
        _read_known(dimensions, value)
    walk(dimensions, model.graph)
    _unify_measured_uses(dimensions)
    dimensions.space.settle_ties()
    dimensions.space.place = ""
    return dimensions


def _names_of_two_lengths(model: ir.Model, dimensions: Dimensions) -> frozenset[str]:
    """The names that inputs declare for axes that nodes prove to differ: queries and documents, both ``seq``."""
    uses = Counter(name for _, _, name in _named_axes(model))
    proven = {name for name, count in uses.items() if count > 1 and dimensions.space.proven(name) is not None}
    if not proven:
        return frozenset()
    copy = model.clone()
    separate = _separate_axes(copy, proven)
    space = _with_all_learnt(copy).space
    lengths: dict[str, set[int | None]] = defaultdict(set)
    for name, own in separate:
        length = space.proven(own)
        if length is not None:
            lengths[name].add(length.static)
    return frozenset(name for name, sizes in lengths.items() if len(sizes) > 1)


def _named_axes(model: ir.Model) -> Iterator[tuple[ir.Value, int, str]]:
    """The axes of inputs whose length is declared by a name: the input, the axis, and the name."""
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                yield value, axis, str(dim.value)


def _separate_axes(model: ir.Model, names: Collection[str]) -> list[tuple[str, str]]:
    """Give each axis with one of these names a name of its own. Returns the old and the new names.

    The shapes of all other values are forgotten, since they may have the old names.
    """
    renamed: list[tuple[str, str]] = []
    for value, axis, name in list(_named_axes(model)):
        if name in names and value.shape is not None:
            own = f"{name}_of_{value.name}_{axis}"
            dims = list(value.shape.dims)
            dims[axis] = ir.SymbolicDim(own)
            value.shape = ir.Shape(dims)
            renamed.append((name, own))
    for value in (value for node in model.graph.all_nodes() for value in node.outputs):
        value.shape = None
    return renamed


def _contradicts_file(dimensions: Dimensions, value: ir.Value) -> bool:
    """Whether the axes of a value have other sizes than the file declares for it."""
    axes, declared = dimensions.axes.get(value), declared_shape(value)
    if axes is None or declared is None:
        return False
    if len(axes) != len(declared):
        return True
    sizes = zip((dimensions.space.static(term) for term in axes), declared, strict=True)
    return any(own is not None and size is not None and size.static not in (None, own) for own, size in sizes)


def _unify_measured_uses(dimensions: Dimensions) -> None:
    """Give uses of a stored tensor whose results only Shape or Size reads the axes of another use.

    Optimizers leave such nodes in graphs, for example a Gather whose result only Shape reads. With their own axes they
    would need a second copy of the tensor, one that does not grow.
    """
    measured: list[Use] = []
    others: dict[ir.Value, Axes] = {}
    for value, use, axes in dimensions.initializer_uses():
        readers = [reader for output in use[0].outputs for reader in output.uses()]
        if readers and all(reader.node.op_type in ("Shape", "Size") for reader in readers):
            measured.append(use)
        else:
            others.setdefault(value, axes)
    for node, index in measured:
        read = node.inputs[index]
        dimensions.space.place = describe(node)
        if read is not None and read in others:
            for axis, other in zip(dimensions.use_axes[node, index], others[read], strict=True):
                dimensions.space.unify(axis, other)


def walk(dimensions: Dimensions, graph: ir.Graph) -> None:
    """Relate the axes of the nodes of a graph, or of a body whose outer values have their axes already."""
    main = dimensions.model.graph
    for node in graph:
        dimensions.space.place = describe(node)
        dimensions.walked.append(node)
        _read_initializer_uses(dimensions, node)
        if _is_constant(dimensions, node):
            dimensions.constants.update(node.outputs)
        elif node.op_type in _STILL_WEIGHTS and node.inputs and node.inputs[0] in dimensions.picked:
            dimensions.picked.update(node.outputs)
        rule = registry.relation(node.domain, node.op_type)
        op = Op(dimensions, node, opset_of(main, node.domain), walk)
        purpose = registry.pin_reason(node.domain, node.op_type)
        try:
            if purpose is not None:
                _pin_node(op, f"{registry.name(node)}: {purpose}", gap=False)
            elif rule is None:
                dimensions.without_rule[registry.name(node)].append(node.name or "")
                raise CannotTell(f"{registry.name(node)} has no rule")
            else:
                rule(op)
        except CannotTell as problem:
            dimensions.unrelated.add(node)
            dimensions.space.place = problem.place or dimensions.space.place
            _pin_node(op, str(problem))
        for value in node.outputs:
            if value not in dimensions.axes:
                _declare_pinned(op, value, "an output that no rule describes")


_STILL_WEIGHTS = MOVES_OR_CASTS | {"DequantizeLinear", "Slice", "Split"}
"""Operators whose output consists of whole weights where their first input does."""


def _is_constant(dimensions: Dimensions, node: ir.Node) -> bool:
    """Whether the outputs of a node do not depend on the inputs of the graph."""
    if not node.inputs or any(True for _ in captured_values(node)):
        return False
    return all(
        value is None
        or value in dimensions.constants
        or shape_values.static_values(dimensions.known.get(value)) is not None
        for value in node.inputs
    )


def _read_inputs(dimensions: Dimensions, proven: Mapping[str, Size]) -> None:
    """Give the graph's inputs the axes that the file declares. Axes with one symbol are one axis."""
    space = dimensions.space
    for name, length in proven.items():
        # From now on, the walk uses the number. The equation tells the search for inputs the value of the symbol.
        space.place = f"the input axes named {name!r}"
        space.symbols[name] = length
        space.relate(Size.symbol(name), length)
    named: dict[Size, Term] = {}
    for value in dimensions.model.graph.inputs:
        space.place = f"input {value.name!r}"
        shape = declared_shape(value)
        if shape is None or not isinstance(value.type, ir.TensorType):
            dimensions.axes[value] = None
            if isinstance(value.type, ir.TensorType):
                reason = "no shape is declared for it in the file: declare one, a number or a name for each axis"
                dimensions.unknown_ranks[value] = (reason, space.place)
            continue
        axes: list[Term] = []
        for declared in shape:
            size = None if declared is None else declared.substituted(dict(proven))
            if size is None:
                axes.append(space.unknown())
            elif size.static is not None:
                axes.append(space.dim(size))
            else:
                axes.append(named.setdefault(size, space.dim(size)))
        dimensions.axes[value] = tuple(axes)


def _read_known(dimensions: Dimensions, value: ir.Value) -> None:
    """Remember the elements of a small stored tensor of integers."""
    tensor = value.const_value
    if tensor is None or tensor.size > shape_values.LIMIT:
        return
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) or _is_whole_number(tensor):
        dimensions.known[value] = shape_values.known(tensor.numpy())


def _is_whole_number(tensor: ir.TensorProtocol) -> bool:
    single = tensor.size == 1 and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return single and float(tensor.numpy().item()).is_integer()


def _read_initializer_uses(dimensions: Dimensions, node: ir.Node) -> None:
    """Give the stored inputs of a node their axes."""
    for index, value in enumerate(node.inputs):
        if value is not None and is_initializer(value) and value.const_value is not None:
            sizes = value.const_value.shape.numpy()
            dimensions.use_axes[node, index] = tuple(dimensions.space.dim(size) for size in sizes)


def _pin_node(op: Op, reason: str, gap: bool = True) -> None:
    """Pin all axes of the inputs and outputs of a node, and of the outer values that its bodies read."""
    for index, value in enumerate(op.node.inputs):
        axes = op.dimensions.axes_of(op.node, index) if value is not None else None
        elements = op.dimensions.sequences.get(value, ()) if value is not None else ()
        for element in (axes or (), *elements):
            op.space.pin(Product(element), reason, gap)
    for value in captured_values(op.node):
        op.space.pin(Product(op.dimensions.axes.get(value) or ()), reason, gap)
    for output in op.node.outputs:
        _declare_pinned(op, output, reason, gap)


def _declare_pinned(op: Op, value: ir.Value, reason: str, gap: bool = True) -> None:
    """Give an output the axes that the file declares, and pin them."""
    shape = declared_shape(value)
    axes = None if shape is None else tuple(op.dim(size) for size in shape)
    if axes is None:
        op.dimensions.unknown_ranks[value] = (reason, op.space.place)
    op.space.pin(Product(axes or ()), reason, gap)
    op.dimensions.axes[value] = axes


def pin_interface(dimensions: Dimensions) -> None:
    """Pin the dimensions that the inputs and outputs of the graph fix.

    These are the dimensions of outputs that no contraction reads (the classes of logits), the dimensions of images
    that are contracted with weights only (an image is an input of at least four axes), and the axes of inputs and
    outputs whose size is symbolic.
    """
    space = dimensions.space
    weighted = _atoms_with(dimensions, Fact.CONTRACTED_WITH_WEIGHT)
    between = _atoms_with(dimensions, Fact.CONTRACTED_WITH_ACTIVATION, Fact.BATCHED, Fact.VALUE_AXIS)
    for value in dimensions.model.graph.outputs:
        space.place = f"output {value.name!r}"
        for axis in dimensions.axes.get(value) or ():
            for atom in space.atoms(axis):
                if atom not in weighted and atom not in between:
                    space.pin(atom, "it only leaves the graph: nothing reads it")
    for value in dimensions.model.graph.inputs:
        space.place = f"input {value.name!r}"
        axes = dimensions.axes.get(value) or ()
        for axis in axes if len(axes) >= 4 else ():
            for atom in space.atoms(axis):
                if atom not in between:
                    space.pin(atom, "its meaning is the input's own")
    for value in (*dimensions.model.graph.inputs, *dimensions.model.graph.outputs):
        space.place = f"input or output {value.name!r}"
        for axis in dimensions.axes.get(value) or ():
            if space.static(axis) is None:
                space.pin(axis, "mixed with a size that is known only when running")
    space.settle_ties()
    space.place = ""


def _atoms_with(dimensions: Dimensions, *kinds: Fact) -> set[Dim]:
    """The dimensions to which one of some things happens."""
    return {atom for kind in kinds for term, _ in dimensions.facts[kind] for atom in dimensions.space.atoms(term)}


def atoms_in_order(dimensions: Dimensions) -> list[Dim]:
    """The dimensions of known size of all values, in the order in which the graph shows them."""
    seen: dict[Dim, None] = {}
    for axes in (*dimensions.use_axes.values(), *dimensions.axes.values()):
        for axis in axes or ():
            for atom in dimensions.space.atoms(axis):
                if atom.size.static is not None and dimensions.space.static(atom) != 1:
                    seen.setdefault(atom)
    return list(seen)
