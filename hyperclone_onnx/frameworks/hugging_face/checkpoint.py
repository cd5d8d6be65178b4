"""Read a Hugging Face checkpoint: a folder with a configuration, safetensors files and the tokenizer's files."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from hyperclone_onnx.errors import BadModel, Refused, first_line, one_line
from hyperclone_onnx.frameworks.checkpoints import INDEX, read_weights
from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray
from hyperclone_onnx.frameworks.targets import PICKLES, no_weights

Array = npt.NDArray[Any]

WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".index.json", ".gguf"),
    *(".onnx", ".onnx_data", ".data"),
)
"""Endings of files that hold weights. Such files are not copied into the grown checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, its configuration, and the class of its model."""

    folder: Path
    raw: Mapping[str, Any]
    """The fields of ``config.json`` as the file has them."""
    config: Any
    """The configuration as an object of transformers, with all defaults."""
    model_class: Any
    copied: Mapping[str, str] = field(default_factory=dict)
    """For tensors of layers that the files do not have under this name: the name of the tensor there."""

    @property
    def files(self) -> list[Path]:
        """The files to copy into the grown checkpoint, relative to the folder.

        Weights, the configuration, our manifest and hidden files are left out.
        """
        files = []
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in inside.parts)
            replaced = str(inside) in ("config.json", HUGGING_FACE) or path.name.endswith(WEIGHTS)
            if path.is_file() and not hidden and not replaced:
                files.append(inside)
        return files

    @property
    def other_weights(self) -> list[str]:
        """Files with weights in subfolders, relative to the folder; for example those of a layer after the model.

        They are no part of the model, so the grown checkpoint does not get them.
        """
        files = (path.relative_to(self.folder) for path in sorted(self.folder.glob("*/**/*")) if path.is_file())
        return [str(inside) for inside in files if inside.name.endswith(WEIGHTS) and not str(inside).startswith(".")]

    @cached_property
    def stored(self) -> dict[str, StoredArray]:
        """The tensors in the files, by their names there. A model may give a tensor another name.

        Raises:
            BadModel: a file cannot be read, or is truncated.
        """
        try:
            return read_weights(weights_of(self.folder))
        except BadModel as problem:
            raise BadModel(f"{self.folder}: its weights cannot be loaded ({problem})") from problem

    @cached_property
    def main_type(self) -> np.dtype[Any]:
        """The type of most floating-point numbers in the files."""
        counts: Counter[np.dtype[Any]] = Counter()
        for array in self.stored.values():
            if array.dtype.kind not in "iub":
                counts[array.dtype] += math.prod(array.shape)
        return counts.most_common(1)[0][0] if counts else np.dtype(np.float32)

    def type_of(self, name: str) -> np.dtype[Any]:
        """The type of a floating tensor in the files; `main_type` where the files have no tensor of this name."""
        stored = self.stored.get(self.copied.get(name, name))
        return self.main_type if stored is None or stored.dtype.kind in "iub" else stored.dtype

    @property
    def largest_file(self) -> int | None:
        """The number of bytes of the largest file with weights; None where one file has them all."""
        if (self.folder / "model.safetensors").is_file():
            return None
        files: set[str] = set(_json(self.folder / INDEX, "").get("weight_map", {}).values())
        return max((self.folder / name).stat().st_size for name in files)

    def load(self) -> Loaded:
        """Load the model on the CPU.

        Raises:
            BadModel: the weights cannot be read, or do not fit the configuration.
        """
        return load(self.folder, self.model_class, self.main_type == np.float64)

    def copy_files(self, folder: Path) -> list[str]:
        """Copy the files listed in `files` into a folder, and return their names."""
        for inside in self.files:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / inside, folder / inside)
        return [str(inside) for inside in self.files]


@dataclass(frozen=True)
class Loaded:
    """A model that runs, and the names of the parameters that its checkpoint lacks."""

    model: Any
    missing: frozenset[str]
    stored: Mapping[str, StoredArray] | None = None
    """The tensors that the checkpoint has, where they stay in its files; None where the model is in memory."""
    reads: Mapping[int, Callable[[], Array]] = field(default_factory=dict)
    """By the ``id`` of a parameter, the function that reads it, where the tensors stay in the files."""

    def tensors(self) -> dict[str, Any]:
        """The tensors that the checkpoint has, in the model's order.

        A tensor with several names is listed once, under the first name.
        """
        return {name: tensor for name, tensor in stored_tensors(self.model).items() if name not in self.missing}


def stored_tensors(model: Any) -> dict[str, Any]:
    """The parameters of a model, and those buffers that a checkpoint stores.

    A tensor with several names is listed once, under the first name.
    """
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Any] = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in state}
    return tensors


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and check that its weights are there. No weights are read.

    Raises:
        BadModel: the folder is no checkpoint, or a file of the checkpoint is missing or malformed.
        Refused: the weights are pickles or quantised, the model needs code of its own, or transformers does not have
            the model's class.
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
        except Exception as problem:  # the reader may raise any exception on a malformed configuration
            if "auto_map" in raw:
                raise Refused(f"{folder}: this model needs code of its own (auto_map), which is not run") from problem
            raise BadModel(
                f"{folder}: transformers {transformers.__version__} does not read config.json ({one_line(problem)})"
            ) from problem
    for name in raw.get("architectures") or ():
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            return Checkpoint(folder, raw, config, model_class)
    if not raw.get("architectures"):
        raise Refused(
            f"{folder}: config.json has no 'architectures', which names the model's class: "
            'add it, as in "architectures": ["LlamaForCausalLM"]'
        )
    raise Refused(
        f"{folder}: config.json names no architecture that transformers {transformers.__version__} has "
        f"({', '.join(raw['architectures'])})"
    )


def _json(path: Path, otherwise: str) -> dict[str, Any]:
    """Read a JSON object. `otherwise` says in the message what a missing file means."""
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
    """Check that a folder has all its safetensors files."""
    if (folder / "model.safetensors").is_file():
        return
    if (folder / INDEX).is_file():
        shards = set(_json(folder / INDEX, "").get("weight_map", {}).values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing or not shards:
            raise BadModel(f"{folder}: {missing[0] if missing else 'every file'} that {INDEX} names is missing")
        return
    problem = f"{folder}: {no_weights(folder)}"
    raise Refused(problem) if any(path.suffix in PICKLES for path in folder.iterdir()) else BadModel(problem)


def implementations(model_class: Any) -> dict[str, str]:
    """How the parts of a model compute of which transformers has several forms: in those that an exporter knows.

    The experts of a mixture are gathered for each token. The usual form sorts the tokens by expert.
    """
    chosen = {"attn_implementation": "eager"}
    can_choose = getattr(model_class, "_can_set_experts_implementation", None)
    return {**chosen, "experts_implementation": "batched_mm"} if can_choose is not None and can_choose() else chosen


def weights_of(folder: Path) -> Path:
    """The file of a checkpoint's folder that has all weights, or that names those which have them."""
    single = folder / "model.safetensors"
    return single if single.is_file() else folder / INDEX


def load(folder: Path, model_class: Any, double: bool = False, dtype: Any = None) -> Loaded:
    """Load the model of a checkpoint's folder.

    The model computes in float32 even where its weights are stored in half precision. Every such weight is a number of
    float32 too. But a constant that a model derives from its sizes would be rounded in half precision, and the
    constants of two models of different sizes would then no longer have an exact ratio.

    Args:
        folder: the checkpoint.
        model_class: the class of transformers to load it with.
        double: whether the model computes in float64.
        dtype: the type of the model in place of both. Weights that are stored in it are not copied into memory.

    Raises:
        BadModel: the weights cannot be read, or do not fit the configuration.
    """
    with quiet():
        try:
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype or (torch.float64 if double else torch.float32),
                ignore_mismatched_sizes=True,
                **implementations(model_class),
                output_loading_info=True,
            )
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as problem:
            raise BadModel(f"{folder}: its weights cannot be loaded ({first_line(problem)})") from problem
    wrong = [*info.get("mismatched_keys", ()), *info.get("error_msgs", ())]
    if wrong:
        raise BadModel(f"{folder}: weights and configuration do not fit together: {one_line(wrong[0])}")
    return Loaded(model.eval(), frozenset(info.get("missing_keys", ())))


def to_numpy(tensor: Any) -> Array:
    """A floating tensor as an array, in float64 if that is its type, otherwise in float32."""
    tensor = tensor.detach()
    return np.asarray(tensor.numpy() if tensor.dtype in (torch.float32, torch.float64) else tensor.float().numpy())


def in_torch(array: Array) -> Array:
    """The array in float32 if its type is bfloat16, which PyTorch does not take from NumPy."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages and progress bars of transformers. Our report says what matters."""
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
