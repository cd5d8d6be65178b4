"""Grown models that are wrong in one way each, in several types: what the gate must catch.

`python tests/mutations.py` runs all of them and writes the table of docs/mutations.md.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import build_model, normal, perceptron  # noqa: E402

from hyperclone_onnx import Strategy, analyse, expand, plan_expansion, rewrite, validate_files  # noqa: E402
from hyperclone_onnx.errors import HypercloneError  # noqa: E402
from hyperclone_onnx.plan.plans import METADATA_KEY  # noqa: E402
from hyperclone_onnx.validation import validating  # noqa: E402
from hyperclone_onnx.writing import onnx_files  # noqa: E402

Array = np.ndarray[Any, Any]

MODES = ("full", "no plan", "algebraic", "first layers")
"""How much of a validation is done. Without its plan only the outputs of a grown model can be compared."""

HIDDEN, FFN, VOCAB, HEADS, HEAD_DIM = 32, 48, 31, 4, 8


# -- models -----------------------------------------------------------------------------------------------


def attention(dtype: str = "float") -> onnx.ModelProto:
    """One layer of attention and one of feed-forward, with a tied embedding: there is a division to forget."""
    graph = f"""g (int64[batch, sequence] ids) => ({dtype}[batch, sequence, {VOCAB}] logits) {{
        h = Gather (embedding, ids)
        n = LayerNormalization (h, gain)
        q0 = MatMul (n, q)
        k0 = MatMul (n, k)
        v0 = MatMul (n, v)
        q1 = Reshape (q0, heads)
        k1 = Reshape (k0, heads)
        v1 = Reshape (v0, heads)
        q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
        k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
        v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
        s = MatMul (q2, k2)
        p = Softmax (s)
        c = MatMul (p, v2)
        c1 = Transpose <perm = [0, 2, 1, 3]> (c)
        c2 = Reshape (c1, flat)
        o0 = MatMul (c2, o)
        h1 = Add (h, o0)
        m = LayerNormalization (h1, gain)
        u = MatMul (m, up)
        r = Relu (u)
        d = MatMul (r, down)
        h2 = Add (h1, d)
        last = LayerNormalization (h2, gain)
        head = Transpose (embedding)
        logits = MatMul (last, head)
    }}"""
    square, width = (HIDDEN, HIDDEN), HEADS * HEAD_DIM
    assert width == HIDDEN
    weights: dict[str, Array] = normal(
        3,
        {
            "embedding": (VOCAB, HIDDEN),
            "gain": (HIDDEN,),
            "q": square,
            "k": square,
            "v": square,
            "o": square,
            "up": (HIDDEN, FFN),
            "down": (FFN, HIDDEN),
        },
    )
    kind = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    weights = {name: array.astype(kind) for name, array in weights.items()}
    weights["heads"] = np.array([0, 0, HEADS, HEAD_DIM])
    weights["flat"] = np.array([0, 0, HIDDEN])
    return build_model(graph, weights)


def quantised(path: Path) -> None:
    """Weights of 8 bits, and activations that are rounded to 8 bits while the model runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    onnx.save(perceptron(hidden=HIDDEN, ffn=FFN, tied=False), path)
    quantize_dynamic(path, path, weight_type=QuantType.QInt8)


def in_four_bits(path: Path) -> None:
    """Weights of 4 bits in blocks, each block with a scale."""
    rng = np.random.default_rng(5)
    model = build_model(
        """g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
            h = Gather (embedding, ids)
            n = LayerNormalization (h, gain)
            u = com.microsoft.MatMulNBits <K = 32, N = 64, bits = 4, block_size = 16> (n, up, up_scale)
            r = Relu (u)
            d = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 16> (r, down, down_scale)
            h1 = Add (h, d)
            m = LayerNormalization (h1, gain)
            logits = MatMul (m, head)
        }""",
        {
            **normal(5, {"embedding": (31, 32), "gain": (32,), "head": (32, 31)}),
            "up": rng.integers(0, 256, (64, 2, 8)).astype(np.uint8),
            "up_scale": rng.uniform(0.01, 0.1, 64 * 2).astype(np.float32),
            "down": rng.integers(0, 256, (32, 4, 8)).astype(np.uint8),
            "down_scale": rng.uniform(0.01, 0.1, 32 * 4).astype(np.float32),
        },
    )
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, path)


TYPES: dict[str, Callable[[Path], None]] = {
    "float32": lambda path: onnx.save(attention(), path),
    "float16": lambda path: onnx.save(attention("float16"), path),
    "bfloat16": lambda path: onnx.save(attention("bfloat16"), path),
    "int8": quantised,
    "int4": in_four_bits,
}


# -- what is made wrong -----------------------------------------------------------------------------------


class Impossible(Exception):
    """A model has nothing that can be made wrong so."""


FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def stored(model: onnx.ModelProto, name: str, rank: int = 0, floating: bool = False) -> onnx.TensorProto:
    """The largest of the stored tensors whose names begin so."""
    tensors = [
        tensor
        for tensor in model.graph.initializer
        if tensor.name.split(".")[0].split("_")[0] == name
        and len(tensor.dims) >= rank
        and (not floating or tensor.data_type in FLOATS)
    ]
    if not tensors:
        raise Impossible
    return max(tensors, key=lambda tensor: int(np.prod(tensor.dims, dtype=np.int64)))


def edit(model: onnx.ModelProto, tensor: onnx.TensorProto, change: Callable[[Array], Array]) -> None:
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array)).astype(array.dtype), tensor.name))


def a_percent(model: onnx.ModelProto) -> None:
    """The largest weight of a matrix, or the largest scale of its codes."""

    def change(array: Array) -> Array:
        wide = array.astype(np.float32)
        place = np.abs(wide).argmax()
        wide.flat[place] *= 1.01
        # In a coarse type a percent may be less than a step: then it is one step.
        if wide.flat[place].astype(array.dtype) == array.flat[place]:
            wide.flat[place] *= 1.01
        return wide

    edit(model, stored(model, "up", floating=True), change)


def swapped_rows(model: onnx.ModelProto) -> None:
    def change(array: Array) -> Array:
        array[[0, 1]] = array[[1, 0]]
        return array

    edit(model, stored(model, "down", rank=2), change)


def missing_division(model: onnx.ModelProto) -> None:
    """A scalar by which the grown model divides is left out."""
    scales = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".scale")}
    for node in model.graph.node:
        if scales.intersection(node.input):
            for reader in model.graph.node:
                reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
            model.graph.node.remove(node)
            return
    raise Impossible


def one_head(model: onnx.ModelProto) -> None:
    """What one head gives is larger by a percent."""

    def change(array: Array) -> Array:
        wide = array.astype(np.float32)
        wide[:HEAD_DIM] *= 1.01
        return wide

    edit(model, stored(model, "o", rank=2), change)


@dataclass(frozen=True)
class Mutation:
    """One way to be wrong: in the file, or already in the plan that it carries."""

    label: str
    change: Callable[[onnx.ModelProto], None] | None = None
    """Changes the grown file; None for a plan that lacks one of its edits."""


NOTHING = Mutation("nothing", lambda model: None)

MUTATIONS = (
    NOTHING,
    Mutation("a weight off by 1 %", a_percent),
    Mutation("two rows swapped", swapped_rows),
    Mutation("a missing division", missing_division),
    Mutation("one head's scale off by 1 %", one_head),
    Mutation("an edit missing from the plan"),
)


# -- is it caught? ----------------------------------------------------------------------------------------


def grow(source: Path, big: Path, strategy: str, forget: bool = False) -> None:
    """Grow a model; `forget` leaves the first edit out of the plan, as a wrong rule would."""
    if not forget:
        expand(source, big, 2, strategy=Strategy(strategy), check=False)  # type: ignore[arg-type]
        return
    analysis = analyse(source)
    plan = plan_expansion(analysis, 2, strategy=Strategy(strategy))  # type: ignore[arg-type]
    if not plan.edits:
        raise Impossible
    wrong = replace(plan, edits=plan.edits[1:])
    onnx_files.save(rewrite(analysis.model, wrong), big, external=False)


@contextmanager
def limited_memory(mode: str) -> Iterator[None]:
    """Without free memory, "auto" is the first layers."""
    free = validating.free_memory
    if mode == "first layers":
        validating.free_memory = lambda: 0  # type: ignore[assignment]
    try:
        yield
    finally:
        validating.free_memory = free


def verdict(source: Path, big: Path, mode: str) -> str:
    """What a validation says: "caught" where the models are not equal, "refused" where it cannot compare them."""
    with limited_memory(mode), tempfile.TemporaryDirectory() as folder:
        if mode == "no plan":
            model = onnx.load(big)
            kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
            del model.metadata_props[:]
            model.metadata_props.extend(kept)
            big = Path(folder) / "big.onnx"
            onnx.save(model, big)
        how: Any = {"no plan": "full", "first layers": "auto"}.get(mode, mode)
        try:
            return "passes" if validate_files(source, big, "cpu", mode=how).equal else "caught"
        except HypercloneError:
            return "refused"


def mutated(kind: str, mutation: Mutation, folder: Path, strategy: str = "noisy-diagonal") -> tuple[Path, Path]:
    """A source of some type, and a grown model that is wrong.

    Raises:
        Impossible: this type has nothing that can be made wrong so.
    """
    source, big = folder / f"{kind}.onnx", folder / "big.onnx"
    if not source.exists():
        TYPES[kind](source)
    try:
        grow(source, big, strategy, forget=mutation.change is None)
    except HypercloneError as problem:
        raise Impossible from problem
    if mutation.change is not None:
        model = onnx.load(big)
        mutation.change(model)
        onnx.save(model, big)
    return source, big


def table() -> dict[tuple[str, str], dict[str, str]]:
    """For each mutation and type what each mode says; empty where there is nothing to make wrong."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for mutation in MUTATIONS:
        for kind in TYPES:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    source, big = mutated(kind, mutation, Path(folder))
                except Impossible:
                    continue
                verdicts = {mode: verdict(source, big, mode) for mode in MODES}
            rows[mutation.label, kind] = verdicts
    return rows


def page(rows: dict[tuple[str, str], dict[str, str]]) -> str:
    """The text of docs/mutations.md."""
    lines = [f"| {label} | {kind} | {' | '.join(row[mode] for mode in MODES)} |" for (label, kind), row in rows.items()]
    return (
        "# Which mistakes validation notices\n\n"
        "Written by `python tests/mutations.py`. Each row is a small grown model that is wrong in one way. Each\n"
        "column is a way to validate it:\n\n"
        "* *full*: every tensor is checked, and every output is compared;\n"
        "* *no plan*: the grown file has lost its plan, so that only outputs are compared;\n"
        "* *algebraic*: every tensor and every node is checked, and nothing is run;\n"
        "* *first layers*: the same, and the first layers are run, as it is done where memory is short.\n\n"
        "*caught* means that the models are called different. *refused* means that the grown model does not run. In\n"
        "both cases nothing is published. *passes* means that this way does not notice the mistake. The rows with\n"
        "*nothing* wrong must pass.\n\n"
        "An algebraic validation compares the file with the plan, and the plan with one that is made anew. It cannot\n"
        "notice a mistake that planning itself makes each time. Only a run shows that. The first layers show it only\n"
        "where they come after it.\n\n"
        f"| wrong | type | {' | '.join(MODES)} |\n|---|---|{'---|' * len(MODES)}\n" + "\n".join(lines) + "\n"
    )


def cells(text: str) -> dict[tuple[str, str, str], str]:
    """The verdicts in a page, by mutation, type and mode."""
    result: dict[tuple[str, str, str], str] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if len(words) == 2 + len(MODES) and words[1] in TYPES:
            result.update({(words[0], words[1], mode): word for mode, word in zip(MODES, words[2:], strict=True)})
    return result


if __name__ == "__main__":
    (ROOT / "docs" / "mutations.md").write_text(page(table()), encoding="utf-8")
