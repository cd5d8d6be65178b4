"""Compares the clones in each grown tensor of a model, and computes its rank and that of the source's tensor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.diagnosis.layers import Layers
from hyperclone_onnx.diagnosis.model import Rank, TensorDiagnosis
from hyperclone_onnx.diagnosis.rank import as_matrix, spectrum
from hyperclone_onnx.diagnosis.verdict import weight_tolerance
from hyperclone_onnx.diagnosis.weights import compare, layout, read, source_layout
from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.plan.maps import grown_size
from hyperclone_onnx.plan.origins import Origin
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import check_fits
from hyperclone_onnx.tensors.assembled import assemble
from hyperclone_onnx.tensors.packing import packed_width


def compare_tensors(path: Path, grown: ir.Model, plan: Plan, layers: Layers) -> list[TensorDiagnosis]:
    """Compare the clones in each tensor that grew.

    Args:
        path: the grown file, for messages.
        grown: the grown model.
        plan: its plan.
        layers: the layer of each tensor.

    Raises:
        BadModel: a tensor of the plan is missing, or has another shape.
    """
    diagnoses: list[TensorDiagnosis] = []
    for name, recipe in plan.tensors.items():
        if not recipe.grows:
            continue
        value = grown.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise BadModel(f"{path}: it has no tensor {name!r}, which the plan names: it was not grown by this plan")
        tensor = value.const_value
        if tensor.dtype == ir.DataType.STRING:
            continue
        sizes = [[grown_size(factor, plan.maps) for factor in axis] for axis in recipe.axes]
        axes = tuple(map(math.prod, sizes))
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if any(size < 0 for factors in sizes for size in factors):
            raise BadModel(f"{path}: a malformed plan: {name!r} has factors of a negative size")
        if recipe.bits is None and shape != axes:
            raise BadModel(f"{path}: {name!r} has the shape {shape}, and {axes} in the plan")
        if recipe.bits is not None and tensor.nbytes != _packed_bytes(axes, recipe.bits):
            raise BadModel(f"{path}: {name!r} has {tensor.nbytes} bytes, and {axes} numbers in the plan")
        if 0 in axes:
            continue
        table = layout(recipe, plan.maps)
        clones = max(table.clones(shared=True), table.clones(shared=False))
        if clones == 1:
            continue
        spreads = compare(read(tensor, recipe, table), table)
        diagnoses.append(
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
    return diagnoses


def _packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    *rows, width = shape
    return math.prod(rows) * packed_width(width, bits)


def load_source(path: Path, plan: Plan) -> Analysis:
    """Read and analyse the source of a plan.

    Raises:
        BadRequest: the file is not the source of this plan.
        BadModel, Refused: see `analyse`.
    """
    analysis = analyse(path, plan.transforms)
    try:
        check_fits(plan, analysis.model)
    except BadRequest as problem:
        raise BadRequest(f"--source {path}: {problem}") from problem
    return analysis


def with_ranks(
    tensors: list[TensorDiagnosis], grown: ir.Model, plan: Plan, source: ir.Model | None
) -> list[TensorDiagnosis]:
    """Add the ranks of all tensors that are matrices of floating-point numbers.

    Args:
        tensors: the diagnoses without ranks.
        grown: the grown model.
        plan: its plan.
        source: the source model, for the ranks of its tensors; None for no source.
    """
    source_ranks: dict[tuple[Origin, object], float] = {}
    ranked = []
    for diagnosis in tensors:
        recipe = plan.tensors[diagnosis.name]
        tensor = _stored(grown, diagnosis.name)
        table = layout(recipe, plan.maps)
        if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
            ranked.append(diagnosis)
            continue
        matrix = as_matrix(read(tensor, recipe, table), table)
        if matrix is None:
            ranked.append(diagnosis)
            continue
        grown_rank = spectrum(matrix)
        source_rank = None
        if source is not None:
            key = recipe.origin, (recipe.axes, recipe.shared)
            if key not in source_ranks:
                small = source_layout(recipe, plan.maps)
                small_matrix = as_matrix(read(assemble(recipe.origin, source), recipe, small), small)
                source_ranks[key] = 1.0 if small_matrix is None else spectrum(small_matrix).effective
            source_rank = source_ranks[key]
        rank = Rank(grown_rank.effective, grown_rank.stable, min(matrix.shape), source_rank, grown_rank.by)
        ranked.append(replace(diagnosis, rank=rank))
    return ranked


def _stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor
