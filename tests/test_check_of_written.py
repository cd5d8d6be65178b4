"""Tensors in a data file are compared with the source while the file is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from hyperclone_onnx import ModelsDiffer, analyse, expand, plan_expansion, rewrite
from hyperclone_onnx.validation import tensor_check
from hyperclone_onnx.validation import validating as validation
from hyperclone_onnx.validation.tensor_check import Checked, CheckOfWritten, check_tensors
from hyperclone_onnx.writing import onnx_files, streaming

SHARDS = 4000
"""The most bytes of a data file. With shards, small models have data files, too."""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["up.0", "embedding"])
def test_a_tensor_that_is_written_wrong_is_found(
    name: str, workers: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two bytes of the tensor's third number are changed in the file, right after it was written."""
    write = streaming._write_tensor

    def wrong(placed: Any, files: Any, behind: Any, scratch: Any) -> int:
        count = write(placed, files, behind, scratch)
        if placed.tensor.name == name:
            os.pwrite(files[placed.file], b"\x12\x42", placed.offset + 10)
        return count

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the tensors are read again")

    monkeypatch.setattr(validation, "check_tensors", never)
    monkeypatch.setattr(streaming, "_write_tensor", wrong)
    with pytest.raises(ModelsDiffer, match=f"tensor {name}: "):
        expand(small, tmp_path / "big.onnx", 2, workers=workers, max_shard_size=SHARDS)
    assert not list(tmp_path.glob("big*"))


@pytest.fixture
def written(small: Path, tmp_path: Path) -> tuple[CheckOfWritten, list[Checked | None]]:
    """A check of a written model, and its answers."""
    analysis = analyse(small)
    plan = plan_expansion(analysis, 2)
    check = CheckOfWritten(analysis.model, plan, tmp_path / "big.onnx")
    grown = rewrite(analysis.model, plan)
    return check, onnx_files.save(grown, tmp_path / "big.onnx", external=True, workers=2, check=check.begin)


def test_the_report_is_that_of_a_later_check(written: Any, small: Path) -> None:
    check, answers = written
    assert {"up.0", "down.1", "embedding"} <= {answer.name for answer in answers if answer is not None}
    report = check.report(answers)
    assert report == check.report([]) == check_tensors(analyse(small).model, check.grown, plan_of(small), 1)
    assert report.checked == len(check.grown.graph.initializers) and not report.wrong


def test_what_was_compared_is_known_to_be_finite(written: Any, small: Path, tmp_path: Path) -> None:
    """A copied tensor is not known to be, and neither is one that holds a number which is not finite."""
    check, answers = written
    check.report(answers)
    assert check.finite == {"up.0", "up.1", "down.0", "down.1", "head"}
    analysis = analyse(small)
    for name, value in (("up.0", np.inf), ("down.1", np.nan)):
        tensor = analysis.model.graph.initializers[name]
        array = tensor.const_value.numpy().copy()
        array[3, 4] = value
        tensor.const_value = ir.Tensor(array, name=name)
    plan = plan_of(small)
    check = CheckOfWritten(analysis.model, plan, tmp_path / "spoilt.onnx")
    grown = rewrite(analysis.model, plan)
    check.report(onnx_files.save(grown, tmp_path / "spoilt.onnx", external=True, check=check.begin))
    assert check.finite == {"up.1", "down.0", "head"}


def test_tensors_that_share_bytes_are_compared_at_the_end(written: Any) -> None:
    """The tensor that is written later could change the other one again."""
    check, answers = written
    before = set(tensor_check._names_by_place(check._check).values())
    assert {"up.0", "up.1", "down.0"} <= before
    stored = check.grown.graph.initializers
    tensor = stored["up.0"].const_value
    stored["up.1"].const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.nbytes, tensor.dtype,
        shape=tensor.shape, name="up.1", base_dir=tensor.base_dir,
    )  # fmt: skip
    after = set(tensor_check._names_by_place(check._check).values())
    assert {"up.0", "up.1"} <= before - after and "down.0" in after
    kept = [answer for answer in answers if answer is None or answer.name in after]
    assert [text.split(":")[0] for text in check.report(kept).wrong] == ["up.1"]


def plan_of(small: Path) -> Any:
    return plan_expansion(analyse(small), 2)
