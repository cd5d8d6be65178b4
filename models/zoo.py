"""Small random transformers of many families, exported to ONNX and committed without their parameters.

    python models/zoo.py                     export every family afresh, say what changed, rewrite models/zoo/
    python models/zoo.py --check             only say what changed; exits with 1 if anything did
    python models/zoo.py --only gpt2,llama   those families alone

A graph is called `family.variant`. This script makes the variants `distinct` and `collide`, which are the two
sizings of zoo_families.py; zoo_optimum.py makes `cached` and `torchscript`, zoo_built.py `built`, and
zoo_fused.py `fused` and `extended`.
Needs torch and transformers. Models are built from configurations alone: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
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

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo_store
from models.zoo_changes import refresh
from models.zoo_families import COMMON, FAMILIES, FIELDS, SIZINGS
from models.zoo_store import Distribution


def build(family: str, sizing: str, seed: int = 0) -> tuple[transformers.PreTrainedModel, dict[str, Distribution]]:
    """The family's model at that sizing, in evaluation mode, and the distribution of each parameter.

    It is the same at each call with the same seed.
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
            # The sizes of some families follow from others and cannot be set.
            if value is not None:
                settings |= {key: value for key in FIELDS[name] if key in fields}
        else:
            settings[name] = value
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings), **row.arguments).eval()
    distributions = parameter_distributions(model)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, *distributions[name])
    return model, distributions


def parameter_distributions(model: torch.nn.Module) -> dict[str, Distribution]:
    """The distribution for each parameter of a freshly built model, such that outputs are of order one.

    A tied parameter stands under each of its names, with the distribution of the first.
    """
    distributions: dict[str, Distribution] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = model.get_submodule(name.rpartition(".")[0])
        if first.setdefault(id(parameter), name) != name:
            mean, std = distributions[first[id(parameter)]]
        elif parameter.ndim == 1:
            # Gains start at one, or at zero where the model adds the one itself; biases start at zero.
            mean, std = abs(float(parameter.mean().round())), 0.2
        elif isinstance(module, torch.nn.Embedding) or name.endswith(("_embeddings", "_token")):
            mean, std = 0.0, 0.5
        else:
            transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
            mean, std = 0.0, 1 / math.sqrt(parameter.shape[0] if transposed else parameter[0].numel())
        distributions[name] = (mean, float(f"{std:.3g}"))
    return distributions


def example(name: str, config: transformers.PretrainedConfig) -> torch.Tensor:
    """A small input of that name, to trace with."""
    if name == "pixel_values":
        height, width = np.broadcast_to(getattr(config, "image_size", 32), 2).tolist()
        return torch.randn(2, config.num_channels, height, width)
    if name == "input_features":
        return torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    if name.endswith("input_ids"):
        return torch.randint(3, 95, (2, 6 if name == "input_ids" else 5))
    return (torch.ones if name == "attention_mask" else torch.zeros)((2, 6), dtype=torch.int64)


def export(family: str, sizing: str) -> onnx.ModelProto:
    """The family's model at that sizing as a stripped graph."""
    model, known = build(family, sizing)
    graph_model = traced(family, model)
    derived = folded(graph_model.graph, known)
    proto = ir.to_proto(optimised(graph_model))
    random = {}
    for tensor in proto.graph.initializer:
        if tensor.name in known:
            random[tensor.name] = known[tensor.name]
        elif tensor.name in derived:
            values = onnx.numpy_helper.to_array(tensor)
            random[tensor.name] = (abs(float(values.mean().round())), float(f"{values.std():.2g}"))
    return zoo_store.strip(proto, random)


def traced(family: str, model: transformers.PreTrainedModel) -> ir.Model:
    """The family's model as the exporter first writes it, functions inlined."""
    row = FAMILIES[family]
    examples = {name: example(name, model.config) for name in row.inputs}
    batch, sequence, target = (torch.export.Dim(name) for name in ("batch", "sequence", "target"))
    program = torch.onnx.export(
        model,
        (),
        kwargs=examples,
        dynamo=True,
        dynamic_shapes={
            name: {0: batch} if value.ndim > 2 else {0: batch, 1: target if name.startswith("decoder") else sequence}
            for name, value in examples.items()
        },
        output_names=[row.output],
        optimize=False,
        verbose=False,
    )
    assert program is not None
    InlinePass()(program.model)
    return program.model


def optimised(model: ir.Model) -> ir.Model:
    """The exporter's own optimisation, in place.

    The limit on folding is as far below these matrices as the default is below real ones: otherwise a tied or reused
    weight falls apart into copies here alone.
    """
    optimize_ir(model, input_size_limit=128)
    onnx_fusions.fuse(model)
    return model


def folded(graph: ir.Graph, parameters: Iterable[str]) -> set[str]:
    """The values that are computed from parameters and constants only. Folding makes parameters of them."""
    computed = set(parameters)
    constant = set(graph.initializers) | computed
    for node in graph:
        names = {value.name for value in node.inputs if value is not None}
        outputs = {value.name for value in node.outputs if value.name is not None}
        if names <= constant and node.op_type not in ("Shape", "Size"):
            constant |= outputs
            if names & computed:
                computed |= outputs
    return computed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export the zoo afresh and say what changed.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything changed")
    parser.add_argument("--only", metavar="FAMILY,...", help="these families alone")
    options = parser.parse_args(arguments)
    known = [family for family, row in FAMILIES.items() if row.sizings]
    chosen = options.only.split(",") if options.only else known
    unknown = [family for family in chosen if family not in known]
    if unknown:
        parser.error(f"no such family: {', '.join(unknown)}; those exported here are {', '.join(known)}")
    quiet()
    changed, failed = [], []
    names = [f"{family}.{sizing}" for family in chosen for sizing in FAMILIES[family].sizings]
    for name in names:
        try:
            changed += [name] * refresh(name, export(*name.split(".")), options.check)
        except Exception as error:
            failed.append(name)
            print(f"{name}: FAILED\n    {type(error).__name__}: {error}", flush=True)
    stray = [
        name for name in zoo_store.names() if not options.only and name.split(".")[1] in SIZINGS and name not in names
    ]
    print(f"{len(changed)} changed, {len(failed)} failed, {len(stray)} committed without a row", *stray)
    return 1 if failed or stray or (options.check and changed) else 0


def quiet() -> None:
    """Hide the messages of the exporters, so that only the report is printed."""
    warnings.filterwarnings("ignore")
    for logger in ("torch", "transformers", "onnxscript", "onnx_ir"):
        logging.getLogger(logger).setLevel(logging.ERROR)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Some models (gemma3) walk sets of strings, so that the order of their nodes follows the hash seed.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
