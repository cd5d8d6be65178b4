"""The registry of transforms. A new transform is a function with `@transform`, in a module that `source.py` imports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.plan.plans import TransformStep

Transform = Callable[..., ir.Model]
"""(normalised graph, options as keyword arguments) -> normalised graph. It may change the graph that it is given."""

Preserves = Callable[[Mapping[str, Any]], bool]
"""(options of a step) -> whether the step keeps what the model computes."""

_transforms: dict[str, Transform] = {}
_preserves: dict[str, Preserves] = {}


def transform(name: str, *, preserves: Preserves | None = None) -> Callable[[Transform], Transform]:
    """Register a transform under the name that plans use for it.

    Args:
        name: the name.
        preserves: says whether a step keeps what the model computes. By default each step does.

    Raises:
        ValueError: a transform of that name is registered already.
    """

    def register(function: Transform) -> Transform:
        if name in _transforms:
            raise ValueError(f"there is a transform {name!r} already")
        _transforms[name] = function
        if preserves is not None:
            _preserves[name] = preserves
        return function

    return register


def transformed(model: ir.Model, steps: Iterable[TransformStep]) -> ir.Model:
    """Apply the steps of a plan to a normalised graph, in order. The graph may be changed.

    Raises:
        BadModel: this release does not have one of the transforms, or a transform does not have the given options.
    """
    for step in steps:
        if step.name not in _transforms:
            known = ", ".join(sorted(_transforms))
            raise BadModel(f"the plan asks for the transform {step.name!r}; this release has {known} and no more")
        function = _transforms[step.name]
        try:
            inspect.signature(function).bind(model, **step.options)
        except TypeError as problem:
            raise BadModel(f"the options of the transform {step.name!r} are wrong: {problem}") from problem
        model = function(model, **step.options)
    return model


def changing(steps: Iterable[TransformStep]) -> list[str]:
    """The names of the steps that change what the model computes."""
    return [step.name for step in steps if step.name in _preserves and not _preserves[step.name](step.options)]
