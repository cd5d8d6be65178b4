"""The formats in which ``handoff --to`` writes weights. The command line imports this module: import nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

Target = Literal["pytorch", "jax", "safetensors", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The types that ``--dtype`` offers."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint without ONNX files: it has config.json and safetensors.

    A folder of which a part cannot be read is none, because there may be ONNX files in it.
    """

    def unreadable(problem: OSError) -> None:
        raise problem

    if not (folder / "config.json").is_file():
        return False
    try:
        names = {name for _, _, inside in os.walk(folder, onerror=unreadable) for name in inside}
        return any(folder.glob("*.safetensors")) and not any(name.endswith(".onnx") for name in names)
    except OSError:
        return False
