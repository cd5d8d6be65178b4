"""Grow a pretrained ONNX model without changing what it computes.

>>> from hyperclone_onnx import expand
>>> report = expand("small.onnx", "big.onnx", factor=2)  # doctest: +SKIP
"""

from hyperclone_onnx.analysis import Analysis, analyse
from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, HypercloneError, ModelsDiffer, Refused
from hyperclone_onnx.expansion import Expansion, expand, plan_expansion, validate_files
from hyperclone_onnx.folders import FolderExpansion, expand_folder
from hyperclone_onnx.grown_tensor import GrownTensor
from hyperclone_onnx.maps import SourceMap
from hyperclone_onnx.plan import Plan, Recipe
from hyperclone_onnx.rewrite import rewrite
from hyperclone_onnx.strategies import Strategy
from hyperclone_onnx.validation import Validation

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
