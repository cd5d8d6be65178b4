"""Graphs of the zoo with operators fused by ONNX Runtime.

    python models/zoo_fused.py [NAME,...]     fuses every graph below (or those) into models/zoo/

`fused` is what the transformers optimizer makes (Attention, EmbedLayerNormalization, SkipLayerNormalization,
RotaryEmbedding, ...), `extended` what a session saves as its optimised model (FusedMatMul, FusedGemm, FusedConv).
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo_store
from models.zoo_changes import refresh
from models.zoo_families import SIZINGS

FUSED = {
    "albert.torchscript": "bert",
    "bert.torchscript": "bert",
    "distilbert.torchscript": "bert",
    "electra.torchscript": "bert",
    "roberta.torchscript": "bert",
    "modernbert.torchscript": "bert",
    "bart.distinct": "bart",
    "bart_decoder.cached": "bart",
    "whisper.distinct": "bart",
    "vit.torchscript": "vit",
    "clip_text.distinct": "clip",
    "clip_vision.distinct": "clip",
    "gpt2.cached": "gpt2",
    "gpt_neox.cached": "gpt_neox",
    "bloom.cached": "gpt2",
    "gptj.cached": "gpt2",
    "llama.cached": "gpt2",
    "qwen3.cached": "gpt2",
    "olmo.cached": "gpt2",
    "phi3.cached": "gpt2",
    "stablelm.cached": "gpt2",
    "deepseek_v3.cached": "gpt2",
    "convnext.torchscript": "bert",
}
"""The graphs to fuse, and the model type that the optimizer gets for each."""

EXTENDED = ("opt.cached", "cohere.cached", "deberta_v2.torchscript", "resnet.torchscript", "t5_merged.cached")


def fuse(path: Path) -> onnx.ModelProto:
    """Fuse a file with the transformers optimizer."""
    kind = FUSED[path.stem]
    # Without the number of heads and the width, the optimizer finds them itself.
    done = optimize_model(str(path), kind, 0, 0, FusionOptions(kind), opt_level=0, only_onnxruntime=False).model
    shorten_rotary_tables(done)
    return done


def shorten_rotary_tables(model: onnx.ModelProto) -> None:
    """Cut the fused tables of angles, which have thousands of positions, to the positions of the zoo."""
    for tensor in model.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            table = onnx.numpy_helper.to_array(tensor)[: SIZINGS["distinct"]["positions"]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))


def extend(path: Path) -> onnx.ModelProto:
    """Fuse a file by a session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".extended.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def main() -> None:
    """Fuse the requested graphs, all by default."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    jobs = {f"{name.split('.')[0]}.fused": (name, fuse) for name in FUSED}
    jobs |= {f"{name.split('.')[0]}.extended": (name, extend) for name in EXTENDED}
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else list(jobs)
    for name in chosen:
        source, how = jobs[name]
        with tempfile.TemporaryDirectory() as folder:
            first, second = (how(zoo_store.write(Path(folder) / str(seed), [source], seed)[0]) for seed in (0, 1))
        refresh(name, zoo_store.strip_alike(first, second))


if __name__ == "__main__":
    main()
