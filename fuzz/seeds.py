"""The graphs that the fuzzers change: those of the zoo, and their beginnings, which run faster and so more often."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from fuzz.oracle import Unrun, run_source

ROOT = Path(__file__).resolve().parent.parent
CUTS = 4
"""The number of beginnings of a graph."""


def write_zoo(folder: Path) -> list[Path]:
    """The files of the zoo's graphs with their parameters. They are written into the folder if it has none."""
    files = sorted(folder.glob("*.onnx"))
    if not files:
        sys.path.insert(0, str(ROOT))
        from models import zoo_store

        files = sorted(zoo_store.write(folder, zoo_store.names()))
    return files


def write_beginnings(zoo: list[Path], folder: Path) -> list[Path]:
    """The files of beginnings that run, with 8 to 60 nodes. They are written into the folder if it has none.

    The output of a beginning is a value inside the graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*.onnx"))
    if files:
        return files
    for path in zoo:
        for number, model in enumerate(_beginnings(path)):
            written = folder / f"{path.stem}.{number}.onnx"
            written.write_bytes(model.SerializeToString())
            try:
                ran = run_source(written, 0)
            except Unrun:
                written.unlink()
                continue
            results = [output for _, outputs in ran for output in outputs]
            if not any(np.isfinite(output).all() and output.dtype.kind == "f" for output in results):
                written.unlink()
    return sorted(folder.glob("*.onnx"))


def _beginnings(path: Path) -> Iterator[onnx.ModelProto]:
    rng = np.random.default_rng(list(path.stem.encode()))
    model = onnx.load(path)
    weighted = [i for i, node in enumerate(model.graph.node) if node.op_type in ("MatMul", "Gemm", "Conv", "Softmax")]
    for _ in range(CUTS):
        last = int(rng.choice(weighted[: 1 + len(weighted) // 2])) if weighted else int(rng.integers(8, 40))
        cut = beginning(model, last + int(rng.integers(0, 6)))
        if cut is not None and 8 <= len(cut.graph.node) <= 60:
            yield cut


def beginning(model: onnx.ModelProto, last: int) -> onnx.ModelProto | None:
    """The part of a graph that computes the output of its node number `last`; None if there is no such output."""
    graph = model.graph
    if last >= len(graph.node) or not graph.node[last].output:
        return None
    output = graph.node[last].output[0]
    needed, nodes = {output}, []
    for node in reversed(graph.node[: last + 1]):
        if needed & set(node.output):
            nodes.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):  # a body may read values of the graph around it
                    needed.update(name for inner in attribute.g.node for name in inner.input)
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    cut.graph.ClearField("node")
    cut.graph.ClearField("initializer")
    cut.graph.ClearField("output")
    cut.graph.ClearField("input")
    cut.graph.node.extend(reversed(nodes))
    cut.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    cut.graph.input.extend(value for value in graph.input if value.name in needed)
    declared = next((value for value in graph.value_info if value.name == output), None)
    if declared is None:
        declared = onnx.ValueInfoProto(name=output)
        declared.type.tensor_type.elem_type = TensorProto.FLOAT
    cut.graph.output.append(declared)
    return cut
