"""Diagnosing a grown model file: weights, activations, ranks, verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hyperclone_onnx import storage
from hyperclone_onnx.analysis import Analysis, analyse
from hyperclone_onnx.diagnosis import activations as runs
from hyperclone_onnx.diagnosis.layers import Layers, find_layers
from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis, Rank, TensorDiagnosis, ValueDiagnosis
from hyperclone_onnx.diagnosis.rank import as_matrix, spectrum
from hyperclone_onnx.diagnosis.value_axes import value_axes
from hyperclone_onnx.diagnosis.verdict import conclude, lasting, over_elements, over_values, part, weight_tolerance
from hyperclone_onnx.diagnosis.weights import compare, layout, read, source_layout
from hyperclone_onnx.errors import BadModel, BadRequest, Refused
from hyperclone_onnx.normalise import normalise
from hyperclone_onnx.packing import packed_width
from hyperclone_onnx.plan import METADATA_KEY, Plan
from hyperclone_onnx.provenance import provenance
from hyperclone_onnx.sessions import Device
from hyperclone_onnx.unrounded import Unsupported, rounds, unrounded
from hyperclone_onnx.validation import HALVES, WIDEST, computed_type, tolerance_of

Notify = Callable[[str], None]
PathLike = str | os.PathLike[str]


def diagnose(
    model: PathLike,
    source: PathLike | None = None,
    activations: bool = True,
    *,
    plan: PathLike | Plan | None = None,
    inputs: PathLike | None = None,
    lengths: tuple[int, int] | None = None,
    seed: int = 0,
    ranks: bool = True,
    device: Device = "auto",
    notify: Notify | None = None,
) -> Diagnosis:
    """Tell how far the clones of a grown model have parted.

    Args:
        model: the grown file, as it was written or with trained weights (`absorb` keeps the plan that is in it).
        source: the small model's file, whose ranks the grown matrices' are compared with.
        activations: whether to run the model; without it the weights alone are judged.
        plan: how it was grown, where the file does not say: a plan, or the file that ``expand --plan-out`` wrote.
        inputs: an .npz file with the model's inputs by name; otherwise they are random.
        lengths: the batch and the length of random inputs.
        seed: draws random inputs.
        ranks: whether to compute effective ranks, which takes most of the time of a large model.
        device: where to run.
        notify: is told of each stage.

    Raises:
        BadRequest: there is no plan, or the inputs do not fit.
        BadModel: a file cannot be read, or is not what the plan grew.
        Refused: the model runs on none of the inputs.
    """
    say = notify or (lambda _: None)
    say("reading")
    path = Path(model)
    grown = storage.load(path)
    how = _plan_of(path, grown, plan)
    analysis = analyse(path) if activations else None
    small = None if source is None else _source(Path(source), how)
    layers = find_layers(grown, how)
    notes: list[str] = []
    if small is not None and how.source and how.source.get("weights") != provenance(small, {})["weights"]:
        notes.append(f"{source} holds other weights than those that were grown: ranks are compared with its own")
    say("comparing weights")
    tensors = _tensors(path, grown, how, layers)
    if ranks:
        say("computing ranks")
        tensors = _ranked(tensors, grown, how, small)
    values: list[ValueDiagnosis] = []
    tolerance, ran_on = math.nan, ""
    if analysis is not None:
        say("running")
        values, tolerance, ran_on = _values(analysis, how, layers, inputs, lengths, seed, device, notes)
    roles = {name: dim.role for name, dim in how.dims.items()}
    tied = lasting(tensors)
    by_layer = _parts(layers.names, tensors, values, tolerance, tied, lambda each: [each.layer])
    by_role = _parts(
        list(dict.fromkeys(roles.values())),
        tensors,
        values,
        tolerance,
        tied,
        lambda each: list(dict.fromkeys(roles[name] for name in each.dims)),
        roles,
    )
    stuck, conclusion = conclude(by_layer, by_role, how.strategy.to_json(), any(each.quantised for each in tensors))
    measured = over_values(values)
    return Diagnosis(
        model=str(path),
        source=None if source is None else str(source),
        strategy=how.strategy.to_json(),
        weights=over_elements(tensors, "matched") or 0.0,
        forward=over_elements(tensors, "forward") or 0.0,
        backward=over_elements(tensors, "backward") or 0.0,
        activations=math.nan if measured is None else measured,
        stuck=stuck,
        tied=tuple(name for name in how.dims if name in tied),
        conclusion=conclusion,
        layers=by_layer,
        roles=by_role,
        tensors=tuple(tensors),
        values=tuple(values),
        tolerance=tolerance,
        ran_on=ran_on,
        notes=tuple(notes),
    )


def _plan_of(path: Path, grown: ir.Model, given: PathLike | Plan | None) -> Plan:
    if isinstance(given, Plan):
        return given
    if given is not None:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise BadRequest(f"--plan {given}: it cannot be read ({problem})") from problem
        return Plan.loads(text)
    stored = grown.metadata_props.get(METADATA_KEY)
    if not stored:
        raise BadRequest(
            f"{path}: it carries no plan, so that nobody can say which of its units are clones: it was not grown by "
            "hyperclone-onnx, or a tool dropped its metadata; give the plan that expand --plan-out wrote with --plan"
        )
    try:
        return Plan.loads(stored)
    except BadModel as problem:
        raise BadModel(f"{path}: its metadata holds {problem}") from problem


def _tensors(path: Path, grown: ir.Model, plan: Plan, layers: Layers) -> list[TensorDiagnosis]:
    found: list[TensorDiagnosis] = []
    for name, recipe in plan.tensors.items():
        if not recipe.grows:
            continue
        value = grown.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise BadModel(f"{path}: it has no tensor {name!r}, which the plan names: it was not grown by this plan")
        tensor = value.const_value
        if tensor.dtype == ir.DataType.STRING:
            continue
        table = layout(recipe, plan.maps)
        clones = max(table.clones(shared=True), table.clones(shared=False))
        if clones == 1 or 0 in table.axes:
            continue
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if recipe.bits is None and shape != table.axes:
            raise BadModel(f"{path}: {name!r} has the shape {shape}, and {table.axes} in the plan")
        if recipe.bits is not None and tensor.nbytes != _packed_bytes(table.axes, recipe.bits):
            raise BadModel(f"{path}: {name!r} has {tensor.nbytes} bytes, and {table.axes} numbers in the plan")
        spreads = compare(read(tensor, recipe, table), table)
        found.append(
            TensorDiagnosis(
                name,
                layers.tensors[name],
                table.axes,
                table.dims(shared=True),
                table.dims(shared=False),
                matched=spreads.matched.distance,
                forward=spreads.forward.distance,
                backward=spreads.backward.distance,
                plain_forward=spreads.plain_forward.distance,
                plain_backward=spreads.plain_backward.distance,
                tolerance=weight_tolerance(tensor.dtype, clones),
            )
        )
    return found


def _packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    *rows, width = shape
    return math.prod(rows) * packed_width(width, bits)


def _source(path: Path, plan: Plan) -> ir.Model:
    """The model that the plan grew.

    Raises:
        BadRequest: it is another one.
    """
    model = normalise(storage.load(path))
    for name, recipe in plan.tensors.items():
        value = model.graph.initializers.get(recipe.source)
        if value is None or value.const_value is None:
            raise BadRequest(f"--source {path}: it has no tensor {recipe.source!r}, from which {name!r} was grown")
        shape = tuple(int(size) for size in value.const_value.shape.numpy())
        if recipe.bits is None and shape != recipe.source_shape(plan.maps):
            raise BadRequest(
                f"--source {path}: {recipe.source!r} has the shape {shape}; {name!r} was grown from one of "
                f"{recipe.source_shape(plan.maps)}"
            )
    return model


def _ranked(
    tensors: list[TensorDiagnosis], grown: ir.Model, plan: Plan, source: ir.Model | None
) -> list[TensorDiagnosis]:
    """The tensors with the ranks of those that are matrices of floating-point numbers."""
    known: dict[tuple[str, object], float] = {}
    found = []
    for each in tensors:
        recipe = plan.tensors[each.name]
        tensor = _stored(grown, each.name)
        table = layout(recipe, plan.maps)
        if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
            found.append(each)
            continue
        matrix = as_matrix(read(tensor, recipe, table), table)
        if matrix is None:
            found.append(each)
            continue
        made = spectrum(matrix)
        before = None
        if source is not None:
            key = recipe.source, (recipe.axes, recipe.shared)
            if key not in known:
                small = source_layout(recipe, plan.maps)
                own = as_matrix(read(_stored(source, recipe.source), recipe, small), small)
                known[key] = 1.0 if own is None else spectrum(own).effective
            before = known[key]
        rank = Rank(made.effective, made.stable, min(matrix.shape), before, made.by)
        found.append(replace(each, rank=rank))
    return found


def _stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def _values(
    analysis: Analysis,
    plan: Plan,
    layers: Layers,
    inputs: PathLike | None,
    lengths: tuple[int, int] | None,
    seed: int,
    device: Device,
    notes: list[str],
) -> tuple[list[ValueDiagnosis], float, str]:
    flat = runs.without_branches(analysis)
    if flat is not analysis:
        notes.append("of each If the larger branch was run, in its place")
    wanted = runs.measured_values(flat, value_axes(flat.dimensions, plan))
    if not wanted:
        notes.append("no activation was compared: what has clones is computed inside the bodies of Loop or Scan")
        return [], math.nan, ""
    given = None if inputs is None else runs.given_inputs(inputs, flat.model)
    cases = [given] if given is not None else list(runs.samples(flat, plan, seed, lengths))
    if given is not None:
        same = runs.alike(given.feeds, plan)
        parted = [name for name, array in given.feeds.items() if not np.array_equal(array, same[name], equal_nan=True)]
        if parted:
            notes.append(
                f"the clones in {', '.join(map(repr, parted))} differ in {inputs}: activations differ for that"
            )
    widened, notes_on_width = _widened(flat)
    try:
        found, ran_on = runs.measure(flat, wanted, cases, device, widened)
    except Refused as problem:
        if not widened:
            raise
        widened, notes_on_width = False, [f"activations are rounded as the model rounds them: {problem}"]
        found, ran_on = runs.measure(flat, wanted, cases, device)
    notes += notes_on_width
    tolerance, _ = tolerance_of(flat.dimensions, None, None, ir.DataType.FLOAT if widened else None)
    values = []
    for each in found:
        layer = layers.of_value(each.value.name or "")
        values.append(ValueDiagnosis(each.value.name or "", layer, each.dims, each.spread.distance))
    return values, tolerance, ran_on


def _widened(analysis: Analysis) -> tuple[bool, list[str]]:
    """Whether to run a model in float32, for it computes coarsely itself; and what to say of it."""
    model = analysis.model
    coarse = computed_type(analysis.dimensions) in HALVES
    if not coarse and not rounds(model):
        return False, []
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > WIDEST:
        return False, ["too large to be run in float32: what it rounds itself hides small distances of activations"]
    try:
        unrounded(model)
    except Unsupported as problem:
        return False, [f"activations are rounded as the model rounds them: {problem}"]
    return True, []


def _parts(
    names: Sequence[str],
    tensors: Sequence[TensorDiagnosis],
    values: Sequence[ValueDiagnosis],
    tolerance: float,
    tied: frozenset[str],
    parts_of: Callable[[TensorDiagnosis | ValueDiagnosis], list[str]],
    roles: Mapping[str, str] | None = None,
) -> tuple[PartDiagnosis, ...]:
    """The parts that have anything, in order; with `roles` a part's dimensions are those of the role that it is."""
    own_tensors: dict[str, list[TensorDiagnosis]] = {name: [] for name in names}
    own_values: dict[str, list[ValueDiagnosis]] = {name: [] for name in names}
    for tensor in tensors:
        for name in parts_of(tensor):
            own_tensors[name].append(tensor)
    for value in values:
        for name in parts_of(value):
            own_values[name].append(value)
    made = []
    for name in names:
        found, computed = own_tensors[name], own_values[name]
        dims = {dim for each in found for dim in each.dims} | {dim for each in computed for dim in each.dims}
        if roles is not None:
            dims = {dim for dim in dims if roles[dim] == name}
        if found or computed:
            made.append(part(name, found, computed, tolerance, tied.issuperset(dims)))
    return tuple(made)
