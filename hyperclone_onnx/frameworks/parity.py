"""Whether ONNX Runtime and a framework compute the same from a model file."""

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
from hyperclone_onnx.validation.feeds import cases
from hyperclone_onnx.validation.sessions import Runner
from hyperclone_onnx.validation.tolerance import tolerance_of

Array = npt.NDArray[Any]
Weights = Mapping[str, Callable[[], Array]]
"""Arrays by parameter path, read when they are asked for."""

TOLERANCE = 1e-4
"""What two runs of one file stay under in float32, as a part of an output's largest element."""


def check_parity(path: Path, weights: Weights | None = None) -> str:
    """Run a file in ONNX Runtime and in a framework on random inputs.

    Args:
        path: the model file.
        weights: what the framework takes in the place of the file's own parameters.

    Returns:
        The framework.

    Raises:
        ModelsDiffer: they disagree.
        Refused: no inputs were found that ONNX Runtime takes.
    """
    name, run = _framework_runner(path, weights)
    runner = Runner(path, "cpu")
    dimensions = analyse(path).dimensions
    tolerance = max(TOLERANCE, tolerance_of(dimensions, None, None)[0])
    for case in cases(dimensions):
        try:
            wanted = runner.run(case.feeds)
        except RuntimeError:
            continue  # lengths that this model does not take
        found = run(case.feeds)
        for output, want in wanted.items():
            got = found[output]
            scale = float(np.abs(want).max(initial=0.0)) or 1.0
            error = float(np.abs(got.astype(np.float64) - want).max(initial=0.0)) / scale
            if got.shape != want.shape or not error <= tolerance:
                raise ModelsDiffer(f"ONNX Runtime and {name} disagree on {output!r} by {error:.1e} ({case.label})")
        return name
    raise Refused("no random inputs were found that ONNX Runtime takes: it cannot be validated")


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
        given = [glob.escape(each.initializer) for each in program.weights if each.path in (weights or {})]
        apply, params = load_function(path, train=given)
        if weights is not None:
            params = nested({each: weights[each]() for each in weights})
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
    outputs = result if isinstance(result, dict) else {program.outputs[0]: result}
    return {name: convert(value) for name, value in outputs.items()}
