"""Grown models in PyTorch and JAX: ``frameworks.torch.load`` and ``frameworks.jax.load``.

In: an ONNX file, or trained weights. Out: a PyTorch module, a JAX function or a checkpoint to train; or an ONNX file
with the trained weights.

``import hyperclone_onnx`` imports nothing from this package. Each framework is installed with its own extra.
"""

from __future__ import annotations

from hyperclone_onnx.errors import HypercloneError


class MissingExtra(HypercloneError, ImportError):
    """A framework is needed and not installed. The message names the extra that installs it."""

    exit_code = 2

    def __init__(self, extra: str, problem: ImportError) -> None:
        super().__init__(f"{problem}: the {extra} handoff needs pip install 'hyperclone-onnx[{extra}]'")
