"""Compares plans, grown graphs, tensors and files with digests in `tests/goldens/`, so that none changes by accident.

    python tests/test_goldens.py --write

makes all digests again and prints what changed. It takes about two minutes. Name some of the files, as in
`--write tensors files`, to make these alone. Without `--write` nothing is written. Look at every change before you
commit it: people keep plans and grown files, and a changed digest means that theirs would come out differently.

There are four files, with one line for each entry:

- `plans.json` has the plans of every graph of the zoo. A plan is cut into its parts, and each part has a digest.
- `graphs.json` has the grown graphs, without their weights: nodes, stored tensors, inner values, interface.
- `tensors.json` has grown tensors, byte for byte, with a digest for each strategy.
- `files.json` has files that `expand` wrote, byte for byte, and what it reported.

The quick run makes one plan of most graphs, and a part of the grown graphs. It leaves out the `collide` graphs, which
are the `distinct` ones in other sizes. `make test-long` makes all plans and all graphs.

No test here imports anything but the public names of the package. Weights come from a counter and integer arithmetic,
so that they are the same with every release of numpy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import build_model, perceptron

from hyperclone_onnx import (
    Analysis,
    GrownTensor,
    HypercloneError,
    Plan,
    Recipe,
    SourceMap,
    Strategy,
    analyse,
    expand,
    plan_expansion,
    rewrite,
)
from models import zoo_store

Array = np.ndarray[Any, Any]
Entries = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "goldens"
STRATEGIES = ("symmetric", "diagonal", "noisy-symmetric", "noisy-diagonal")
FACTORS = (2, 3)
UNRECORDED = ("source", "output", "seconds", "sizes", "files")
"""The parts of a report that no golden holds: they differ from run to run, or follow from the other goldens."""


def digest(data: bytes | str) -> str:
    """Twelve hexadecimal digits: enough to notice a change."""
    return hashlib.sha256(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data).hexdigest()[:12]


def json_digest(data: Any) -> str:
    """A digest of plain data. The order of keys counts, because it is part of what is written."""
    return digest(json.dumps(data, separators=(",", ":")))


# -- the goldens ------------------------------------------------------------------------------------------


def read_goldens(kind: str) -> Entries:
    path = FOLDER / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_goldens(kind: str, entries: Entries) -> None:
    """Write the entries in order, one line for each."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(entries.items())]
    (FOLDER / f"{kind}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def differences(old: Entries, new: Entries) -> list[str]:
    """A line for each entry that is new, missing or changed. Of an entry with parts, it shows the changed parts."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            parts = [part for part in {**before, **after} if before.get(part) != after.get(part)]
            before, after = ({part: entry.get(part) for part in parts} for entry in (before, after))
        lines.append(f"{key}: {before} -> {after}")
    return lines


def assert_golden(kind: str, entries: Entries) -> None:
    """Compare entries with those of the file. Other entries of the file are not compared."""
    goldens = read_goldens(kind)
    changed = differences({key: goldens[key] for key in entries if key in goldens}, entries)
    text = "\n  ".join(changed)
    assert not changed, f"{kind}.json says otherwise; `python tests/test_goldens.py --write` rewrites it:\n  {text}"


# -- weights ----------------------------------------------------------------------------------------------


def words(key: str, count: int) -> Array:
    """Random 64-bit words: SplitMix64 over a counter. The key decides where the counter starts."""
    start = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    state = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def numbers(key: str, shape: Iterable[int]) -> Array:
    """Numbers in [-1, 1). They are multiples of 2 ** -23, and so exact in float32."""
    shape = tuple(shape)
    drawn = words(key, int(np.prod(shape, dtype=np.int64))) >> np.uint64(40)
    return (drawn.astype(np.float64) * 2.0**-23 - 1.0).reshape(shape)


def codes(key: str, shape: Iterable[int], bits: int, signed: bool = False) -> Array:
    """Whole numbers of `bits` bits."""
    shape = tuple(shape)
    drawn = words(key, int(np.prod(shape, dtype=np.int64))) >> np.uint64(64 - bits)
    return (drawn.astype(np.int64) - (2 ** (bits - 1) if signed else 0)).reshape(shape)


def fill(model: onnx.ModelProto, random: Mapping[str, tuple[float, float]]) -> onnx.ModelProto:
    """Set the weights of stored tensors, in place, from a mean and a standard deviation for each."""
    for tensor in model.graph.initializer:
        if tensor.name in random:
            mean, deviation = random[tensor.name]
            values = mean + 1.75 * deviation * numbers(tensor.name, tensor.dims)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(dtype), tensor.name))
    return model


def zoo_graph(name: str) -> onnx.ModelProto:
    model = onnx.load(zoo_store.path_of(name))
    return fill(model, zoo_store.distributions(model))


def small_graph(**options: Any) -> onnx.ModelProto:
    model = perceptron(**options)
    return fill(model, {tensor.name: (0.0, 0.25) for tensor in model.graph.initializer})


def quantised_graph() -> onnx.ModelProto:
    """Weights of 8 bits that are decoded before they are used, and weights of 4 bits in blocks with zero points."""
    model = build_model(
        """g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
            h = Gather (table, ids)
            n = LayerNormalization (h, gain)
            up = DequantizeLinear <axis = 1> (up_codes, up_scale, up_zero)
            u = MatMul (n, up)
            r = Relu (u)
            d = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 16> (r, down, down_scale, down_zero)
            a = Add (h, d)
            m = LayerNormalization (a, gain)
            logits = com.microsoft.MatMulNBits <K = 32, N = 31, bits = 4, block_size = 16> (m, head, head_scale)
        }""",
        {
            "table": numbers("table", (31, 32)).astype(np.float32),
            "gain": numbers("gain", (32,)).astype(np.float32),
            "up_codes": codes("up_codes", (32, 64), 8, signed=True).astype(np.int8),
            "up_scale": np.abs(numbers("up_scale", (64,))).astype(np.float32),
            "up_zero": codes("up_zero", (64,), 4, signed=True).astype(np.int8),
            "down": codes("down", (32, 4, 8), 8).astype(np.uint8),
            "down_scale": np.abs(numbers("down_scale", (32 * 4,))).astype(np.float32),
            "down_zero": codes("down_zero", (32 * 2,), 8).astype(np.uint8),
            "head": codes("head", (31, 2, 8), 8).astype(np.uint8),
            "head_scale": np.abs(numbers("head_scale", (31 * 2,))).astype(np.float32),
        },
    )
    model.opset_import.add(domain="com.microsoft", version=1)
    return model


def dynamic_graph() -> onnx.ModelProto:
    """Sums of whole numbers without a stored scale, so that growth divides the sums, and a Range as long as a width."""
    return build_model(
        """g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            e = Gather (table, ids)
            shape = Shape <start = 2> (e)
            width = Squeeze (shape)
            places = Range (zero, width, one)
            p = Cast <to = 1> (places)
            h = Add (e, p)
            hq, hs, hz = DynamicQuantizeLinear (h)
            u = MatMulInteger (hq, up, hz)
            f = Cast <to = 1> (u)
            s = Mul (f, hs)
            r = Relu (s)
            logits = MatMul (r, head)
        }""",
        {
            "table": numbers("table", (31, 12)).astype(np.float32),
            "up": codes("up", (12, 20), 8, signed=True).astype(np.int8),
            "head": numbers("head", (20, 31)).astype(np.float32),
        },
    )


# -- plans ------------------------------------------------------------------------------------------------


def made_plan(analysis: Analysis, factor: int, strategy: str, **options: Any) -> Plan | str:
    """A plan, or the type of the error that refuses it."""
    try:
        return plan_expansion(analysis, factor, strategy=Strategy(strategy), **options)
    except HypercloneError as problem:
        return type(problem).__name__


def plan_entry(plan: Plan | str) -> Entries:
    """A digest for each part of a plan. A part that is one number stays a number.

    Nothing in a plan depends on the place or the time. The strategy and the digest of the options are left out here:
    they are the same for every graph, and `request_entry` has them.
    """
    if isinstance(plan, str):
        return {"refused": plan}
    data = plan.to_json()
    del data["strategy"]
    data["source"] = {name: value for name, value in data["source"].items() if name != "options"}
    return {part: value if isinstance(value, int) else json_digest(value) for part, value in data.items()}


def request_entry(plan: Plan) -> Entries:
    """The parts of a plan that `plan_entry` leaves out, and the order of all parts."""
    data = plan.to_json()
    return {"strategy": data["strategy"], "options": data["source"]["options"], "order": " ".join(data)}


# A few graphs are grown in other ways too.
OTHER_WAYS: dict[str, Entries] = {
    "untie": {"untie": True},
    "keep_interface": {"keep_interface": True},
    "head_dim": {"requests": {"head_dim": 2, "heads": 1}},
}
GROWN_IN_OTHER_WAYS = ("albert.distinct", "gpt2.cached", "llama.fused", "t5_merged.cached", "whisper.distinct")


def plan_entries(name: str, analysis: Analysis, ways: Iterable[tuple[int, str]]) -> Entries:
    """The entries of some plans of one graph. A strategy must change only the part of the plan that names it."""
    entries: Entries = {}
    for factor, strategy in ways:
        plan = made_plan(analysis, factor, strategy)
        entry = plan_entry(plan)
        assert entries.setdefault(f"{name} x{factor}", entry) == entry, f"{strategy} changes the plan of {name}"
        if isinstance(plan, Plan):
            entries[f"request x{factor} {strategy}"] = request_entry(plan)
    if name in GROWN_IN_OTHER_WAYS:
        for way, options in OTHER_WAYS.items():
            plan = made_plan(analysis, 2, "noisy-diagonal", **options)
            entries[f"{name} x2 {way}"] = plan_entry(plan)
            if isinstance(plan, Plan):
                entries[f"request x2 {way}"] = request_entry(plan)
    return entries


def every_way() -> list[tuple[int, str]]:
    return [(factor, strategy) for factor in FACTORS for strategy in STRATEGIES]


def one_way(index: int) -> tuple[int, str]:
    """The factor and the strategy of the quick run for the graph with this number. Neighbours differ."""
    return FACTORS[index % 2], STRATEGIES[index // 2 % 4]


def quick_names() -> list[str]:
    """The graphs of which the quick run makes a plan. A `collide` graph has the nodes of the `distinct` one."""
    return [name for name in zoo_store.names() if not name.endswith(".collide") or name in QUICK_GRAPHS]


# -- grown graphs -----------------------------------------------------------------------------------------

QUICK_GRAPHS = frozenset(
    """
    albert.distinct bart_merged.cached bert.torchscript deberta.torchscript gpt2.distinct gpt2.fused
    gpt_oss_runtime.built jamba.built llama.fused llama_scatter.built mamba_loop.built modernbert.fused
    opt_350m.distinct phi3_runtime.built qwen3_moe.cached qwen3_next_runtime.built resnet.extended swin.torchscript
    t5_merged.cached vit.collide
    """.split()
)


def graph_entry(source: ir.Model, plan: Plan) -> Entries:
    """The grown graph without its weights: one digest for the nodes, one for the stored tensors, and so on.

    For tensors that growth adds (sizes, maps, divisors), the bytes count too.
    """
    model = rewrite(source, plan)
    kept = set(source.graph.initializers) | set(plan.tensors)
    nodes, stored, inner = hashlib.sha256(), [], []
    for node in model.graph.all_nodes():
        text = ir.serde.serialize_node(node).SerializeToString(deterministic=True)
        nodes.update(len(text).to_bytes(8, "little") + text)
        inner += [f"{value.name}: {value.type} {value.shape}" for value in node.outputs]
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        own = "" if name in kept else digest(tensor.tobytes())
        stored.append(f"{name} {tensor.name}: {tensor.dtype.name} {list(tensor.shape.numpy())} {value.shape} {own}")
    ends = [f"{value.name}: {value.type} {value.shape}" for value in (*model.graph.inputs, *model.graph.outputs)]
    heading = [model.ir_version, model.graph.name, sorted(model.opset_imports.items()), sorted(model.metadata_props)]
    return {
        "nodes": nodes.hexdigest()[:12],
        "stored": json_digest(stored),
        "inner": json_digest(inner),
        "interface": json_digest(ends),
        "heading": json_digest(heading),
    }


def graph_entries(name: str, analysis: Analysis, *, other_ways: bool = True) -> Entries:
    entries: Entries = {}
    ways = OTHER_WAYS if name in GROWN_IN_OTHER_WAYS and other_ways else {}
    for way, options in {"": {}, **ways}.items():
        plan = made_plan(analysis, 2, "noisy-diagonal", **options)
        if isinstance(plan, Plan):
            entries[f"{name} x2 {way}".strip()] = graph_entry(analysis.model, plan)
    return entries


# -- grown tensors ----------------------------------------------------------------------------------------

FLOATS = {
    "float32": ir.DataType.FLOAT,
    "float64": ir.DataType.DOUBLE,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
CODES = {
    "int8": (ir.DataType.INT8, 8, True),
    "uint8": (ir.DataType.UINT8, 8, False),
    "int4": (ir.DataType.INT4, 4, True),
    "uint4": (ir.DataType.UINT4, 4, False),
    "int32": (ir.DataType.INT32, 20, True),
}
# Axes as a plan writes them. "a", "b" and "c" are dimensions; a number is a part that keeps its size.
LAYOUTS: dict[str, list[list[Any]]] = {
    "plain": [["a"], ["b"]],
    "heads": [["a", 3], ["b"]],
    "product": [["b"], [{"product": ["a", "c"]}, 2]],
    "concat": [[{"concat": ["a", "c", 2, "c"]}], ["b"]],
    "cube": [[3], ["a"], ["b"]],
    "vector": [["a", "b"]],
}
SHARED: dict[str, tuple[tuple[int, int], ...]] = {
    "none": (),
    "rows": ((0, 0),),
    "columns": ((1, 0),),
    "both": ((0, 0), (1, 0)),
    "last": ((2, 0),),
}
SIZES = {
    "tiny": {"a": 5, "b": 6, "c": 2},
    "large": {"a": 200, "b": 300, "c": 1},  # several blocks in each of these
    "wide": {"a": 2, "b": 140_000, "c": 2},
    "many rows": {"a": 200, "b": 200, "c": 3},
}


def uneven(size: int, ordered: bool) -> SourceMap:
    """A map that repeats some indices more often than others."""
    index = [*range(size), *range(size // 2, -1, -1), *range(0, size, 3)]
    return SourceMap(size, index=tuple(sorted(index) if ordered else index))


MAPS: dict[str, Callable[[str, int], SourceMap]] = {
    "tile": lambda _, size: SourceMap(size, tile=2),
    "repeat": lambda _, size: SourceMap(size, repeat=2),
    "tile3": lambda _, size: SourceMap(size, tile=3),
    "mixed": lambda name, size: SourceMap(size, tile=2) if name == "a" else SourceMap(size, repeat=3),
    "uneven": lambda name, size: uneven(size, ordered=name == "b"),
}


class Rooms:
    """Working arrays for the pieces of a tensor. They begin with junk, so reading one too early changes the result."""

    def array(self, _: str, shape: Iterable[int], dtype: Any) -> Array:
        room = np.empty(tuple(shape), dtype)
        room.reshape(-1).view(np.uint8)[...] = 0xA5
        return room


def bytes_of_pieces(tensor: GrownTensor) -> bytes:
    """The bytes that the pieces of a tensor write into a file."""
    data = np.full(tensor.nbytes, 0x5A, np.uint8)
    rooms: Any = Rooms()
    for piece in tensor.pieces():
        for block, offsets in piece(rooms):
            raw = block.reshape(-1).view(np.uint8)
            for offset in offsets:
                data[offset : offset + raw.size] = raw
    return data.tobytes()


def tensor_digest(tensor: GrownTensor) -> str:
    """The digest of the stored bytes. They must be the same if made at once, in pieces, or as a slice.

    Slices are made under one strategy only, to save time.
    """
    data = tensor.as_lazy("w").tobytes()
    assert len(data) == tensor.nbytes
    assert bytes_of_pieces(tensor.fresh()) == data, "the pieces write other bytes than the whole tensor has"
    if tensor.strategy.name != STRATEGIES[-1]:
        return digest(data)
    whole = tensor.numpy()
    part = tuple(slice(size // 3, size - size // 4) for size in tensor.shape)
    assert tensor.fresh()[part].tobytes() == whole[part].tobytes(), "a slice differs from that part of the whole tensor"
    return digest(data)


def float_entry(
    dtype: str, size: str, layout: str, kind: str, shared: str, scale: float = 1.0, **options: Any
) -> tuple[str, Entries]:
    """A tensor of floating-point numbers under every strategy, or under one if all do the same."""
    axes = LAYOUTS[layout]
    maps = {name: MAPS[kind](name, length) for name, length in SIZES[size].items()}
    recipe = Recipe.from_json({"source": "layer.w", "axes": axes, "shared": SHARED[shared], "scale": scale})
    key = f"{dtype} {size} {layout} {kind} shared={shared} scale={scale}"
    values = numbers(f"{layout} {size}", recipe.source_shape(maps))
    values.reshape(-1)[::7] = 0.0
    source = ir.Tensor(values.astype(FLOATS[dtype].numpy()), dtype=FLOATS[dtype], name="layer.w")
    wide = options.pop("wide", None)
    names = STRATEGIES if shared != "none" else STRATEGIES[-1:]
    if wide or options:
        key += " " + " ".join(f"{name}={value}" for name, value in {**options, "wide": wide}.items())
    return key, {
        name: tensor_digest(
            GrownTensor(source, recipe, maps, Strategy(name, **options), ir.DataType.DOUBLE if wide else None)
        )
        for name in names
    }


def code_entry(dtype: str, size: str, layout: str, kind: str, scale: float = 1.0) -> tuple[str, str]:
    """A tensor of whole numbers: quantised weights are copied, biases in units of a scale are multiplied."""
    own, bits, signed = CODES[dtype]
    maps = {name: MAPS[kind](name, length) for name, length in SIZES[size].items()}
    recipe = Recipe.from_json({"source": "layer.w", "axes": LAYOUTS[layout], "scale": scale})
    values = codes(f"{layout} {size}", recipe.source_shape(maps), bits, signed)
    source = ir.Tensor(values.astype(own.numpy()), dtype=own, name="layer.w")
    entry = tensor_digest(GrownTensor(source, recipe, maps, Strategy()))
    return f"{dtype} {size} {layout} {kind} scale={scale}", entry


def packed_entry(bits: int, size: str, layout: str, kind: str) -> tuple[str, str]:
    """Numbers of a few bits, packed in bytes. Each row begins with a new byte."""
    maps = {name: MAPS[kind](name, length) for name, length in SIZES[size].items()}
    recipe = Recipe.from_json({"source": "layer.w", "axes": LAYOUTS[layout], "bits": bits})
    *rows, width = recipe.source_shape(maps)
    stored = (*rows, -(-width * bits // 8))
    source = ir.Tensor(codes(f"{layout} {size}", stored, 8).astype(np.uint8), name="layer.w")
    entry = tensor_digest(GrownTensor(source, recipe, maps, Strategy()))
    return f"packed{bits} {size} {layout} {kind}", entry


def shares_of(layout: str) -> list[str]:
    axes = len(LAYOUTS[layout])
    return [name for name, pairs in SHARED.items() if all(axis < axes for axis, _ in pairs)]


TINY_MAPS = {
    "plain": tuple(MAPS),
    "heads": ("mixed",),
    "product": ("repeat", "mixed"),
    "concat": ("uneven",),
    "cube": ("mixed",),
    "vector": ("tile3", "uneven"),
}


def tiny_float_entries() -> Iterator[tuple[str, Any]]:
    for layout, kinds in TINY_MAPS.items():
        for shared in shares_of(layout):
            for kind in kinds:
                yield float_entry("float32", "tiny", layout, kind, shared)
    for dtype in ("float64", "float16", "bfloat16"):
        for layout, kind in (("plain", "uneven"), ("product", "tile3"), ("concat", "mixed")):
            for shared in shares_of(layout):
                yield float_entry(dtype, "tiny", layout, kind, shared)


def other_float_entries() -> Iterator[tuple[str, Any]]:
    """Other scales, strengths of noise and seeds, and small types that are computed in double precision."""
    for dtype in FLOATS:
        for shared in ("none", "both"):
            yield float_entry(dtype, "tiny", "plain", "mixed", shared, 0.7071067811865476)
        yield float_entry(dtype, "tiny", "concat", "uneven", "columns", 0.5)
        yield float_entry(dtype, "tiny", "heads", "tile3", "rows", snr_db=25.0, seed=123_456_789_012)
        yield float_entry(dtype, "tiny", "concat", "mixed", "both", 0.25, wide=True)


def large_float_entries(dtype: str) -> Iterator[tuple[str, Any]]:
    yield float_entry(dtype, "large", "plain", "uneven", "none")
    yield float_entry(dtype, "large", "plain", "mixed", "both")
    yield float_entry(dtype, "large", "product", "tile", "columns")
    yield float_entry(dtype, "large", "concat", "mixed", "rows", 0.5)
    if dtype == "float32":
        yield float_entry(dtype, "large", "heads", "tile", "rows")
        yield float_entry(dtype, "large", "cube", "mixed", "last")
        yield float_entry(dtype, "wide", "plain", "tile", "columns")
        yield float_entry(dtype, "many rows", "plain", "repeat", "rows")
        yield float_entry(dtype, "many rows", "plain", "uneven", "none")


def code_entries() -> Iterator[tuple[str, Any]]:
    for dtype in CODES:
        for layout in LAYOUTS:
            for kind in ("tile", "mixed", "uneven"):
                yield code_entry(dtype, "tiny", layout, kind)
        for kind in ("repeat", "uneven"):
            yield code_entry(dtype, "large", "concat", kind)
        yield code_entry(dtype, "many rows", "plain", "mixed")
    yield code_entry("int32", "tiny", "plain", "mixed", 3.0)
    yield code_entry("int32", "large", "plain", "mixed", 2.0)
    for bits in (2, 4, 8):
        for layout in LAYOUTS:
            for kind in ("tile", "mixed", "uneven"):
                yield packed_entry(bits, "tiny", layout, kind)
        for kind in ("repeat", "uneven"):
            yield packed_entry(bits, "large", "concat", kind)


TENSORS: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
    "tiny": tiny_float_entries,
    "other": other_float_entries,
    "codes": code_entries,
    "float32": lambda: large_float_entries("float32"),
    "float64": lambda: large_float_entries("float64"),
    "float16": lambda: large_float_entries("float16"),
    "bfloat16": lambda: large_float_entries("bfloat16"),
}

# -- files ------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Callable[[], onnx.ModelProto], Entries]] = {
    "gpt2.distinct x2 in shards": (lambda: zoo_graph("gpt2.distinct"), {"max_shard_size": 40_000}),
    "gptj.fused x3 keep_interface": (lambda: zoo_graph("gptj.fused"), {"factor": 3, "keep_interface": True}),
    "bert.torchscript x2 diagonal": (lambda: zoo_graph("bert.torchscript"), {"strategy": Strategy("diagonal", seed=3)}),
    "small float16 x3": (
        lambda: small_graph(dtype="float16"),
        {"factor": 3, "strategy": Strategy("noisy-symmetric", 3.0, 9)},
    ),
    "small tied x2": (lambda: small_graph(tied=True), {}),
    "small tied x2 untie": (lambda: small_graph(tied=True), {"untie": True}),
    "small uneven": (
        small_graph,
        {"factor": 1, "maps": {"ffn.0": SourceMap(20, index=(*range(20), 3, 3, 7)), "ffn.1": SourceMap(20, repeat=2)}},
    ),
    "small external x2": (small_graph, {"strategy": Strategy("symmetric")}),
    "quantised x2": (quantised_graph, {}),
    "dynamic x3": (dynamic_graph, {"factor": 3}),
}


def file_entry(name: str, folder: Path) -> Entries:
    """The digests of the files that `expand` writes, by name, and of its report."""
    make, options = FILES[name]
    source, out = folder / "small.onnx", folder / "out" / "big.onnx"
    out.parent.mkdir()
    onnx.save(make(), source, save_as_external_data="external" in name, location="small.data", size_threshold=0)
    result = expand(source, out, **{"factor": 2, "check": False, "workers": 1, **options})
    report = {part: value for part, value in result.to_json().items() if part not in UNRECORDED}
    files = {path.name: digest(path.read_bytes()) for path in sorted(out.parent.iterdir())}
    return {"report": json_digest(report), **files}


# -- tests ------------------------------------------------------------------------------------------------


def analysis_of(name: str, folder: Path) -> Analysis:
    path = folder / f"{name}.onnx"
    onnx.save(zoo_graph(name), path)
    return analyse(path)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        pytest.param(index, name, marks=[] if name in QUICK_GRAPHS or index // 8 % 2 else pytest.mark.slow)
        for index, name in enumerate(quick_names())
    ],
)
def test_plans(index: int, name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name, tmp_path)
    assert_golden("plans", plan_entries(name, analysis, [one_way(index)]))
    if name in QUICK_GRAPHS:
        assert_golden("graphs", graph_entries(name, analysis, other_ways=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_store.names())
def test_every_plan_and_graph(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name, tmp_path)
    assert_golden("plans", plan_entries(name, analysis, every_way()))
    assert_golden("graphs", graph_entries(name, analysis))


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(kind: str) -> None:
    assert_golden("tensors", dict(TENSORS[kind]()))


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    assert_golden("files", {name: file_entry(name, tmp_path)})


def test_goldens_have_no_entries_of_things_that_are_gone() -> None:
    """Each entry belongs to a graph or file of these tests, and the lines are in order."""
    graphs = {key.split(" ")[0] for kind in ("plans", "graphs") for key in read_goldens(kind)}
    assert graphs == {*zoo_store.names(), "request"}
    assert read_goldens("files").keys() == FILES.keys()
    for kind in KINDS:
        assert list(read_goldens(kind)) == sorted(read_goldens(kind))


# -- writing ----------------------------------------------------------------------------------------------

KINDS = ("plans", "graphs", "tensors", "files")


def all_goldens(kinds: Iterable[str], folder: Path) -> dict[str, Entries]:
    """Make all entries of these files."""
    goldens: dict[str, Entries] = {kind: {} for kind in kinds}
    for name in zoo_store.names() if goldens.keys() & {"plans", "graphs"} else ():
        analysis = analysis_of(name, folder)
        if "plans" in goldens:
            goldens["plans"] |= plan_entries(name, analysis, every_way())
        if "graphs" in goldens:
            goldens["graphs"] |= graph_entries(name, analysis)
    if "tensors" in goldens:
        for entries in TENSORS.values():
            goldens["tensors"] |= dict(entries())
    if "files" in goldens:
        for number, name in enumerate(FILES):
            own = folder / str(number)
            own.mkdir()
            goldens["files"][name] = file_entry(name, own)
    return goldens


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the goldens again and say what changed.")
    parser.add_argument("kinds", nargs="*", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--write", action="store_true", help="write the files too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        goldens = all_goldens(options.kinds, Path(folder))
    for kind, entries in goldens.items():
        changed = differences(read_goldens(kind), entries)
        print(f"{kind}.json: {len(entries)} entries, {len(changed)} changed")
        for line in changed:
            print(f"  {line}")
        if options.write:
            FOLDER.mkdir(exist_ok=True)
            write_goldens(kind, entries)


if __name__ == "__main__":
    main()
