"""A Hugging Face checkpoint: a folder with a configuration, safetensors, and the files of its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from hyperclone_onnx.errors import BadModel, Refused, first_line
from hyperclone_onnx.frameworks.checkpoints import INDEX, PICKLES

Array = npt.NDArray[Any]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".data", ".index.json")
"""Endings of files that hold weights: no grown checkpoint takes them over."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its configuration as written and as transformers reads it, and the class of its model."""

    folder: Path
    raw: Mapping[str, Any]
    config: Any
    model_class: Any

    @property
    def files(self) -> list[Path]:
        """The files that a copy of the folder takes over: all but weights and the configuration."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in inside.parts)
            own = str(inside) in ("config.json", "hyperclone_onnx.json") or path.name.endswith(WEIGHTS)
            if path.is_file() and not hidden and not own:
                found.append(inside)
        return found

    @property
    def other_weights(self) -> list[str]:
        """Files in folders of the folder that hold weights (a layer behind the model): they are left out."""
        found = (path.relative_to(self.folder) for path in sorted(self.folder.glob("*/**/*")) if path.is_file())
        return [str(each) for each in found if each.name.endswith(WEIGHTS) and not str(each).startswith(".")]

    def load(self) -> Loaded:
        """The model, on the CPU and in the types that it is stored in.

        Raises:
            BadModel: its weights cannot be read, or are not those that the configuration asks for.
        """
        return load(self.folder, self.model_class)

    def copy_files(self, folder: Path) -> list[str]:
        """Copy everything but weights and configuration; the names of what was copied."""
        for inside in self.files:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / inside, folder / inside)
        return [str(inside) for inside in self.files]


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and the parameters that its checkpoint did not have."""

    model: Any
    missing: frozenset[str]

    def tensors(self) -> dict[str, Any]:
        """Each stored tensor once, by the first of its names, in the model's order."""
        return {name: each for name, each in stored_tensors(self.model).items() if name not in self.missing}


def stored_tensors(model: Any) -> dict[str, Any]:
    """The parameters and the buffers that a checkpoint holds, each once, by the first of its names."""
    state = model.state_dict(keep_vars=True)
    found: dict[str, Any] = dict(model.named_parameters())
    found |= {name: each for name, each in model.named_buffers() if name in state}
    return found


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what a folder says it is; no weights.

    Raises:
        BadModel: it is no checkpoint, or not a whole one.
        Refused: its weights are pickles or quantised, or it needs code of its own.
    """
    if not folder.is_dir():
        raise BadModel(f"{folder}: no such folder; --like names the checkpoint that the ONNX file was exported from")
    raw = _json(folder / "config.json", "not a Hugging Face checkpoint")
    _check_weights(folder)
    if "quantization_config" in raw:
        raise Refused(f"{folder}: its weights are quantised: grow the checkpoint before it is quantised")
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as problem:  # whatever its reader raises, the configuration is not readable
            if "auto_map" in raw:
                raise Refused(f"{folder}: this model needs code of its own (auto_map), which is not run") from problem
            raise BadModel(
                f"{folder}: config.json is no configuration of a known model ({first_line(problem)})"
            ) from problem
    for name in raw.get("architectures") or ():
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            return Checkpoint(folder, raw, config, model_class)
    raise Refused(
        f"{folder}: config.json names no architecture that transformers {transformers.__version__} has "
        f"({', '.join(raw.get('architectures') or ()) or 'none'})"
    )


def _json(path: Path, otherwise: str) -> dict[str, Any]:
    if not path.is_file():
        raise BadModel(f"{path.parent}: no {path.name}: {otherwise}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BadModel(f"{path}: not readable as JSON ({first_line(problem)})") from problem
    if not isinstance(data, dict):
        raise BadModel(f"{path}: not a JSON object")
    return data


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    if (folder / INDEX).is_file():
        shards = set(_json(folder / INDEX, "").get("weight_map", {}).values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing or not shards:
            raise BadModel(f"{folder}: {missing[0] if missing else 'every file'} that {INDEX} names is missing")
        return
    if any(path.suffix in PICKLES for path in folder.iterdir()):
        raise Refused(
            f"{folder}: its weights are pickles, which are not read: "
            "convert them to safetensors (save_pretrained of transformers does)"
        )
    raise BadModel(f"{folder}: no model.safetensors and no {INDEX}: there are no weights")


def load(folder: Path, model_class: Any) -> Loaded:
    """Load a folder's model.

    Raises:
        BadModel: its weights cannot be read, or are not those that the configuration asks for.
    """
    with quiet():
        try:
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype="auto",
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as problem:
            raise BadModel(f"{folder}: its weights cannot be loaded ({first_line(problem)})") from problem
    wrong = [*info.get("mismatched_keys", ()), *info.get("error_msgs", ())]
    if wrong:
        raise BadModel(f"{folder}: weights and configuration do not fit together: {first_line(wrong[0])}")
    return Loaded(model.eval(), frozenset(info.get("missing_keys", ())))


def to_numpy(tensor: Any) -> Array:
    """A floating tensor in float32, or in float64 if that is its type."""
    tensor = tensor.detach()
    return np.asarray(tensor.numpy() if tensor.dtype in (torch.float32, torch.float64) else tensor.float().numpy())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says while it loads: the report says what matters."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
