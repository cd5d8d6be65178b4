"""Written files are the same for any number of workers, need bounded memory, and have the specified layout."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import names_in, perceptron
from onnx import numpy_helper

from hyperclone_onnx import CannotWrite, GrownTensor, Recipe, SourceMap, Strategy, expand
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Kept, Named
from hyperclone_onnx.plan.strategies import STRATEGIES, StrategyName
from hyperclone_onnx.system.positioned import write_at
from hyperclone_onnx.tensors import table as grown_table
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.writing import streaming
from hyperclone_onnx.writing.onnx_files import data_files, save

Array = np.ndarray[Any, Any]


def exact(count: int) -> Array:
    """Numbers between -1/2 and 1/2 that do not depend on the version of a library."""
    return (np.arange(1, count + 1, dtype=np.int64) * 2654435761 % 65521 / 65536 - 0.5).astype(np.float32)


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    """A small model that is the same on every machine."""
    model = perceptron()
    for tensor in model.graph.initializer:
        shape = tuple(tensor.dims)
        tensor.CopyFrom(numpy_helper.from_array(exact(int(np.prod(shape))).reshape(shape), tensor.name))
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    return path


# -- determinism ------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[str, str]] = {
    "symmetric": ("22c8d1891604eb68", "0c40ba1dce974569"),
    "diagonal": ("c468ae166d8f42f2", "dd31e7e34a0a1c93"),
    "noisy-symmetric": ("e2c26cd5f084d094", "3af0213a2ace9827"),
    "noisy-diagonal": ("02f79eea3efbe286", "1f5bbbee0212dc00"),
}
"""Digests of the plan, and of the tensors."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_and_tensors_have_not_changed(strategy: StrategyName, fixed: Path, tmp_path: Path) -> None:
    """If these digests change, the result of a command changes: the change log must say so."""
    result = expand(fixed, tmp_path / "big.onnx", 3, strategy=Strategy(strategy, seed=5), check=False)
    digest = hashlib.sha256()
    for tensor in sorted(onnx.load(tmp_path / "big.onnx").graph.initializer, key=lambda tensor: tensor.name):
        digest.update(tensor.name.encode() + numpy_helper.to_array(tensor).tobytes())
    plan = hashlib.sha256(result.plan.dumps().encode()).hexdigest()
    assert (plan[:16], digest.hexdigest()[:16]) == GOLDEN[strategy]


@pytest.mark.parametrize("shards", [None, 1500])
@pytest.mark.parametrize("strategy", ["noisy-symmetric", "diagonal"])
def test_the_number_of_workers_does_not_show(
    strategy: StrategyName, shards: int | None, fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grown_table, "BLOCK", 64)
    written = []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        folder.mkdir()
        expand(
            fixed,
            folder / "big.onnx",
            2,
            strategy=Strategy(strategy),
            workers=workers,
            max_shard_size=shards,
            check="algebraic",
        )
        written.append({name: (folder / name).read_bytes() for name in names_in(folder)})
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == 1 if shards is None else len(written[0]) > 3


# -- pieces -----------------------------------------------------------------------------------------------


def random_case(rng: random.Random) -> tuple[list[int], Recipe, dict[str, SourceMap]]:
    """A source shape, a recipe and maps: any rank, factors, segments, tiles, repeats and index maps."""
    maps: dict[str, SourceMap] = {}
    axes: list[tuple[Axis, ...]] = []
    shape: list[int] = []
    shared: list[tuple[int, int]] = []

    def named(size: int) -> Named:
        kind = rng.random()
        if kind < 0.5:
            source_map = SourceMap(size, tile=rng.choice([1, 2, 3]))
        elif kind < 0.7:
            source_map = SourceMap(size, repeat=2)
        else:
            index = [*range(size), *(rng.randrange(size) for _ in range(rng.randrange(4)))]
            rng.shuffle(index)
            source_map = SourceMap(size, index=tuple(index))
        name = f"d{len(maps)}"
        maps[name] = source_map
        return Named(name)

    for a in range(rng.choice([1, 2, 2, 3])):
        factors: list[Axis] = []
        length = 1
        for f in range(rng.choice([1, 1, 2])):
            size = rng.choice([1, 2, 3, 5])
            choice = rng.random()
            if choice < 0.25:
                factors.append(Kept(size))
            elif choice < 0.8:
                factors.append(named(size))
            else:
                factors.append(ConcatOf((named(size), Kept(1), named(2))))
                size += 3
            length *= size
            if not isinstance(factors[-1], Kept) and rng.random() < 0.5:
                shared.append((a, f))
        axes.append(tuple(factors))
        shape.append(length)
    return shape, Recipe("w", tuple(axes), tuple(shared), rng.choice([1.0, 1.0, 0.5])), maps


@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_every_byte_once_and_slices_agree(
    kind: str, strategy: StrategyName, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For recipes of every form, pieces, slices and the whole agree, and the repeats add up to the source."""
    rng = random.Random(f"{kind} {strategy} {seed}")
    for _ in range(25):
        monkeypatch.setattr(grown_table, "BLOCK", rng.choice([8, 64, 1 << 17]))
        monkeypatch.setattr(grown_table, "WIDE", rng.choice([8, 64, 1 << 18]))
        monkeypatch.setattr(grown_table, "SHORT", rng.choice([8, 1 << 14]))
        shape, recipe, maps = random_case(rng)
        array = np.random.default_rng(seed).standard_normal(shape).astype(kind)
        file = tmp_path / "weights"
        file.write_bytes(b"abc" + array.tobytes())
        dtype = ir.DataType.from_numpy(array.dtype)
        source = ir.ExternalTensor(
            file.name, 3, array.nbytes, dtype, shape=ir.Shape(shape), name="w", base_dir=tmp_path
        )
        grown = GrownTensor(source, recipe, maps, Strategy(strategy, seed=seed))
        whole = grown.numpy()
        written, times = np.zeros(grown.nbytes, np.uint8), np.zeros(grown.nbytes, np.int64)
        for piece in grown.fresh().pieces():
            for block, offsets in piece(Scratch()):
                data = block.reshape(-1).view(np.uint8)
                for offset in offsets:
                    written[offset : offset + data.size] = data
                    times[offset : offset + data.size] += 1
        assert (times == 1).all()
        np.testing.assert_array_equal(written, whole.reshape(-1).view(np.uint8))
        window = tuple(slice(low := rng.randrange(n + 1), rng.randrange(low, n + 1)) for n in whole.shape)
        np.testing.assert_array_equal(grown[window], whole[window])
        assert_repeats_add_up(grown, whole, array, recipe.scale)


def assert_repeats_add_up(grown: GrownTensor, whole: Array, source: Array, scale: float) -> None:
    total, want = whole.astype(np.float64), source.astype(np.float64) * scale
    for axis, index in enumerate(grown.table.axes):
        moved = np.moveaxis(total, axis, 0)
        summed = np.zeros((index.collapsed_size, *moved.shape[1:]))
        np.add.at(summed, index.collapsed, moved)
        total = np.moveaxis(summed, 0, axis)
        origin = np.empty(index.collapsed_size, np.int64)
        origin[index.collapsed] = index.source
        want = np.take(want, origin, axis=axis)
    tolerance = {"f2": 0.0, "f4": 3e-6, "f8": 1e-14}[source.dtype.str[1:]]
    np.testing.assert_allclose(total, want, rtol=0, atol=tolerance)


# -- memory and reading -----------------------------------------------------------------------------------


def in_file(folder: Path, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """Zeros that take no memory."""
    size = int(np.prod(shape)) * 4
    with (folder / "sparse").open("wb") as file:
        file.truncate(size)
    return ir.ExternalTensor("sparse", 0, size, ir.DataType.FLOAT, shape=ir.Shape(shape), name="w", base_dir=folder)


SHARED_ROWS = Recipe("w", ((Named("a"),), (Named("b"),)), ((0, 0),))


@pytest.mark.parametrize("strategy", ["symmetric", "noisy-symmetric", "noisy-diagonal"])
def test_a_tensor_is_never_whole_in_memory(strategy: StrategyName, tmp_path: Path) -> None:
    """64 MB are written from 16 MB, with only a few blocks in memory."""
    maps = {"a": SourceMap(2048, tile=2), "b": SourceMap(2048, tile=2)}
    grown = GrownTensor(in_file(tmp_path, (2048, 2048)), SHARED_ROWS, maps, Strategy(strategy))
    value = ir.Value(name="w", const_value=grown.as_lazy("w"))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20}), ir_version=10)
    tracemalloc.start()
    save(model, tmp_path / "big.onnx", external=True, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big.onnx.data").stat().st_size == 1 << 26
    assert peak < 20e6


@pytest.mark.parametrize(
    ("window", "most"),
    [((slice(0, 128),), 1.1), ((slice(1024, 1152), slice(0, 64)), 0.2), ((slice(None), slice(512, 640)), 1.1)],
    ids=["rows", "a corner", "columns"],
)
def test_a_shard_reads_its_own_part(
    window: tuple[slice, ...], most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2048 rows and columns, a slice needs a sixteenth, and a sixteenth is read."""
    maps = {"a": SourceMap(1024, tile=2), "b": SourceMap(1024, tile=2)}
    source = in_file(tmp_path, (1024, 1024))
    grown = GrownTensor(source, SHARED_ROWS, maps, Strategy("symmetric"))
    read = 0
    preadv = os.preadv

    def counting(*arguments: Any) -> int:
        nonlocal read
        count = preadv(*arguments)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    shape = [len(range(*bounds.indices(2048))) for bounds in (*window, slice(None))[:2]]
    assert list(grown[window].shape) == shape
    assert 0 < read <= most * source.nbytes / 8


# -- layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_other_readers_read_the_same_tensors(external: bool, tmp_path: Path) -> None:
    """The onnx package loads the file, also with strings, numbers of 4 bits, empty tensors, and tensors of bodies."""
    rng = np.random.default_rng(0)
    arrays = {
        "large": rng.standard_normal((700, 500)).astype(np.float32),
        "small": np.arange(3),
        "half": rng.standard_normal((40, 9)).astype(np.float16),
        "none": np.zeros((0, 3), np.float32),
    }
    tensors: list[Any] = [ir.tensor(array, name=name) for name, array in arrays.items()]
    tensors.append(ir.StringTensor([b"a", b"b"], shape=ir.Shape([2]), name="text"))
    codes = rng.integers(-8, 8, (33, 31)).astype(ir.DataType.INT4.numpy())
    tensors.append(ir.tensor(codes, name="codes"))
    values = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    node = ir.node("Identity", [values[0]])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([700, 500])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    before = {value: value.const_value for value in values}
    save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", external=external)
    assert {value: value.const_value for value in values} == before
    assert names_in(tmp_path) == ({"m.onnx", "m.onnx.data"} if external else {"m.onnx"})
    onnx.checker.check_model(tmp_path / "m.onnx")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert list(stored) == [tensor.name for tensor in tensors]
    for name, array in arrays.items():
        np.testing.assert_array_equal(numpy_helper.to_array(stored[name]), array, strict=True)
    assert list(stored["text"].string_data) == [b"a", b"b"]
    np.testing.assert_array_equal(numpy_helper.to_array(stored["codes"]).astype(np.int8), codes.astype(np.int8))


def test_large_tensors_begin_at_a_page_and_shards_are_full() -> None:
    sizes = [100, 3 << 20, 10, 2 << 20, 5 << 20]
    path = Path("big.onnx")
    placed = data_files(path, sizes, None)
    assert [offset for _, offset in placed] == [0, 4096, 4096 + (3 << 20), 4096 * 2 + (3 << 20), 4096 * 2 + (5 << 20)]
    assert {name for name, _ in placed} == {"big.onnx.data"}
    sharded = data_files(path, sizes, 4 << 20)
    assert [name for name, _ in sharded] == [f"big.onnx-0000{i}-of-00003.data" for i in (1, 1, 1, 2, 3)]
    assert [offset for _, offset in sharded] == [0, 4096, 4096 + (3 << 20), 0, 0]


def test_a_full_disk_is_reported_before_anything_is_computed(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    def computed(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(streaming, "share_out", computed)
    with pytest.raises(CannotWrite, match="No space left"):
        expand(fixed, tmp_path / "big.onnx", 2)
    assert names_in(tmp_path) == {"fixed.onnx"}


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_a_worker_ends_the_run_with_it(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    calls: list[int] = []
    results: Callable[..., Any] = grown_table.Table.results

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return results(*arguments)

    monkeypatch.setattr(grown_table.Table, "results", failing)
    with pytest.raises(MemoryError):
        expand(fixed, tmp_path / "big.onnx", 2, workers=workers)
    assert names_in(tmp_path) == {"fixed.onnx"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_numbers_that_are_not_finite_stay_where_they_are(kind: str, strategy: StrategyName) -> None:
    """No other weight becomes infinite: the level of the noise is that of the finite weights."""
    source = np.random.default_rng(0).standard_normal((6, 8)).astype(kind)
    source[0, 0], source[1, 2], source[2, 3] = np.inf, -np.inf, np.nan
    maps = {"a": SourceMap(6, tile=3), "b": SourceMap(8, tile=2)}
    grown = GrownTensor(ir.tensor(source), SHARED_ROWS, maps, Strategy(strategy))
    with np.errstate(invalid="ignore"):
        total = grown.numpy().astype(np.float64).reshape(3, 6, 16).sum(axis=0)
    np.testing.assert_allclose(total, np.tile(source, 2).astype(np.float64), atol=1e-5)


def test_one_call_writes_one_piece_of_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end at multiples of their size in the file, wherever the bytes begin."""
    calls: list[tuple[int, int]] = []
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: calls.append((at, len(data))) or write(file, data, at))
    data = np.random.default_rng(0).bytes(100_001)
    with (tmp_path / "file").open("wb") as file:
        write_at(file.fileno(), memoryview(data), 5000)
    assert (tmp_path / "file").read_bytes() == bytes(5000) + data
    assert [at for at, _ in calls] == [5000, 32768, 65536, 98304] and sum(size for _, size in calls) == len(data)


def test_files_are_the_same_where_the_system_reads_and_writes_at_no_place(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has neither preadv nor pwrite."""
    expand(fixed, tmp_path / "a.onnx", 2, max_shard_size=10_000)
    for name in ("preadv", "pwrite", "posix_fallocate", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    expand(tmp_path / "a.onnx", tmp_path / "c.onnx", 2, workers=3)
    expand(fixed, tmp_path / "b.onnx", 2, max_shard_size=10_000, workers=3)
    for name in names_in(tmp_path):
        if name.startswith("a.onnx-"):
            assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("a", "b", 1)).read_bytes()
    assert len(names_in(tmp_path)) > 4
