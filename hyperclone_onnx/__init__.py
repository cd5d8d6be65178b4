"""Grow a pretrained ONNX model without changing what it computes.

>>> from hyperclone_onnx import expand
>>> report = expand("small.onnx", "big.onnx", factor=2)  # doctest: +SKIP
"""

from __future__ import annotations

TYPE_CHECKING = False  # as `typing` has it, whose import alone takes longer than Python does to start
if TYPE_CHECKING:
    from hyperclone_onnx.analysis.analysing import Analysis, analyse
    from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, HypercloneError, ModelsDiffer, Refused
    from hyperclone_onnx.expansion import Expansion, expand, plan_expansion, validate_files
    from hyperclone_onnx.folders import FolderExpansion, expand_folder
    from hyperclone_onnx.plan.maps import SourceMap
    from hyperclone_onnx.plan.plans import Plan
    from hyperclone_onnx.plan.recipes import Recipe
    from hyperclone_onnx.plan.strategies import Strategy
    from hyperclone_onnx.rewriting.rewriting import rewrite
    from hyperclone_onnx.tensors.grown_tensor import GrownTensor
    from hyperclone_onnx.validation.validating import Validation

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "BadModel",
    "BadRequest",
    "CannotWrite",
    "Expansion",
    "FolderExpansion",
    "GrownTensor",
    "HypercloneError",
    "ModelsDiffer",
    "Plan",
    "Recipe",
    "Refused",
    "SourceMap",
    "Strategy",
    "Validation",
    "analyse",
    "expand",
    "expand_folder",
    "plan_expansion",
    "rewrite",
    "validate_files",
]

# Names are imported where they are first used: a command answers, and Ctrl-C ends it, before half a second of imports.
# No submodule may have the name of anything here, for it would take its place.
_HOMES = {
    "analysis.analysing": "Analysis analyse",
    "errors": "BadModel BadRequest CannotWrite HypercloneError ModelsDiffer Refused",
    "expansion": "Expansion expand plan_expansion validate_files",
    "folders": "FolderExpansion expand_folder",
    "plan.maps": "SourceMap",
    "plan.plans": "Plan",
    "plan.recipes": "Recipe",
    "plan.strategies": "Strategy",
    "rewriting.rewriting": "rewrite",
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
