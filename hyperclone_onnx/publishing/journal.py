"""The journal of a commit: written before the commit, so that the next run after a kill can complete or undo it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hyperclone_onnx.system.stamps import Stamp, stamp

JOURNAL = ".journal"


def data_files(out_name: str) -> re.Pattern[str]:
    """The names that data files of OUT have: plain or numbered, whole or in shards."""
    return re.compile(re.escape(out_name) + r"(?:\.(?P<number>\d+))?(?:-\d+-of-\d+)?\.(?:data|safetensors)")


@dataclass(frozen=True)
class Journal:
    """What a commit is about to do beside OUT: data files that come, and old data files that go after it."""

    model: Stamp
    new: dict[str, Stamp]
    old: dict[str, Stamp]

    def write(self, folder: Path) -> None:
        """Store it in the folder in which OUT is prepared."""
        partial = folder / f"{JOURNAL}.partial"
        partial.write_text(json.dumps({"model": self.model, "new": self.new, "old": self.old}), encoding="utf-8")
        os.replace(partial, folder / JOURNAL)

    @staticmethod
    def read(folder: Path) -> Journal | None:
        """The journal of a folder, None where no commit was begun."""
        try:
            data = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            new, old = ({str(k): tuple(v) for k, v in data[side].items()} for side in ("new", "old"))
            return Journal(tuple(data["model"]), new, old)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def settle(self, out: Path, keep: Collection[str] = ()) -> bool:
        """Remove data files beside OUT: the old ones after the commit, the new ones where there was no commit.

        A file that has changed since, or that is to be kept, stays. False when a file could not be removed.
        """
        try:
            committed = stamp(out) == self.model
        except OSError:
            committed = False
        done = True
        for name, known in (self.old if committed else self.new).items():
            path = out.with_name(name)
            if name in keep or not data_files(out.name).fullmatch(name):
                continue
            try:
                if stamp(path) == known:
                    path.unlink()
            except FileNotFoundError:
                continue
            except OSError:
                done = False
        return done
