"""Diagnoses a grown model file: its weights, its activations, its ranks, and a verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.diagnosis.layers import find_layers
from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis, TensorDiagnosis, ValueDiagnosis
from hyperclone_onnx.diagnosis.tensors import compare_tensors, load_source, with_ranks
from hyperclone_onnx.diagnosis.values import Measured, Sampling, compare_values
from hyperclone_onnx.diagnosis.verdict import conclude, lasting, over_elements, over_values, part
from hyperclone_onnx.plan.plans import Plan, plan_of
from hyperclone_onnx.planning.activations import activations as activations_of
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.progress import Notify, ignore_stage
from hyperclone_onnx.reading import loading
from hyperclone_onnx.shrinking.residue import overall, residues
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.validation.sessions import Device

PathLike = str | os.PathLike[str]


def diagnose(
    model: PathLike,
    source: PathLike | None = None,
    activations: bool = True,
    *,
    plan: PathLike | Plan | None = None,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    lengths: tuple[int, int] | None = None,
    seed: int = 0,
    ranks: bool = True,
    device: Device = "auto",
    notify: Notify | None = None,
) -> Diagnosis:
    """Measure how far the clones of a grown model differ.

    Args:
        model: the grown file, as `expand` wrote it or with trained weights (`absorb` keeps the plan in the file).
        source: the file of the small model. The ranks of the grown matrices are compared with the ranks of its own.
        activations: whether to run the model. Otherwise only the weights are compared.
        plan: the plan by which the model was grown, if the file does not contain it: a plan, or the file that
            ``expand --plan-out`` wrote.
        inputs: inputs of the model, or of its source (see `validation.inputs.given`). By default they are random.
        dims: numbers for symbolic sizes of random inputs, by name.
        lengths: the batch size and the sequence length of random inputs.
        seed: the seed of random inputs.
        ranks: whether to compute effective ranks. For a large model they take most of the time.
        device: the device on which the model runs.
        notify: called with the name of each stage when it begins.

    Raises:
        BadRequest: there is no plan, or the inputs do not fit the model.
        BadModel: a file cannot be read, or the model was not grown by this plan.
        Refused: the model runs on none of the inputs.
    """
    say = notify or ignore_stage
    say("reading")
    path = Path(model)
    grown = loading.load(path)
    plan_used = plan_of(path, grown.metadata_props, plan, lack="its clones are not known")
    analysis = analyse(path) if activations else None
    small = None if source is None else load_source(Path(source), plan_used)
    planned = None if small is None or not activations else activations_of(small.dimensions, plan_used)
    layers = find_layers(grown, plan_used)
    notes: list[str] = []
    recorded = plan_used.source
    if small is not None and recorded and recorded.get("weights") != provenance(small.model, {})["weights"]:
        notes.append(f"{source} has other weights than the source that was grown: its own ranks are compared")
    say("comparing weights")
    tensors = compare_tensors(path, grown, plan_used, layers)
    left = residues(grown, plan_used)
    of_tensor = {one.name: one.residue for one in left}
    tensors = [replace(tensor, residue=of_tensor.get(tensor.name)) for tensor in tensors]
    if ranks:
        say("computing ranks")
        tensors = with_ranks(tensors, grown, plan_used, None if small is None else small.model)
    measured = Measured()
    if analysis is not None:
        say("running")
        measured = compare_values(analysis, plan_used, layers, Sampling(inputs, lengths, seed, device, dims), planned)
    tied = lasting(tensors)
    by_layer = _by_layer(layers.names, tensors, measured, tied)
    by_role = _by_role({name: dim.role for name, dim in plan_used.dims.items()}, tensors, measured, tied)
    forward, backward = (over_elements(tensors, distance) or 0.0 for distance in ("forward", "backward"))
    activated = over_values(measured.values)
    stuck, conclusion = conclude(
        by_layer,
        by_role,
        plan_used.strategy.to_json(),
        max(forward, backward, activated or 0.0),
        any(tensor.quantised for tensor in tensors),
    )
    return Diagnosis(
        model=str(path),
        source=None if source is None else str(source),
        strategy=plan_used.strategy.to_json(),
        weights=over_elements(tensors, "matched") or 0.0,
        forward=forward,
        backward=backward,
        activations=math.nan if activated is None else activated,
        stuck=stuck,
        tied=tuple(name for name in plan_used.dims if name in tied),
        conclusion=conclusion,
        layers=by_layer,
        roles=by_role,
        tensors=tuple(tensors),
        values=measured.values,
        tolerance=measured.tolerance,
        ran_on=measured.ran_on,
        notes=(*notes, *measured.notes),
        residue=overall(left) if left else None,
    )


def _by_layer(
    names: Sequence[str], tensors: Sequence[TensorDiagnosis], measured: Measured, tied: frozenset[str]
) -> tuple[PartDiagnosis, ...]:
    """The diagnosis of each layer that has grown tensors or measured values, in order."""
    parts = []
    for name in names:
        stored = [tensor for tensor in tensors if tensor.layer == name]
        computed = [value for value in measured.values if value.layer == name]
        if stored or computed:
            dims = _dims(stored) | _dims(computed)
            parts.append(part(name, stored, computed, measured.tolerance, tied.issuperset(dims)))
    return tuple(parts)


def _by_role(
    roles: Mapping[str, str], tensors: Sequence[TensorDiagnosis], measured: Measured, tied: frozenset[str]
) -> tuple[PartDiagnosis, ...]:
    """The diagnosis of each role of which a dimension occurs. A tensor counts on the sides that have the role."""
    parts = []
    for role in dict.fromkeys(roles.values()):
        dims = {name for name, role_of_name in roles.items() if role_of_name == role}
        stored = [_side(tensor, dims) for tensor in tensors if dims & _dims([tensor])]
        computed = [value for value in measured.values if dims & _dims([value])]
        if stored or computed:
            present = dims & (_dims(stored) | _dims(computed))
            parts.append(part(role, stored, computed, measured.tolerance, tied.issuperset(present)))
    return tuple(parts)


def _side(tensor: TensorDiagnosis, dims: set[str]) -> TensorDiagnosis:
    """A tensor's diagnosis without the distances of the sides that have none of the dimensions."""
    if not dims.intersection(tensor.others):
        tensor = replace(tensor, forward=None, plain_forward=None)
    if not dims.intersection(tensor.inputs):
        tensor = replace(tensor, backward=None, plain_backward=None)
    return tensor


def _dims(parts: Sequence[TensorDiagnosis] | Sequence[ValueDiagnosis]) -> set[str]:
    return {dim for diagnosis in parts for dim in diagnosis.dims}
