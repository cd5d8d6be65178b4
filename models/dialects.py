"""Write a model of `build.py` in the dialects in which people have ONNX files.

    python models/dialects.py smollm2-135m -o out        every dialect, into out/smollm2-135m.NAME/model.onnx
    python models/dialects.py smollm2-135m int8,float16 -o out

Each is made by the tool that people make it with, from the float32 graph or the same weights, and is what that tool
leaves: nothing is tidied up afterwards.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.build import SOURCES, Source, default_cache, find_weights, quiet_exporter


@dataclass(frozen=True)
class Job:
    """One file to write: the float32 graph from which it is made, the weights of that graph, and the path to write."""

    source: Source
    plain: Path
    target: Path
    cache: Path

    @property
    def decodes(self) -> bool:
        return self.source.output == "logits"


@dataclass(frozen=True)
class Dialect:
    """One form of ONNX files: the tool that makes it, and a function that runs the tool."""

    made_by: str
    make: Callable[[Job], None]
    decoders_only: bool = False


# -- fused ------------------------------------------------------------------------------------------------


def torchscript(job: Job) -> tuple[int, int]:
    """Run PyTorch's older exporter. Return the number of heads, and the width."""
    import torch

    model, _ = job.source.load(find_weights(job.source, job.cache))
    options = {"use_cache": False} if job.decodes else {}

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            result = self.model(**dict(zip(job.source.inputs, tensors, strict=True)), **options)
            tensor: torch.Tensor = result[job.source.output]
            return tensor

    names = [*job.source.inputs, job.source.output]
    with quiet_exporter():
        torch.onnx.export(
            Positional().eval(),
            tuple(torch.ones((2, 9), dtype=torch.int64) for _ in job.source.inputs),
            str(job.target),
            dynamo=False,
            opset_version=17,
            input_names=list(job.source.inputs),
            output_names=[job.source.output],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
        )
    return model.config.num_attention_heads, model.config.hidden_size


def fused_torchscript(job: Job) -> None:
    """Run the transformers optimizer on a graph of the TorchScript exporter, for which it was written."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    kind = "gpt2" if job.decodes else "bert"
    with beside(job.target, "torchscript.onnx") as exported:
        heads, width = torchscript(Job(job.source, job.plain, exported, job.cache))
        done = optimize_model(str(exported), kind, heads, width, FusionOptions(kind), opt_level=0)
        done.save_model_to_file(str(job.target))


def fused(job: Job) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(ir.load(job.plain))
    ir.save(model, job.target, external_data=f"{job.target.name}.data" if job.decodes else None)


# -- quantised --------------------------------------------------------------------------------------------


def int8(job: Job) -> None:
    from onnxruntime.quantization import quantize_dynamic

    # ONNX does not infer the types of outputs of other domains' operators.
    quantize_dynamic(str(job.plain), str(job.target), extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})


def int8_fused(job: Job) -> None:
    """The graph as a session saves it: quantised operators are fused too (QAttention, DynamicQuantizeMatMul)."""
    import onnxruntime

    with beside(job.target, "fused.onnx") as graph, beside(job.target, "int8.onnx") as codes:
        fused_torchscript(Job(job.source, job.plain, graph, job.cache))
        int8(Job(job.source, graph, codes, job.cache))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(job.target)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(codes), options, providers=["CPUExecutionProvider"])


def int4(block_size: int, symmetric: bool, embedding: bool = False, qdq: bool = False) -> Callable[[Job], None]:
    def make(job: Job) -> None:
        from onnxruntime.quantization import QuantFormat
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(job.plain),
            block_size=block_size,
            is_symmetric=symmetric,
            quant_format=QuantFormat.QDQ if qdq else QuantFormat.QOperator,
            op_types_to_quantize=("MatMul", "Gather") if embedding else ("MatMul",),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        if embedding:
            # Only its tables of positions and of tokens: no other Gather is stored in four bits.
            stored = {tensor.name: len(tensor.dims) for tensor in quantizer.model.model.graph.initializer}
            quantizer.nodes_to_exclude |= {
                node.name
                for node in quantizer.model.model.graph.node
                if node.op_type == "Gather" and stored.get(node.input[0]) != 2
            }
        quantizer.process()
        quantizer.model.save_model_to_file(str(job.target), use_external_data_format=job.decodes)

    return make


# -- half precision ---------------------------------------------------------------------------------------


def float16(job: Job) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(job.plain)), job.target)


def bfloat16(job: Job) -> None:
    """Store weights in bfloat16 and compute in float32: ONNX Runtime does not multiply bfloat16 on a CPU."""
    model = ir.load(job.plain)
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2:
            continue
        stored = ir.tensor(
            tensor.numpy().astype(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16, name=value.name
        )
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.float32")
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        value.const_value, value.type = stored, ir.TensorType(ir.DataType.BFLOAT16)
        model.graph.insert_before(model.graph[0], cast)
    ir.save(model, job.target, external_data=f"{job.target.name}.data" if job.decodes else None)


# -- the generator's builder ------------------------------------------------------------------------------


def genai(precision: str) -> Callable[[Job], None]:
    def make(job: Job) -> None:
        with tempfile.TemporaryDirectory() as folder:
            unpacked = Path(folder) / "weights"
            save_pretrained(job, unpacked)
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"]
            where = ["-i", str(unpacked), "-o", str(job.target.parent), "-c", folder]
            subprocess.run([*builder, *where], check=True, capture_output=True)

    return make


def save_pretrained(job: Job, folder: Path) -> None:
    """Save the weights in the form of transformers, which itself cannot save a model that came from a GGUF file."""
    model, tokenizer = job.source.load(find_weights(job.source, job.cache))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


DIALECTS: Mapping[str, Dialect] = {
    "torchscript": Dialect("`torch.onnx.export(dynamo=False)`", torchscript),
    "torchscript-fused": Dialect("`onnxruntime.transformers.optimizer` on that", fused_torchscript),
    "fused": Dialect("`onnxscript.rewriter.ort_fusions.optimize_for_ort`", fused),
    "float16": Dialect("`onnxruntime.transformers.float16`", float16),
    "bfloat16": Dialect("weights cast to bfloat16, computed in float32", bfloat16),
    "int8": Dialect("`onnxruntime.quantization.quantize_dynamic`", int8),
    "int8-fused": Dialect("the same on `torchscript-fused`, as a session saves its optimised model", int8_fused),
    "int4": Dialect("`MatMulNBitsQuantizer`, as it comes: blocks of 128, asymmetric", int4(128, symmetric=False)),
    "int4-embedding": Dialect(
        "`MatMulNBitsQuantizer`, blocks of 32, symmetric, embeddings too", int4(32, symmetric=True, embedding=True)
    ),
    "int4-qdq": Dialect(
        "`MatMulNBitsQuantizer`, blocks of 32, asymmetric, `DequantizeLinear`", int4(32, symmetric=False, qdq=True)
    ),
    "genai-int4": Dialect("`onnxruntime_genai.models.builder -p int4`", genai("int4"), decoders_only=True),
    "genai": Dialect("`onnxruntime_genai.models.builder -p fp32`", genai("fp32"), decoders_only=True),
}
"""Every dialect, and what makes it."""


def dialects_of(source: Source) -> list[str]:
    """The dialects that a model can be written in."""
    return [name for name, dialect in DIALECTS.items() if source.output == "logits" or not dialect.decoders_only]


def write(name: str, dialect: str, plain: Path, folder: Path, cache: Path | None = None) -> Path:
    """Write one dialect of a model into a folder, which appears only when complete. Return the path of its graph."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local, so nothing is downloaded
    with quiet():
        DIALECTS[dialect].make(Job(SOURCES[name], plain, part / "model.onnx", cache or default_cache()))
    part.rename(folder)
    return folder / "model.onnx"


def operators(path: Path) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@contextmanager
def beside(target: Path, name: str) -> Iterator[Path]:
    """The path of an intermediate file, in a separate folder."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        yield Path(folder) / name


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the messages of the tools."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Write the requested dialects, all by default."""
    parser = argparse.ArgumentParser(description="Write a model of build.py in the dialects of ONNX.")
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("dialects", nargs="?", default="", help="comma-separated; " + ", ".join(DIALECTS))
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="holds NAME/model.onnx, gets the rest")
    args = parser.parse_args()
    for dialect in args.dialects.split(",") if args.dialects else dialects_of(SOURCES[args.name]):
        folder = args.output / f"{args.name}.{dialect}"
        if not folder.exists():
            path = write(args.name, dialect, args.output / args.name / "model.onnx", folder)
            print(f"{path}: {dict(operators(path).most_common())}")


if __name__ == "__main__":
    main()
