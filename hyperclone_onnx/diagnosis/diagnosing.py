"""Diagnosing a grown model file: weights, activations, ranks, verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx import storage
from hyperclone_onnx.analysis import Analysis, analyse
from hyperclone_onnx.diagnosis import activations as runs
from hyperclone_onnx.diagnosis.layers import Layers, find_layers
from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis, Rank, TensorDiagnosis, ValueDiagnosis
from hyperclone_onnx.diagnosis.rank import as_matrix, spectrum
from hyperclone_onnx.diagnosis.value_axes import value_axes
from hyperclone_onnx.diagnosis.verdict import conclude, over_elements, part, read_alike, weight_tolerance
from hyperclone_onnx.diagnosis.weights import compare, layout, read, source_layout
from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.feeds import Case
from hyperclone_onnx.normalise import normalise
from hyperclone_onnx.plan import METADATA_KEY, Plan
from hyperclone_onnx.sessions import Device
from hyperclone_onnx.validation import tolerance_of

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
    say("comparing weights")
    tensors = _tensors(path, grown, how, layers)
    if ranks:
        say("computing ranks")
        tensors = _ranked(tensors, grown, how, small)
    values: list[ValueDiagnosis] = []
    tolerance, ran_on = math.nan, ""
    if analysis is not None:
        say("running")
        values, tolerance, ran_on = _values(analysis, how, layers, inputs, lengths, seed, device)
        if not values:
            notes.append("no activation was compared: what has clones is computed inside bodies of If, Loop or Scan")
    by_layer = _parts(layers.names, tensors, values, tolerance, lambda each: [each.layer])
    roles = {name: dim.role for name, dim in how.dims.items()}
    by_role = _parts(
        list(dict.fromkeys(roles.values())),
        tensors,
        values,
        tolerance,
        lambda each: list(dict.fromkeys(roles[name] for name in each.dims)),
    )
    stuck, conclusion = conclude(by_layer, how.strategy.to_json())
    measured = [each.distance for each in values if each.distance is not None]
    return Diagnosis(
        model=str(path),
        source=None if source is None else str(source),
        strategy=how.strategy.to_json(),
        weights=over_elements(tensors, "matched") or 0.0,
        forward=over_elements(tensors, "forward") or 0.0,
        backward=over_elements(tensors, "backward") or 0.0,
        activations=math.sqrt(sum(d * d for d in measured) / len(measured)) if measured else math.nan,
        stuck=stuck,
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
        if not table.grows:
            continue
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if recipe.bits is None and shape != table.axes:
            raise BadModel(f"{path}: {name!r} has the shape {shape}, and {table.axes} in the plan")
        spreads = compare(read(tensor, recipe, table), table)
        found.append(
            TensorDiagnosis(
                name,
                layers.tensors[name],
                table.axes,
                tuple(dict.fromkeys((*table.inputs.dims, *table.others.dims))),
                math.prod(table.axes),
                spreads.matched.distance,
                None if spreads.forward is None else spreads.forward.distance,
                None if spreads.backward is None else spreads.backward.distance,
                weight_tolerance(tensor.dtype),
            )
        )
    return found


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
) -> tuple[list[ValueDiagnosis], float, str]:
    wanted = runs.measured_values(analysis, value_axes(analysis.dimensions, plan))
    if not wanted:
        return [], math.nan, ""
    if inputs is not None:
        cases: Sequence[Case] = [runs.given_inputs(inputs, analysis.model)]
    else:
        cases = list(runs.samples(analysis, plan, seed, lengths))
    found, provider, label = runs.measure(analysis, wanted, cases, device)
    by_name = {node.name or "": layer for node, layer in layers.nodes.items()}
    tolerance, _ = tolerance_of(analysis.dimensions, None, None)
    values = []
    for each in found:
        node = each.value.producer()
        layer = by_name.get((node.name if node is not None else "") or "", layers.names[0])
        values.append(ValueDiagnosis(each.value.name or "", layer, each.dims, each.spread.distance))
    return values, tolerance, f"{provider}, {label}"


def _parts(
    names: Sequence[str],
    tensors: Sequence[TensorDiagnosis],
    values: Sequence[ValueDiagnosis],
    tolerance: float,
    parts_of: Callable[[TensorDiagnosis | ValueDiagnosis], list[str]],
) -> tuple[PartDiagnosis, ...]:
    """The parts that have anything, in order."""
    own_tensors: dict[str, list[TensorDiagnosis]] = {name: [] for name in names}
    own_values: dict[str, list[ValueDiagnosis]] = {name: [] for name in names}
    for tensor in tensors:
        for name in parts_of(tensor):
            own_tensors[name].append(tensor)
    for value in values:
        for name in parts_of(value):
            own_values.setdefault(name, []).append(value)
    alike = read_alike(tensors)
    return tuple(
        part(name, own_tensors.get(name, []), own_values[name], tolerance, alike)
        for name in own_values
        if own_tensors.get(name) or own_values[name]
    )
