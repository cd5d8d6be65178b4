"""Compares a grown model with its source, both as files or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hyperclone_onnx import in_memory
from hyperclone_onnx.analysis.analysing import analyse, untransformed
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.running import Pair
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.validating import Mode, Validation, prepare
from hyperclone_onnx.validation.validating import validate as validate_pair


def validate(
    small: GivenModel,
    big: GivenModel,
    device: Device = "auto",
    seed: int = 0,
    mode: Mode = "auto",
    workers: int | None = None,
    *,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
) -> Validation:
    """Compare a grown model with its source, with the weights as they are stored.

    Args:
        small: the source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
        big: what was grown from it, in one of these forms.
        device: the device on which both models run.
        seed: the seed of the random inputs.
        mode: how to validate: "full", "algebraic" or "auto" (see `validation`).
        workers: the number of processes that compare tensors.
        inputs: the source's inputs: a path (see `validation.inputs.given`), or arrays by input.
        dims: numbers for the symbolic sizes of the source's inputs, by name.

    Returns:
        The validation, with notes if the grown model has no plan, or the plan of another source.

    Raises:
        BadModel: one of the models cannot be read.
        Refused, BadRequest: see `validation.validating.prepare`.
    """
    with in_memory.pair_of_files(small, big) as (source, grown):
        return _validated(source, grown, device, seed, mode, workers, inputs, dims)


validate_files = validate
"""The name of `validate` when it took only files."""


def _validated(
    small: Path,
    big: Path,
    device: Device,
    seed: int,
    mode: Mode,
    workers: int | None,
    inputs: Inputs | None,
    dims: Mapping[str, int] | None,
) -> Validation:
    """Compare a grown model file with its source."""
    grown = loading.load(big)
    plan = Plan.carried_by(grown.metadata_props)
    analysis = analyse(small, () if plan is None else plan.transforms)
    if plan is None:
        _check_order(small, big)
    wishes = wishes_of(analysis.model, inputs, dims, seed)
    pair = Pair(analysis.dimensions, grown, plan, device, wishes, untransformed(analysis))
    result = validate_pair(prepare(analysis.path, pair, mode), pair, big, workers)
    if plan is None:
        return result.with_notes("the grown model carries no plan: its tensors were not compared, only its outputs")
    if plan.source:
        digests = provenance(analysis.model, {})
        differing = [part for part in ("graph", "weights") if plan.source.get(part) != digests[part]]
        if differing:
            return result.with_notes(
                f"the plan was made from another source: its {' and '.join(differing)} had other digests"
            )
    return result


def _check_order(small: Path, big: Path) -> None:
    """Refuse arguments that are swapped: the model given as the source carries a plan, made from the other one.

    Raises:
        BadRequest: they are.
    """
    plan = Plan.carried_by(loading.load(small).metadata_props)
    if plan is None:
        return
    own = provenance(source_of(big, plan.transforms).model, {})
    if all(plan.source.get(part) == own[part] for part in ("graph", "weights")):
        raise BadRequest(f"{small} was grown from {big}: the source comes first, as in: validate SOURCE GROWN")
