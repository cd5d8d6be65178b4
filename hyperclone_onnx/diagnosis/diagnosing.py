"""Diagnosing a grown model file: weights, activations, ranks, verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.diagnosis.layers import find_layers
from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis, TensorDiagnosis, ValueDiagnosis
from hyperclone_onnx.diagnosis.tensors import compare_tensors, load_source, with_ranks
from hyperclone_onnx.diagnosis.values import Measured, Sampling, compare_values
from hyperclone_onnx.diagnosis.verdict import conclude, lasting, over_elements, over_values, part
from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.activations import activations as activations_of
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.progress import Notify, tell_nobody
from hyperclone_onnx.reading import loading
from hyperclone_onnx.validation.sessions import Device

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
    say = notify or tell_nobody
    say("reading")
    path = Path(model)
    grown = loading.load(path)
    how = _plan_of(path, grown, plan)
    analysis = analyse(path) if activations else None
    small = None if source is None else load_source(Path(source), how)
    planned = None if small is None or not activations else activations_of(small.dimensions, how)
    layers = find_layers(grown, how)
    notes: list[str] = []
    if small is not None and how.source and how.source.get("weights") != provenance(small.model, {})["weights"]:
        notes.append(f"{source} holds other weights than those that were grown: ranks are compared with its own")
    say("comparing weights")
    tensors = compare_tensors(path, grown, how, layers)
    if ranks:
        say("computing ranks")
        tensors = with_ranks(tensors, grown, how, None if small is None else small.model)
    measured = Measured()
    if analysis is not None:
        say("running")
        measured = compare_values(analysis, how, layers, Sampling(inputs, lengths, seed, device), planned)
    tied = lasting(tensors)
    by_layer = _by_layer(layers.names, tensors, measured, tied)
    by_role = _by_role({name: dim.role for name, dim in how.dims.items()}, tensors, measured, tied)
    forward, backward = (over_elements(tensors, which) or 0.0 for which in ("forward", "backward"))
    activated = over_values(measured.values)
    stuck, conclusion = conclude(
        by_layer,
        by_role,
        how.strategy.to_json(),
        max(forward, backward, activated or 0.0),
        any(each.quantised for each in tensors),
    )
    return Diagnosis(
        model=str(path),
        source=None if source is None else str(source),
        strategy=how.strategy.to_json(),
        weights=over_elements(tensors, "matched") or 0.0,
        forward=forward,
        backward=backward,
        activations=math.nan if activated is None else activated,
        stuck=stuck,
        tied=tuple(name for name in how.dims if name in tied),
        conclusion=conclusion,
        layers=by_layer,
        roles=by_role,
        tensors=tuple(tensors),
        values=measured.values,
        tolerance=measured.tolerance,
        ran_on=measured.ran_on,
        notes=(*notes, *measured.notes),
    )


def _plan_of(path: Path, grown: ir.Model, given: PathLike | Plan | None) -> Plan:
    if isinstance(given, Plan):
        return given
    if given is not None:
        return Plan.read(given)
    try:
        carried = Plan.carried_by(grown.metadata_props)
    except BadModel as problem:
        raise BadModel(f"{path}: its metadata holds {problem}") from problem
    if carried is None:
        raise BadRequest(
            f"{path}: it carries no plan, so that nobody can say which of its units are clones: it was not grown by "
            "hyperclone-onnx, or a tool dropped its metadata; give the plan that expand --plan-out wrote with --plan"
        )
    return carried


def _by_layer(
    names: Sequence[str], tensors: Sequence[TensorDiagnosis], measured: Measured, tied: frozenset[str]
) -> tuple[PartDiagnosis, ...]:
    """The layers that have anything, in order."""
    found = []
    for name in names:
        own = [each for each in tensors if each.layer == name]
        computed = [each for each in measured.values if each.layer == name]
        if own or computed:
            dims = _dims(own) | _dims(computed)
            found.append(part(name, own, computed, measured.tolerance, tied.issuperset(dims)))
    return tuple(found)


def _by_role(
    roles: Mapping[str, str], tensors: Sequence[TensorDiagnosis], measured: Measured, tied: frozenset[str]
) -> tuple[PartDiagnosis, ...]:
    """The roles of which any dimension occurs; of each tensor the sides that have one of them."""
    found = []
    for role in dict.fromkeys(roles.values()):
        dims = {name for name, own in roles.items() if own == role}
        own = [_side(each, dims) for each in tensors if dims & _dims([each])]
        computed = [each for each in measured.values if dims & _dims([each])]
        if own or computed:
            here = dims & (_dims(own) | _dims(computed))
            found.append(part(role, own, computed, measured.tolerance, tied.issuperset(here)))
    return tuple(found)


def _side(tensor: TensorDiagnosis, dims: set[str]) -> TensorDiagnosis:
    if not dims.intersection(tensor.others):
        tensor = replace(tensor, forward=None, plain_forward=None)
    if not dims.intersection(tensor.inputs):
        tensor = replace(tensor, backward=None, plain_backward=None)
    return tensor


def _dims(parts: Sequence[TensorDiagnosis] | Sequence[ValueDiagnosis]) -> set[str]:
    return {dim for each in parts for dim in each.dims}
