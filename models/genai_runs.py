"""Folders of a small Llama as the builder of ONNX Runtime GenAI writes them, and what the runtime generates with them.

    python models/genai_runs.py export FOLDER    writes a small Llama into FOLDER/llama.SEED, with two seeds
    python models/genai_runs.py run FOLDER...    prints the tokens that the model of each folder generates, as JSON

The weights are random. tests/test_runtimes.py compares the tokens of a folder and of the folders that were grown from
it. Needs torch, models/requirements.txt and onnxruntime-genai, which `make models-check` installs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
"""Not those of the zoo: the runtime's attention asks for heads whose size is a multiple of 16."""

SEEDS = (0, 1)
STEPS = 24
PROMPT = (5, 17, 42, 9, 63)


def export(folder: Path, seed: int) -> None:
    """Write a folder with ONNX files, genai_config.json and a tokenizer, which the builder asks for."""
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **special, initializer_range=0.2))
    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    with tempfile.TemporaryDirectory() as beside:
        weights = Path(beside) / "weights"
        model.save_pretrained(weights)
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2").save_pretrained(weights)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
        where = ["-i", str(weights), "-o", str(folder), "-c", beside]
        subprocess.run([*builder, *where], check=True, stdout=sys.stderr)


def generated(folder: Path) -> list[int]:
    """The prompt and the tokens that follow it greedily."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(PROMPT) + STEPS  # a text that ended early would say little
    parameters.set_search_options(min_length=length, max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def main() -> None:
    """Export or run, as the first argument says."""
    zoo.quiet()
    if sys.argv[1] == "export":
        for seed in SEEDS:
            export(Path(sys.argv[2]) / f"llama.{seed}", seed)
    else:
        print(json.dumps({folder: generated(Path(folder)) for folder in sys.argv[2:]}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local, so nothing is downloaded
    main()
