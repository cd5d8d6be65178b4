"""Grow a pretrained ONNX model into a larger one that computes the same.

>>> from hyperclone_onnx import expand
>>> report = expand("small.onnx", "big.onnx", factor=2)  # doctest: +SKIP
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from `typing`, whose import takes longer than the start of Python
if TYPE_CHECKING:
    from hyperclone_onnx.analysis.analysing import Analysis, analyse
    from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, HypercloneError, ModelsDiffer, Refused
    from hyperclone_onnx.expansion.expanding import expand, plan_expansion
    from hyperclone_onnx.expansion.report import Expansion
    from hyperclone_onnx.expansion.validating import validate, validate_files
    from hyperclone_onnx.folders import FolderExpansion, expand_folder
    from hyperclone_onnx.frameworks.absorb import Absorption, absorb
    from hyperclone_onnx.frameworks.exports import HandedOver, hand_over
    from hyperclone_onnx.plan.maps import SourceMap
    from hyperclone_onnx.plan.plans import Plan
    from hyperclone_onnx.plan.recipes import Recipe
    from hyperclone_onnx.plan.strategies import Strategy
    from hyperclone_onnx.planning.experts import Experts
    from hyperclone_onnx.rewriting.rewriting import rewrite
    from hyperclone_onnx.shrinking.shrinking import Shrinkage, shrink
    from hyperclone_onnx.tensors.grown_tensor import GrownTensor
    from hyperclone_onnx.validation.validating import Validation

__version__ = "0.1.0"

__all__ = [
    "Absorption",
    "Analysis",
    "BadModel",
    "BadRequest",
    "CannotWrite",
    "Expansion",
    "Experts",
    "FolderExpansion",
    "GrownTensor",
    "HandedOver",
    "HypercloneError",
    "ModelsDiffer",
    "Plan",
    "Recipe",
    "Refused",
    "Shrinkage",
    "SourceMap",
    "Strategy",
    "Validation",
    "absorb",
    "analyse",
    "expand",
    "expand_folder",
    "hand_over",
    "plan_expansion",
    "rewrite",
    "shrink",
    "validate",
    "validate_files",
]

# A name is imported at its first use, so that a command can answer, and Ctrl-C can end it, before the slow imports.
# No submodule may have one of these names: its import would replace the name.
_HOMES = {
    "analysis.analysing": "Analysis analyse",
    "errors": "BadModel BadRequest CannotWrite HypercloneError ModelsDiffer Refused",
    "expansion.expanding": "expand plan_expansion",
    "expansion.report": "Expansion",
    "expansion.validating": "validate validate_files",
    "folders": "FolderExpansion expand_folder",
    "frameworks.absorb": "Absorption absorb",
    "frameworks.exports": "HandedOver hand_over",
    "plan.maps": "SourceMap",
    "plan.plans": "Plan",
    "plan.recipes": "Recipe",
    "plan.strategies": "Strategy",
    "planning.experts": "Experts",
    "rewriting.rewriting": "rewrite",
    "shrinking.shrinking": "Shrinkage shrink",
    "tensors.grown_tensor": "GrownTensor",
    "validation.validating": "Validation",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
