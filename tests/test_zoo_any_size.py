"""Every graph of the zoo at sizes that are no multiples, compared in full. None is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from hyperclone_onnx import SourceMap, Strategy, analyse, expand
from models import zoo_store

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", zoo_store.names())
def test_one_and_a_half_times_the_sizes(name: str, tmp_path: Path) -> None:
    onnx.save(zoo_store.load(name), tmp_path / "model.onnx")
    result = expand(
        tmp_path / "model.onnx",
        tmp_path / "big.onnx",
        1.5,
        strategy=Strategy("noisy-symmetric"),
        device="cpu",
        check="full",
    )
    assert result.validation is not None and result.validation.equal
    assert result.plan.dims


@pytest.mark.parametrize("name", zoo_store.names())
def test_one_more_head_and_the_width_that_goes_with_it(name: str, tmp_path: Path) -> None:
    onnx.save(zoo_store.load(name), tmp_path / "model.onnx")
    maps = one_more_head(tmp_path / "model.onnx")
    if not maps:
        pytest.skip("no heads")
    result = expand(tmp_path / "model.onnx", tmp_path / "big.onnx", maps=maps, device="cpu", check="full")
    assert result.validation is not None and result.validation.equal
    assert result.plan.dims.keys() == maps.keys()


def one_more_head(path: Path) -> dict[str, SourceMap]:
    """One more head in each attention (a key/value head where these are shared), and a wider stream."""
    named = [dimension for dimension in analyse(path).named if dimension.dim.growable]
    heads = [dimension.size for dimension in named if dimension.role == "heads" and dimension.size > 1]
    if not heads:
        return {}
    widths = {"heads": lambda size: size + 1, "hidden": lambda size: round(size * (heads[0] + 1) / heads[0])}
    return {
        dimension.name: SourceMap.to_size(dimension.size, widths[dimension.role](dimension.size))
        for dimension in named
        if dimension.role in widths and dimension.size > 1
    }
