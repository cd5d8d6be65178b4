"""The graphs that are changed: the zoo's, and beginnings of them, which are tried faster and so more often."""

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
"""Beginnings of each graph."""


def write_zoo(folder: Path) -> list[Path]:
    """The zoo's graphs with their parameters, written into a folder unless they are there."""
    found = sorted(folder.glob("*.onnx"))
    if not found:
        sys.path.insert(0, str(ROOT))
        from models import zoo_store

        found = sorted(zoo_store.write(folder, zoo_store.names()))
    return found


def write_beginnings(zoo: list[Path], folder: Path) -> list[Path]:
    """Beginnings of graphs, of 8 to 60 nodes, that run: what a node makes becomes the output."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("*.onnx"))
    if found:
        return found
    for path in zoo:
        for number, model in enumerate(_beginnings(path)):
            written = folder / f"{path.stem}.{number}.onnx"
            written.write_bytes(model.SerializeToString())
            try:
                ran = run_source(written, 0)
            except Unrun:
                written.unlink()
                continue
            if not any(np.isfinite(each).all() and each.dtype.kind == "f" for _, made in ran for each in made):
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
    """The part of a graph that the output of one node needs; None where that node has none."""
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
                if attribute.HasField("g"):  # what a body captures
                    needed.update(name for inner in attribute.g.node for name in inner.input)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.ClearField("node")
    made.graph.ClearField("initializer")
    made.graph.ClearField("output")
    made.graph.ClearField("input")
    made.graph.node.extend(reversed(nodes))
    made.graph.initializer.extend(each for each in graph.initializer if each.name in needed)
    made.graph.input.extend(each for each in graph.input if each.name in needed)
    known = next((each for each in graph.value_info if each.name == output), None)
    if known is None:
        known = onnx.ValueInfoProto(name=output)
        known.type.tensor_type.elem_type = TensorProto.FLOAT
    made.graph.output.append(known)
    return made
