"""Small random transformers of many families, exported to ONNX and committed without their parameters.

    python models/zoo.py                     export every family afresh, say what changed, rewrite models/zoo/
    python models/zoo.py --check             only say what changed; exits with 1 if anything did
    python models/zoo.py --only gpt2,llama   those families alone

Each family comes in two sizings. In `distinct` the sizes differ from one another, so that no mix-up goes
unseen; in `collide` hidden, feed-forward, vocabulary and positions are all 96 where the family allows, so
that nothing can be told by its size.
Needs torch and transformers. Models are built from configurations alone: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions

# Run as a script, a module finds its own folder alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo_store
from models.zoo_store import Distribution

SIZINGS: dict[str, dict[str, int]] = {
    "distinct": {"hidden": 48, "heads": 6, "ffn": 56, "vocab": 101, "positions": 44, "layers": 2},
    "collide": {"hidden": 96, "heads": 8, "ffn": 96, "vocab": 96, "positions": 96, "layers": 2},
}

FIELDS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
}
"""What configurations call each size; a family whose configuration has none of the names has no such size."""

COMMON: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Family:
    """One row: the model's class in transformers, its settings, and what it is fed.

    Settings are named as in `FIELDS` or as in the model's own configuration.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    distinct: Mapping[str, Any] = field(default_factory=dict)
    collide: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = TOKENS
    output: str = "logits"
    arguments: Mapping[str, Any] = field(default_factory=dict)


Part = dict[str, Any]
GROUPED: Part = {"kv_heads": 2}
# Heads wider than hidden / heads, and in `collide` key/value heads as wide together as hidden.
OWN_HEAD: Part = {"settings": GROUPED, "distinct": {"head_dim": 10}, "collide": {"head_dim": 48}}
SLIDING: Part = {
    "settings": GROUPED | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "distinct": {"head_dim": 10, "query_pre_attn_scalar": 10},
    "collide": {"head_dim": 48, "query_pre_attn_scalar": 48},
}
# A quarter of a head is rotated, and that quarter must still halve.
QUARTER_ROTARY: Part = {"distinct": {"heads": 3}, "collide": {"heads": 6}}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel"),
    # OPT's table of positions has two rows more than its configuration says.
    "opt": Family("OPTForCausalLM", {"pad_token_id": 1}, collide={"positions": 94}),
    "opt_350m": Family(
        "OPTForCausalLM",
        {"pad_token_id": 1, "do_layer_norm_before": False},
        distinct={"word_embed_proj_dim": 32},
        collide={"word_embed_proj_dim": 48, "positions": 94},
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", **QUARTER_ROTARY),
    "llama": Family("LlamaForCausalLM", GROUPED),
    "llama_mha": Family("LlamaForCausalLM"),
    "olmo": Family("OlmoForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM", GROUPED),
    "gemma": Family("GemmaForCausalLM", **OWN_HEAD),
    "gemma2": Family("Gemma2ForCausalLM", **SLIDING),
    "gemma3": Family("Gemma3ForCausalLM", **SLIDING),
    "qwen2": Family("Qwen2ForCausalLM", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", **OWN_HEAD),
    "phi": Family("PhiForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", GROUPED),
    "bloom": Family("BloomForCausalLM"),
    "falcon_mq": Family("FalconForCausalLM", {"multi_query": True, "parallel_attn": True, "kv_heads": 1}),
    "falcon_new": Family("FalconForCausalLM", {"new_decoder_architecture": True, "kv_heads": 2}),
    "mpt": Family("MptForCausalLM"),
    "gptj": Family("GPTJForCausalLM", {"rotary_dim": 4}),
    "stablelm": Family("StableLmForCausalLM", {"use_qkv_bias": True}, **QUARTER_ROTARY),
    "starcoder2": Family("Starcoder2ForCausalLM", GROUPED),
    "cohere": Family("CohereForCausalLM", GROUPED | {"logit_scale": 0.25}),
    "granite": Family(
        "GraniteForCausalLM",
        GROUPED
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "bert": Family(
        "BertModel",
        inputs=(*TOKENS, "token_type_ids"),
        output="last_hidden_state",
        arguments={"add_pooling_layer": False},
    ),
    "roberta": Family("RobertaForMaskedLM", {"pad_token_id": 1}),
    "distilbert": Family("DistilBertForMaskedLM"),
    # ALBERT projects embeddings even where they are as wide as hidden; ELECTRA would leave that out.
    "albert": Family("AlbertForMaskedLM", distinct={"embedding_size": 32}, collide={"embedding_size": 96}),
    "electra": Family(
        "ElectraModel",
        distinct={"embedding_size": 32},
        collide={"embedding_size": 48},
        output="last_hidden_state",
    ),
    # Positions are the patches and a class token: 4 * 4 + 1, and 5 * 19 + 1 to make 96.
    "vit": Family(
        "ViTForImageClassification",
        distinct={"heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 11},
        collide={"image_size": (20, 76), "patch_size": 4, "num_labels": 96},
        inputs=("pixel_values",),
    ),
}


def build(family: str, sizing: str) -> tuple[transformers.PreTrainedModel, dict[str, Distribution]]:
    """The family's model at that sizing, in evaluation mode, and the distribution of each parameter.

    It is the same at each call.
    """
    row = FAMILIES[family]
    model_class = getattr(transformers, row.model)
    fields = model_class.config_class().to_dict().keys()
    settings = {key: value for key, value in COMMON.items() if key in fields}
    settings |= {key: 0.0 for key in fields if key.endswith(("dropout", "pdrop", "dropout_prob"))}
    chosen: dict[str, Any] = {**SIZINGS[sizing], **row.settings, **getattr(row, sizing)}
    chosen.setdefault("kv_heads", chosen["heads"])
    for name, value in chosen.items():
        if name in FIELDS:
            settings |= {key: value for key in FIELDS[name] if key in fields}
        else:
            settings[name] = value
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings), **row.arguments).eval()
    distributions = parameter_distributions(model)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, *distributions[name])
    return model, distributions


def parameter_distributions(model: torch.nn.Module) -> dict[str, Distribution]:
    """The distribution for each parameter of a freshly built model, such that outputs are of order one.

    A tied parameter stands under each of its names, with the distribution of the first.
    """
    found: dict[str, Distribution] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = model.get_submodule(name.rpartition(".")[0])
        if first.setdefault(id(parameter), name) != name:
            mean, std = found[first[id(parameter)]]
        elif parameter.ndim == 1:
            # Gains start at one, or at zero where the model adds the one itself; biases start at zero.
            mean, std = abs(float(parameter.mean().round())), 0.2
        elif isinstance(module, torch.nn.Embedding) or name.endswith(("_embeddings", "_token")):
            mean, std = 0.0, 0.5
        else:
            transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
            mean, std = 0.0, 1 / math.sqrt(parameter.shape[0] if transposed else parameter[0].numel())
        found[name] = (mean, float(f"{std:.3g}"))
    return found


def example(name: str, config: transformers.PretrainedConfig) -> torch.Tensor:
    """A small input of that name, to trace with."""
    if name == "pixel_values":
        height, width = np.broadcast_to(config.image_size, 2).tolist()
        return torch.randn(2, config.num_channels, height, width)
    if name == "input_ids":
        return torch.randint(3, 95, (2, 6))
    return (torch.ones if name == "attention_mask" else torch.zeros)((2, 6), dtype=torch.int64)


def export(family: str, sizing: str) -> onnx.ModelProto:
    """The family's model at that sizing as a stripped graph."""
    row = FAMILIES[family]
    model, known = build(family, sizing)
    examples = {name: example(name, model.config) for name in row.inputs}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    program = torch.onnx.export(
        model,
        (),
        kwargs=examples,
        dynamo=True,
        dynamic_shapes={
            name: {0: batch} if value.ndim > 2 else {0: batch, 1: sequence} for name, value in examples.items()
        },
        output_names=[row.output],
        optimize=False,
        verbose=False,
    )
    assert program is not None
    InlinePass()(program.model)
    derived = folded(program.model.graph, known)
    # The exporter's own optimisation, but with the limit on folding as far below these matrices as the
    # default is below real ones: otherwise a tied or reused weight falls apart into copies here alone.
    optimize_ir(program.model, input_size_limit=128)
    onnx_fusions.fuse(program.model)
    proto = ir.to_proto(program.model)
    random = {}
    for tensor in proto.graph.initializer:
        if tensor.name in known:
            random[tensor.name] = known[tensor.name]
        elif tensor.name in derived:
            values = onnx.numpy_helper.to_array(tensor)
            random[tensor.name] = (abs(float(values.mean().round())), float(f"{values.std():.2g}"))
    return zoo_store.strip(proto, random)


def folded(graph: ir.Graph, parameters: Iterable[str]) -> set[str]:
    """The values computed from parameters and constants alone: folded, they are parameters still."""
    found = set(parameters)
    constant = set(graph.initializers) | found
    for node in graph:
        names = {value.name for value in node.inputs if value is not None}
        outputs = {value.name for value in node.outputs if value.name is not None}
        if names <= constant and node.op_type not in ("Shape", "Size"):
            constant |= outputs
            if names & found:
                found |= outputs
    return found


def changes(old: onnx.ModelProto, new: onnx.ModelProto) -> list[str]:
    """What differs between two stripped graphs, a line each."""
    before, after = features(old), features(new)
    lines = [
        f"{what}: {before[what]} -> {after[what]}" for what in sorted(before | after) if before[what] != after[what]
    ]
    if not lines and old != new:
        lines.append("the same nodes, initializers and interface by count; order, names, attributes or values differ")
    return lines


def features(model: onnx.ModelProto) -> Counter[str]:
    """How often the graph has each operator, opset, initializer and interface value.

    Initializers the exporter only numbered are counted by their shapes: those numbers shift at every change.
    """
    random = zoo_store.distributions(model)
    found = Counter(f"node {node.op_type}" for node in model.graph.node)
    found.update(f"opset {opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
    for tensor in model.graph.initializer:
        name = tensor.name if "." in tensor.name else "(unnamed)"
        kind = "random" if tensor.name in random else "constant"
        found[f"initializer {name} {_shaped(tensor.data_type, tensor.dims)} {kind}"] += 1
    for role, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            of = value.type.tensor_type
            shape = [dim.dim_param or dim.dim_value for dim in of.shape.dim]
            found[f"{role} {value.name} {_shaped(of.elem_type, shape)}"] += 1
    return found


def _shaped(dtype: int, shape: Iterable[int | str]) -> str:
    return f"{onnx.TensorProto.DataType.Name(dtype)}[{', '.join(map(str, shape))}]"


def refresh(name: str, check: bool) -> bool:
    """Export that graph afresh, print how it differs from the committed one, replace it unless only checking.

    Returns whether it differs.
    """
    path = zoo_store.path_of(name)
    new = export(*name.split("."))
    data = new.SerializeToString(deterministic=True)
    lines = changes(onnx.load(path), new) if path.exists() else ["new"]
    print("\n    ".join([f"{name}: {len(data) / 1024:.0f} KB", *(lines or ["unchanged"])]), flush=True)
    if lines and not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return bool(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export the zoo afresh and say what changed.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything changed")
    parser.add_argument("--only", metavar="FAMILY,...", help="these families alone")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(FAMILIES)
    unknown = [family for family in wanted if family not in FAMILIES]
    if unknown:
        parser.error(f"no such family: {', '.join(unknown)}; the zoo has {', '.join(FAMILIES)}")
    quiet()
    changed, failed = [], []
    for name in (f"{family}.{sizing}" for family in wanted for sizing in SIZINGS):
        try:
            changed += [name] * refresh(name, options.check)
        except Exception as error:
            failed.append(name)
            print(f"{name}: FAILED\n    {type(error).__name__}: {error}", flush=True)
    stray = [] if options.only else [name for name in zoo_store.names() if name.split(".")[0] not in FAMILIES]
    print(f"{len(changed)} changed, {len(failed)} failed, {len(stray)} committed without a row", *stray)
    return 1 if failed or stray or (options.check and changed) else 0


def quiet() -> None:
    """Silence what the exporters say on the way: the report is all that matters here."""
    warnings.filterwarnings("ignore")
    for logger in ("torch", "transformers", "onnxscript", "onnx_ir"):
        logging.getLogger(logger).setLevel(logging.ERROR)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Some models (gemma3) walk sets of strings, so that the order of their nodes follows the hash seed.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
