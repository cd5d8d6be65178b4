"""The rules of every operator; importing this package registers them.

In: a node, and the axes of its inputs. Out: the axes of its outputs, which axes are the same, and the edits of a grown
node.
"""

from hyperclone_onnx.rules import (
    attention,
    contractions,
    control,
    convolution,
    elementwise,
    flex_attention,
    indexing,
    layout,
    normalisation,
    onnxruntime,
    pinned,
    quantised,
    recurrent,
    reductions,
    sequences,
    shapes,
    spatial,
    spectra,
)

__all__ = [
    "attention",
    "contractions",
    "control",
    "convolution",
    "elementwise",
    "flex_attention",
    "indexing",
    "layout",
    "normalisation",
    "onnxruntime",
    "pinned",
    "quantised",
    "recurrent",
    "reductions",
    "sequences",
    "shapes",
    "spatial",
    "spectra",
]
