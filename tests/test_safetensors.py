"""Another reader can read our safetensors files: stored, grown and row by row, in one file and in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from hyperclone_onnx import BadRequest, GrownTensor, Recipe, SourceMap, Strategy
from hyperclone_onnx.plan.maps import Named
from hyperclone_onnx.writing.safetensors_files import write_safetensors

Array = np.ndarray[Any, Any]
KINDS = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1", "BF16": "<u2"}


def read(path: Path) -> dict[str, Array]:
    """The tensors of a file, read according to the specification."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    ends = [0]
    arrays = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == ends[-1], "the bytes have no gaps"
        ends.append(end)
        dtype = np.dtype(KINDS[entry["dtype"]])
        assert begin % dtype.itemsize == 0
        arrays[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], dtype).reshape(entry["shape"])
    assert 8 + length + ends[-1] == len(data)
    assert length % 8 == 0
    return arrays


class Lazy:
    """A tensor that returns rows, and records how many were requested at a time."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __getitem__(self, window: slice) -> Array:
        self.most = max(self.most, len(self.array[window]))
        return self.array[window]


def tensors() -> tuple[dict[str, Any], dict[str, Array]]:
    rng = np.random.default_rng(0)
    maps = {"a": SourceMap(6, tile=2), "b": SourceMap(4, tile=3)}
    source = ir.tensor(rng.standard_normal((6, 4)).astype(np.float32))
    grown = GrownTensor(source, Recipe("w", ((Named("a"),), (Named("b"),)), ((0, 0),)), maps, Strategy())
    lazy = Lazy(rng.standard_normal((3000, 500)).astype(np.float32))
    half = ir.tensor(rng.standard_normal((3, 5)).astype(ir.DataType.BFLOAT16.numpy()))
    stored = {
        "codes": np.arange(5, dtype=np.uint8),
        "grown": grown,
        "lazy": lazy,
        "half": half,
        "numbers": np.arange(3),
        "one": np.float32(2.5).reshape(()),
        "none": np.zeros((0, 4), np.float32),
        "stored": source,
    }
    expected = {name: tensor.numpy() if hasattr(tensor, "numpy") else tensor for name, tensor in stored.items()}
    return stored, expected | {"lazy": lazy.array, "half": half.numpy().view(np.uint16)}


@pytest.mark.parametrize("limit", [None, 4_000_000, 100])
@pytest.mark.parametrize("workers", [1, 3])
def test_another_reader_reads_the_same_tensors(limit: int | None, workers: int, tmp_path: Path) -> None:
    stored, expected = tensors()
    files = write_safetensors(stored, tmp_path, limit, metadata={"format": "pt"}, workers=workers)
    assert sorted(files) == sorted(tmp_path.iterdir())
    arrays: dict[str, Array] = {}
    where = {}
    for path in files:
        if path.suffix == ".safetensors":
            for name, array in read(path).items():
                arrays[name], where[name] = array, path.name
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
    assert stored["lazy"].most < 3000
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == where
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    else:
        assert files == [tmp_path / "model.safetensors"] and limit is None


def test_a_type_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="'w' is of the type string"):
        write_safetensors({"w": ir.StringTensor([b"x"], shape=ir.Shape([1]))}, tmp_path)
    assert list(tmp_path.iterdir()) == []
