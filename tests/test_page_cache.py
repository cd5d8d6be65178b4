"""Large files leave little in the page cache, and their content stays as it is."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from hyperclone_onnx.system import page_cache, write_behind
from hyperclone_onnx.system.page_cache import Stretches, joined
from hyperclone_onnx.system.write_behind import WriteBehind
from hyperclone_onnx.tensors import stored_rows
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows
from hyperclone_onnx.writing import streaming
from hyperclone_onnx.writing.streaming import Layout, Placed

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The stretches that the system is asked to forget, with batches of 1,000 bytes and a window of 4,000."""
    calls: list[tuple[int, int, int]] = []
    for module in (page_cache, stored_rows, write_behind):
        monkeypatch.setattr(module, "BATCH", 1000)
    monkeypatch.setattr(write_behind, "WINDOW", 4000)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: calls.append(arguments[:3]))
    return calls


def test_neighbours_are_joined_and_files_kept_apart() -> None:
    assert joined([(3, 8, 9), (4, 0, 2), (3, 0, 4), (3, 2, 8), (4, 3, 4)]) == [(3, 0, 9), (4, 0, 2), (4, 3, 4)]
    assert joined([]) == []


def test_stretches_come_when_they_are_many(advised: list[tuple[int, int, int]]) -> None:
    stretches = Stretches()
    assert [stretches.add(3, start, 300) for start in (0, 300, 900)] == [[], [], []]
    assert stretches.add(3, 600, 300) == [(3, 0, 1200)]
    assert stretches.add(3, 1200, 999) == []


def until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.001)


def test_written_pages_are_sent_and_later_forgotten_in_order(advised: list[tuple[int, int, int]]) -> None:
    with WriteBehind(20_000) as behind:
        for start in range(0, 8000, 500):
            behind.wrote(7, start, 500)
        until(lambda: len(advised) == 12)
    sent = [(7, start, 1000) for start in range(0, 8000, 1000)]
    assert [stretch for stretch in sent if advised.count(stretch) == 2] == sent[:4]
    assert [stretch for stretch in sent if advised.count(stretch) == 1] == sent[4:]
    first = {stretch: advised.index(stretch) for stretch in sent}
    again = {stretch: len(advised) - 1 - advised[::-1].index(stretch) for stretch in sent[:4]}
    assert all(again[stretch] > first[sent[index + 4]] for index, stretch in enumerate(sent[:4]))


def test_written_pages_that_are_read_next_are_sent_and_stay(advised: list[tuple[int, int, int]]) -> None:
    with WriteBehind(20_000, keep=True) as behind:
        for start in range(0, 8000, 500):
            behind.wrote(7, start, 500)
        until(lambda: len(advised) == 8)
    assert advised == [(7, start, 1000) for start in range(0, 8000, 1000)]


@pytest.mark.parametrize(
    ("settings", "held"),
    [({"dirty_bytes": "0", "dirty_ratio": "20"}, 2000), ({"dirty_bytes": "77", "dirty_ratio": "0"}, 77), ({}, 0)],
)
def test_the_system_says_how_much_it_holds(
    settings: dict[str, str], held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in settings.items():
        (tmp_path / name).write_text(f"{text}\n", encoding="utf-8")
    monkeypatch.setattr(write_behind, "_SETTINGS", tmp_path)
    monkeypatch.setattr(write_behind, "free_memory", lambda: 10_000)
    assert write_behind.most_unwritten() == held


@pytest.mark.parametrize(("held", "sent"), [(15_999, True), (16_000, False)])
def test_a_file_is_sent_if_the_system_does_not_hold_it(
    held: int, sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has 16,000 bytes."""
    sizes: list[int] = []
    behind = streaming.WriteBehind

    def noted(size: int, *, keep: bool) -> WriteBehind:
        sizes.append(size)
        return behind(size, keep=keep)

    monkeypatch.setattr(streaming, "WriteBehind", noted)
    monkeypatch.setattr(streaming, "most_unwritten", lambda: held)
    tensor = ir.tensor(np.ones(4000, dtype=np.float32), name="a")
    layout = Layout({tmp_path / "a": 16_000}, [], [Placed(tensor, tmp_path / "a", 0)])
    streaming.write(layout, workers=1)
    assert sizes == [16_000 if sent else 0]
    assert (tmp_path / "a").read_bytes() == np.ones(4000, dtype=np.float32).tobytes()


def test_little_is_left_to_the_system(advised: list[tuple[int, int, int]]) -> None:
    before = threading.active_count()
    with WriteBehind(4000) as behind:
        behind.wrote(7, 0, 4000)
        assert threading.active_count() == before
    assert advised == []


def test_writing_does_not_wait_for_a_slow_disk(
    advised: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after at most the one call that is running."""
    arrive = threading.Event()
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: (advised.append(arguments[:3]), arrive.wait(10)))
    behind = WriteBehind(20_000)
    with behind:
        for start in range(0, 8000, 500):
            behind.wrote(7, start, 500)
        until(lambda: advised)
        threading.Timer(0.05, arrive.set).start()
    assert len(advised) == 1


def test_an_interrupt_while_the_thread_ends_leaves_none(
    advised: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would use files that are closed by then."""
    through: list[int] = []
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda *arguments: (advised.append(arguments[:3]), time.sleep(0.2), through.append(1)),
    )
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), WriteBehind(20_000) as behind:
            behind.wrote(7, 0, 1000)
            until(lambda: advised)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert through == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_pages_that_were_read_once_are_forgotten(advised: list[tuple[int, int, int]], tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    (tmp_path / "data").write_bytes(data.tobytes())
    tensor = ir.ExternalTensor(
        "data", 0, 10_000, ir.DataType.UINT8, shape=ir.Shape([10_000]), name="w", base_dir=tmp_path
    )
    for forget in (False, True):
        rows, scratch = StoredRows(tensor, 100, 100, forget=forget), Scratch()
        read = [rows.read(first, 5, scratch).copy() for first in range(0, 100, 5)]
        np.testing.assert_array_equal(np.concatenate(read).reshape(-1), data)
        assert sum(size for _, _, size in advised) == (10_000 if forget else 0)


def test_a_large_file_has_the_written_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real calls to the system: pages are written and dropped while other pages are written."""
    monkeypatch.setattr(write_behind, "WINDOW", 16 << 20)
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    with (tmp_path / "data").open("wb") as file, WriteBehind(48 << 20) as behind:
        for number in range(48):
            os.pwrite(file.fileno(), bytes([number]) + data[1:], number << 20)
            behind.wrote(file.fileno(), number << 20, 1 << 20)
    whole = (tmp_path / "data").read_bytes()
    assert all(whole[n << 20 : (n + 1) << 20] == bytes([n]) + data[1:] for n in range(48))
