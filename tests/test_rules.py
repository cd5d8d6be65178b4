"""Each operator's rule is tested on random models of one node: op(grow(x)) equals grow(op(x)), in double precision."""

from __future__ import annotations

import zlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rule_rows
from rule_rows.harness import COVERED, MICROSOFT, ROWS, Build, Model, activation, check, random_model
from rule_rows.spoiling import spoil

from hyperclone_onnx.analysis.roles import name_dimensions
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.edits import ScaleInput
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.rules import registry
from hyperclone_onnx.rules.op import Op

assert rule_rows  # importing it registers the rows


def test_every_rule_has_a_row() -> None:
    assert set(registry.ruled()) == COVERED


@pytest.mark.parametrize("key, build, seeds", ROWS)
def test_grown_operator_computes_the_same(key: tuple[str, str], build: Build, seeds: int) -> None:
    for seed in range(seeds):
        check(key, build, seed)


@pytest.mark.parametrize("key, build, seeds", ROWS)
def test_a_malformed_node_is_refused_or_pinned(key: tuple[str, str], build: Build, seeds: int) -> None:
    """Whatever a file says about a node, its rule and its edit lead to a plan or to a refusal, never to a defect."""
    for seed in range(SPOILT):
        model = random_model(key, build, seed % seeds)
        source = model.proto()
        spoil(source, key[1], np.random.default_rng([zlib.crc32(f"{key}{build.__name__}".encode()), seed]))
        try:
            dimensions = infer(normalised(source))
            named = name_dimensions(dimensions)
            maps = {e.dim: (e.name, SourceMap(e.size, tile=2)) for e in named if e.dim.growable and e.size > 0}
            make_plan(Growth(dimensions, named, maps))
        except Refused as problem:
            assert "\n" not in str(problem)


SPOILT = 3
"""The number of changed models for each row. 200 of them showed no further errors."""


def normalised(source: onnx.ModelProto) -> ir.Model:
    """A model whose values all have types, so that ONNX's own inference need not run."""
    model = ir.from_proto(source)
    for value in (value for node in model.graph.all_nodes() for value in node.outputs):
        value.dtype = value.dtype or ir.DataType.FLOAT
    return normalise(model)


def test_a_mistake_in_a_rule_is_not_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a `CannotTell` or `Refused` of a rule becomes a refusal."""
    m = Model(np.random.default_rng(0))
    m.node("Relu", activation(m, (3, 4)))

    def mistaken(op: Op) -> None:
        op.node.nothing  # type: ignore[attr-defined] # noqa: B018

    monkeypatch.setitem(registry._relations, ("", "Relu"), mistaken)
    with pytest.raises(AttributeError, match="nothing"):
        infer(normalised(m.proto()))


def test_each_product_of_a_node_has_a_weight_of_its_own() -> None:
    """Projections of one input share their columns. If one of them is computed, the input is scaled once instead."""
    m = Model(np.random.default_rng(0))
    x, router = activation(m, (3, 4)), activation(m, (3, 2))
    first, second, gate = (m.operand(shape, stored=True) for shape in ((2, 5, 4), (2, 4, 5), (2, 5, 4)))
    m.node("MoE", x, router, first, "", second, "", gate, domain=MICROSOFT, activation_type="silu")
    for stored, scaled in ((True, 0), (False, 1)):
        if not stored:
            m.inputs[gate] = m.stored.pop(gate)
        dimensions = infer(normalise(ir.from_proto(m.proto())))
        named = name_dimensions(dimensions)
        maps = {e.dim: (e.name, SourceMap(e.size, tile=2)) for e in named if e.dim.growable and e.size in (4, 5)}
        plan = make_plan(Growth(dimensions, named, maps))
        assert sorted(name for name, recipe in plan.tensors.items() if recipe.shared) == (
            sorted([first, second, gate]) if stored else [second]
        )
        assert sum(isinstance(edit, ScaleInput) and edit.input == 0 for edit in plan.edits) == scaled
