"""The formats in which ``handoff --to`` writes weights. The command line imports this module: import nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from hyperclone_onnx.system.patterns import is_excluded

Target = Literal["pytorch", "jax", "safetensors", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Endings of files that are pickles. A pickle may run any code, so none is read."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The types that ``--dtype`` offers."""


def is_checkpoint(folder: Path, exclude: Sequence[str] = ()) -> bool:
    """Whether a folder is a Hugging Face checkpoint without ONNX files: it has config.json and safetensors.

    A folder of which a part cannot be read is none, because there may be ONNX files in it.

    Args:
        folder: the folder.
        exclude: patterns of files that do not count, as they are called within the folder (``onnx/*``).
    """
    if not (folder / "config.json").is_file() or may_have_onnx(folder, exclude):
        return False
    return any(folder.glob("*.safetensors"))


def may_have_onnx(folder: Path, exclude: Sequence[str] = ()) -> bool:
    """Whether there is an ONNX file in a folder, at any depth, or a part of the folder cannot be read.

    Files that match one of the patterns `exclude` do not count.
    """

    def unreadable(problem: OSError) -> None:
        raise problem

    try:
        return any(
            name.endswith(".onnx") and not is_excluded((Path(place) / name).relative_to(folder), exclude)
            for place, _, names in os.walk(folder, onerror=unreadable)
            for name in names
        )
    except OSError:
        return True


def no_weights(folder: Path) -> str:
    """Why a folder has no weights that we read, and what to do: a text without the folder's name.

    Args:
        folder: a folder without model.safetensors and without its index.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())

    def ending(*ends: str) -> str | None:
        return next((name for name in names if name.endswith(ends)), None)

    save = "save it with save_pretrained of transformers"
    if "adapter_config.json" in names:
        return (
            "a PEFT adapter, and no model: merge it into its base model (merge_and_unload of peft), and save that with "
            "save_pretrained"
        )
    if file := ending(".safetensors"):
        if "config.json" not in names:
            return f"has {file} and no config.json: a Hugging Face folder has both; or give an ONNX file"
        return f"has {file}, and neither model.safetensors nor its index: load the model with transformers, and {save}"
    if file := ending(*PICKLES):
        return f"its weights are pickles, which are not read ({file}): load the model with transformers, and {save}"
    if file := ending(".gguf", ".h5", ".msgpack"):
        return f"its weights are in a format that is not read ({file}): take the safetensors files of the same model"
    if "config.json" in names:
        return "there are no weights: config.json is there, and no model.safetensors"
    return "no .onnx file in this folder, and no Hugging Face model (config.json and model.safetensors)"
