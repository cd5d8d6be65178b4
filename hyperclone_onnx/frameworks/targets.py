"""The formats in which ``handoff --to`` writes weights. The command line imports this module: import nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

Target = Literal["pytorch", "jax", "safetensors", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The types that ``--dtype`` offers."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint without ONNX files: it has config.json and safetensors."""
    return (
        (folder / "config.json").is_file()
        and next(folder.glob("*.safetensors"), None) is not None
        and next(folder.rglob("*.onnx"), None) is None
    )
