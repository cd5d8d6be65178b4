"""Programs compiled for NumPy compute the same as ONNX Runtime. So a wrong operator shows without a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import perceptron
from zoo_harness import make_feeds, session

from hyperclone_onnx import expand
from hyperclone_onnx.frameworks.compiled_model import CompiledModel, compile_model
from hyperclone_onnx.frameworks.compiling.application import Application
from hyperclone_onnx.frameworks.compiling.naming import nested
from hyperclone_onnx.frameworks.compiling.program import Body, Call, bodies
from models import zoo_store

# Infinities are meant: the logarithm of a bucket 0, a row of scores in which nothing is visible.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Array = np.ndarray[Any, Any]
Zoo = Callable[[str], Path]
Kind = tuple[str, str, bool]
"""A domain, an operator of it, and whether it computes with sizes."""

TOLERANCE = 2e-6
"""The limit for rounding errors in single precision, divided by the largest element."""

GRAPHS = """
    albert.fused bart_merged.cached bert.distinct bert.fused bert_runtime.built bloom.cached clip_text.fused
    cohere.extended deberta.distinct deberta_v2.extended deepseek_v3.fused flan_t5_encoder.torchscript gemma3.cached
    gpt_oss.cached gpt_oss_runtime.built llama.cached llama_scatter.built mamba.built modernbert.fused mpt.distinct
    nemotron.distinct olmo.fused olmoe.built opt.extended qwen3_moe.cached qwen3_next_runtime.built resnet.extended
    smollm3.cached swin.torchscript whisper.distinct
""".split()
"""As few graphs as contain every operator of the zoo in each of its forms."""


def in_numpy(model: CompiledModel) -> Callable[..., dict[str, Array]]:
    tensors = {weight.path: np.asarray(model.tensors[weight.initializer].numpy()) for weight in model.program.weights}
    apply = Application(model.program, nested(tensors), "numpy")

    def run(**feeds: Array) -> dict[str, Array]:
        outputs = apply({}, **feeds)
        return outputs if isinstance(outputs, dict) else {model.program.outputs[0]: outputs}

    return run


def difference(path: Path, run: Callable[..., dict[str, Array]]) -> float:
    """The largest relative difference of all outputs, over all inputs of the graph."""
    runner, worst = session(path), 0.0
    for feeds in make_feeds(path):
        outputs = run(**feeds)
        for output, want in zip(runner.get_outputs(), runner.run(None, feeds), strict=True):
            got = outputs[output.name]
            assert (got.shape, got.dtype) == (want.shape, want.dtype), output.name
            scale = float(np.abs(want).max(initial=0.0)) or 1.0
            worst = max(worst, float(np.abs(got.astype(np.float64) - want).max(initial=0.0)) / scale)
    return worst


@pytest.mark.parametrize("name", GRAPHS)
def test_programs_compute_the_same_as_onnx_runtime(name: str, zoo: Zoo) -> None:
    assert difference(zoo(name), in_numpy(compile_model(zoo(name)))) < TOLERANCE


@pytest.mark.parametrize("name", ["llama.cached", "bart_merged.cached", "resnet.extended"])
def test_a_grown_one_too(name: str, zoo: Zoo, tmp_path: Path) -> None:
    big = tmp_path / "big.onnx"
    expand(zoo(name), big, 2, check=False)
    assert difference(big, in_numpy(compile_model(big))) < TOLERANCE


@pytest.mark.parametrize("name", ["llama.cached", "mamba.built", "swin.torchscript"])
def test_one_wrong_weight_is_seen(name: str, zoo: Zoo) -> None:
    """The largest element of one matrix, changed by a tenth."""
    model = compile_model(zoo(name))
    weight = max((w for w in model.program.weights if w.role == "trainable"), key=lambda w: len(w.shape))
    tensor = model.tensors[weight.initializer]
    array = np.array(tensor.numpy())
    array[np.unravel_index(np.abs(array).argmax(), array.shape)] *= 1.1
    model.tensors[weight.initializer] = ir.tensor(array, name=tensor.name)
    assert difference(zoo(name), in_numpy(model)) > TOLERANCE


def test_the_domain_of_onnx_spelled_out(tmp_path: Path) -> None:
    model = perceptron()
    ids = np.arange(6).reshape(2, 3)
    expected = in_numpy(compile_model(ir.from_proto(model)))(ids=ids)["logits"]
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"
    onnx.save(model, tmp_path / "spelled.onnx")
    for spelled in (ir.from_proto(model), tmp_path / "spelled.onnx"):
        np.testing.assert_array_equal(in_numpy(compile_model(spelled))(ids=ids)["logits"], expected)


def kinds(body: Body) -> Iterator[Kind]:
    for step in body.steps:
        if isinstance(step, Call):
            yield step.domain, step.op_type, step.host
        else:
            yield "", type(step).__name__, False
        for inner in bodies(step):
            yield from kinds(inner)


def kinds_of(path: Path) -> set[Kind]:
    program = compile_model(path).program
    return {kind for body in (program.body, *program.blocks) for kind in kinds(body)}


@pytest.mark.frameworks  # it needs no framework, but compiles the whole zoo
def test_the_choice_has_every_operator_of_the_zoo(zoo: Zoo) -> None:
    chosen = set().union(*(kinds_of(zoo(name)) for name in GRAPHS))
    everywhere = set().union(*(kinds_of(zoo(name)) for name in zoo_store.names()))
    assert everywhere == chosen
    assert set(GRAPHS) <= set(zoo_store.names())
