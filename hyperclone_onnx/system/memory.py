"""The memory that is free for this process: without swapping, and within the limits of its container."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """The bytes that are free; None where the system does not say.

    It is the smallest of MemAvailable (on Linux; elsewhere the free pages) and the rest that each control group,
    version 2 or 1, leaves. Pages that only cache files count as free.
    """
    known = [room for room in (_available(), *_group_rooms()) if room is not None]
    return min(known) if known else None


def _available() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_rooms() -> list[int | None]:
    """The bytes that each control group of this process leaves, parents included."""
    rooms: list[int | None] = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                names = ("memory.max", "memory.current", "inactive_file")
                rooms += [_room(group, *names) for group in _parents(_GROUPS, path)]
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                rooms += [_room(group, *names) for group in _parents(_GROUPS / "memory", path)]
    return rooms


def _parents(root: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part and part != ".."]
    return [root.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _room(group: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        most = int((group / limit).read_text())  # a ValueError for "max"
        now = int((group / used).read_text())
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - now + int(entries.get(cache, 0)))
    except (OSError, ValueError):
        return None


def peak_memory() -> int | None:
    """The most bytes that this process has held so far, mapped files included; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
