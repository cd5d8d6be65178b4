"""Folders of models as optimum writes them, and what optimum's ORTModel classes compute with such folders.

    python models/optimum_runs.py export FOLDER FAMILY,...    writes each family of the zoo into FOLDER/FAMILY.SEED
    python models/optimum_runs.py run FOLDER...               prints what the model of each folder computes, as JSON

A language model continues two prompts greedily, without repeating a token, and the result is its tokens. Of any other
model the result is its first output. The weights are random, and each family is written with two seeds.
tests/test_runtimes.py compares the results of a folder and of the folders that were grown from it.
Needs torch and models/requirements-optimum.txt in an environment of their own.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from optimum import onnxruntime
from optimum.exporters.onnx import onnx_export_from_model

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo
from models.zoo_families import FAMILIES
from models.zoo_optimum import task_of

# optimum makes caches whose heads are d_model / num_heads wide. The heads of the zoo's T5 are wider.
FAMILIES["t5"] = replace(FAMILIES["t5"], settings={**FAMILIES["t5"].settings, "d_kv": 8})

KINDS = {
    "ForCausalLM": "ORTModelForCausalLM",
    "LMHeadModel": "ORTModelForCausalLM",
    "ForConditionalGeneration": "ORTModelForSeq2SeqLM",
    "Model": "ORTModelForFeatureExtraction",
}
"""The class of optimum that runs a model, by the end of the name of the model's own class."""

SEEDS = (0, 1)
STEPS = 24
PROMPTS = ([5, 17, 42, 9, 63], [88, 3, 71, 20, 31])
"""Two rows of tokens that every vocabulary of the zoo has."""


def export(family: str, folder: Path, seed: int) -> None:
    """Write a family's folder: its ONNX files, config.json and generation_config.json."""
    model, _ = zoo.build(family, "distinct", seed)
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]  # `computed` reads it
    onnx_export_from_model(model, folder, task=task_of(family), do_validation=False)


def computed(folder: Path) -> list[Any]:
    """The tokens that a language model generates, or another model's first output."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    kind = next(kind for end, kind in KINDS.items() if name.endswith(end))
    model = getattr(onnxruntime, kind).from_pretrained(folder)
    tokens = torch.tensor(PROMPTS)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind == "ORTModelForFeatureExtraction":
        return list(model(**inputs, token_type_ids=torch.zeros_like(tokens))[0].tolist())
    # A text that ended early would say little, and so would one word again and again.
    full = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "no_repeat_ngram_size": 1}
    return list(model.generate(**inputs, **full, do_sample=False, num_beams=1).tolist())


def main() -> None:
    """Export or run, as the first argument says."""
    zoo.quiet()
    if sys.argv[1] == "export":
        for family in sys.argv[3].split(","):
            for seed in SEEDS:
                export(family, Path(sys.argv[2]) / f"{family}.{seed}", seed)
    else:
        print(json.dumps({folder: computed(Path(folder)) for folder in sys.argv[2:]}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local, so nothing is downloaded
    main()
