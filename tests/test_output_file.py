"""A file is the same whether it is written past the page cache or through it."""

from __future__ import annotations

import errno
import itertools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperclone_onnx import output_file, streaming
from hyperclone_onnx.output_file import OutputFile
from hyperclone_onnx.scratch import PAGE, Scratch

DIRECT = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")


def cut(size: int, rng: random.Random) -> list[tuple[int, int]]:
    """A file of so many bytes in stretches of all lengths, pages and none, in any order."""
    bounds = [0]
    while bounds[-1] < size:
        step = rng.choice([1, 7, 511, 512, PAGE - 1, PAGE, 3 * PAGE, 65_000, 100_000, 1 << 17, 300_001])
        bounds.append(min(size, bounds[-1] + step))
    stretches = list(itertools.pairwise(bounds))
    rng.shuffle(stretches)
    return stretches


def write_all(file: OutputFile, data: Any, stretches: list[tuple[int, int]], shift: int) -> None:
    """Write each stretch from memory that begins `shift` bytes behind a page."""
    scratch = Scratch()
    for start, end in stretches:
        held = scratch.array("test", (shift + end - start,), np.uint8)[shift:]
        held[:] = data[start:end]
        file.write(held, start, scratch)
    file.finish()
    file.close()


@DIRECT
@pytest.mark.parametrize("shift", [0, 1, 512, 4095])
@pytest.mark.parametrize("size", [0, 1, PAGE, 3_000_001])
def test_the_same_bytes(tmp_path: Path, size: int, shift: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    file = OutputFile(tmp_path / "file", size, direct=True, writers=2)
    write_all(file, data, cut(size, random.Random(shift)), shift)
    assert (tmp_path / "file").read_bytes() == data.tobytes()


@DIRECT
def test_pages_do_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would compare nothing."""
    written: list[int] = []
    monkeypatch.setattr(OutputFile, "_write_pages", lambda _self, _to, pages, _at: written.append(pages.size))
    file = OutputFile(tmp_path / "file", 1 << 20, direct=True)
    if file._direct is None:
        file.close()
        pytest.skip("this file system has no O_DIRECT")
    write_all(file, np.ones(1 << 20, np.uint8), [(100, 1 << 20)], 100)
    assert written == [(1 << 20) - PAGE]
    assert not any((tmp_path / "file").read_bytes()[PAGE:])


@DIRECT
@pytest.mark.parametrize("why", ["the disk cannot", "the disk is slow"])
def test_the_cache_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "the disk is slow":
        monkeypatch.setattr(output_file, "TRIAL", 1)
        monkeypatch.setattr(output_file, "SLOW", float("inf"))
    data = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)
    file = OutputFile(tmp_path / "file", data.size, direct=True)
    if why == "the disk cannot":
        write, direct = output_file.write_at, file._direct

        def refusing(descriptor: int, pages: memoryview, offset: int) -> None:
            if descriptor == direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            write(descriptor, pages, offset)

        monkeypatch.setattr(output_file, "write_at", refusing)
    write_all(file, data, cut(data.size, random.Random(1)), 0)
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert not file.is_direct


@DIRECT
def test_a_failing_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = OutputFile(tmp_path / "file", 1 << 20, direct=True)
    monkeypatch.setattr(output_file, "write_at", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_all(file, np.ones(1 << 20, np.uint8), [(0, 1 << 20)], 0)
    file.close()


def test_large_results_go_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_file, "free_memory", lambda: 1000)
    assert [output_file.straight(size) for size in (0, 200, 201)] == [False, False, True]
    monkeypatch.setattr(output_file, "free_memory", lambda: None)
    assert not output_file.straight(1 << 60)
    assert streaming.straight is output_file.straight
