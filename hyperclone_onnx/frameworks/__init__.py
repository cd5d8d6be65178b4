"""Grown models in PyTorch and JAX: ``frameworks.torch.load`` and ``frameworks.jax.load``.

In: an ONNX file, or trained weights. Out: a module, a function or a checkpoint to train, or the ONNX file with those
weights.

Nothing here is imported by ``import hyperclone_onnx``; each framework comes with its own extra.
"""

from __future__ import annotations

from hyperclone_onnx.errors import HypercloneError


class MissingExtra(HypercloneError, ImportError):
    """A framework is asked for that is not installed; the text names the extra."""

    exit_code = 2

    def __init__(self, extra: str, problem: ImportError) -> None:
        super().__init__(f"{problem}: the {extra} handoff needs `pip install hyperclone-onnx[{extra}]`")
