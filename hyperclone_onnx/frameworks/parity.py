"""Check that ONNX Runtime and a framework compute the same outputs from a model file."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.errors import ModelsDiffer, Refused
from hyperclone_onnx.frameworks.compiled_model import compile_model
from hyperclone_onnx.frameworks.compiling.naming import nested
from hyperclone_onnx.frameworks.compiling.program import Program
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reading import loading
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.inputs.search import NoInputs, find_inputs
from hyperclone_onnx.validation.sessions import Runner
from hyperclone_onnx.validation.tolerance import tolerance_of

Array = npt.NDArray[Any]
Weights = Mapping[str, Callable[[], Array]]
"""By parameter path, a function that reads the parameter's array."""

TOLERANCE = 1e-4
"""The largest difference that we allow in float32, divided by the largest absolute element of the output."""


def check_parity(
    path: Path, weights: Weights | None = None, inputs: Inputs | None = None, dims: Mapping[str, int] | None = None
) -> str:
    """Run a model file in ONNX Runtime and in a framework on the same inputs, and compare the outputs.

    The framework is PyTorch if it is installed, else JAX.

    Args:
        path: the model file.
        weights: parameters that the framework uses instead of those in the file; None to use the file's.
        inputs: inputs to compare on, the file's or its source's (see `validation.inputs.given`); random by default.
        dims: numbers for symbolic sizes of random inputs, by name.

    Returns:
        The name of the framework: "PyTorch" or "JAX".

    Raises:
        ModelsDiffer: an output differs by more than the tolerance.
        Refused: ONNX Runtime rejects all inputs.
    """
    name, run = _framework_runner(path, weights)
    runner = Runner(path, "cpu")
    analysis = analyse(path)
    dimensions = analysis.dimensions
    tolerance = max(TOLERANCE, tolerance_of(dimensions, None, None)[0])
    wishes = wishes_of(analysis.model, inputs, dims, plan=Plan.carried_by(loading.load(path).metadata_props))
    try:
        accepted = find_inputs(dimensions, runner.run, wishes, wanted=1)
    except NoInputs as problem:
        raise Refused(f"{path}: {problem}") from problem
    for ran in accepted:
        outputs = run(ran.case.feeds)
        for output, expected in ran.outputs.items():
            array = outputs[output]
            scale = float(np.abs(expected).max(initial=0.0)) or 1.0
            error = float(np.abs(array.astype(np.float64) - expected).max(initial=0.0)) / scale
            if array.shape != expected.shape or not error <= tolerance:
                raise ModelsDiffer(f"ONNX Runtime and {name} disagree on {output!r} by {error:.1e} ({ran.case.label})")
    return name


def _framework_runner(
    path: Path, weights: Weights | None
) -> tuple[str, Callable[[Mapping[str, Array]], dict[str, Array]]]:
    try:
        import torch

        from hyperclone_onnx.frameworks.torch import as_torch
        from hyperclone_onnx.frameworks.torch import load as load_module
    except ImportError:
        from hyperclone_onnx.frameworks.jax import load as load_function

        program = compile_model(path).program
        trained = [glob.escape(weight.initializer) for weight in program.weights if weight.path in (weights or {})]
        apply, params = load_function(path, train=trained)
        if weights is not None:
            params = nested({path: weights[path]() for path in weights})
        return "JAX", lambda feeds: _named(program, apply(params, **feeds), np.asarray)
    model = load_module(path)
    if weights is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(as_torch(weights[name]()))

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            result = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return _named(model.program, result, lambda tensor: tensor.float().numpy())

    return "PyTorch", run


def _named(program: Program, result: Any, convert: Callable[[Any], Array]) -> dict[str, Array]:
    return {name: convert(value) for name, value in program.by_name(result).items()}
