"""The families of the zoo, exported by optimum: TorchScript's dialect, and decoders with key/value caches.

    python models/zoo_optimum.py [FAMILY,...]     exports every family (or those) into models/zoo/

A graph with caches is the variant `cached`, any other `torchscript`. A model with an encoder and a decoder
becomes several: `t5_encoder.torchscript`, `t5_decoder.torchscript` (the first step, which makes the caches),
`t5_decoder.cached` (the later ones) and `t5_merged.cached` (both in the branches of an If).
Needs torch and models/requirements-optimum.txt in an environment of their own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from optimum.exporters.onnx import onnx_export_from_model

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo, zoo_store
from models.zoo_changes import refresh
from models.zoo_families import FAMILIES

UNKNOWN = {
    **dict.fromkeys(("mamba", "starcoder2", "clip_text"), "optimum has no configuration for it"),
    "clip_vision": "optimum asks for two outputs where there is one",
    "falcon_new": "optimum makes caches of too few heads",
    "whisper": "optimum feeds 3000 frames whatever the configuration says",
}
"""Families on which the exporter fails, and the reason."""

TASKS = {
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation-with-past",
    "Model": "feature-extraction",
}
"""The task of a model, by the end of the name of its class."""

PARTS = {
    "model": "",
    "encoder_model": "_encoder",
    "decoder_model": "_decoder",
    "decoder_with_past_model": "_decoder",
    "decoder_model_merged": "_merged",
}
"""The exporter's names for the files of a model, and the zoo's."""


def task_of(family: str) -> str:
    """The task that the exporter is asked for."""
    return next(task for end, task in TASKS.items() if FAMILIES[family].model.endswith(end))


def export(family: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The names and the stripped graphs of a family."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            model, _ = zoo.build(family, "distinct", seed)
            onnx_export_from_model(model, Path(folder) / str(seed), task=task_of(family), do_validation=False)
        for path in sorted((Path(folder) / "0").glob("*.onnx")):
            first, second = (onnx.load(Path(folder) / str(seed) / path.name) for seed in (0, 1))
            cached = any("past_key_values" in value.name for value in first.graph.input)
            name = f"{family}{PARTS[path.stem]}.{'cached' if cached else 'torchscript'}"
            yield name, zoo_store.strip_alike(first, second)


def main() -> None:
    """Export the requested families, all by default."""
    zoo.quiet()
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else [name for name in FAMILIES if name not in UNKNOWN]
    for family in chosen:
        for name, model in export(family):
            refresh(name, model)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Some models walk sets of strings, so that the order of their nodes follows the hash seed.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    main()
