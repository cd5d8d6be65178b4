"""A text that every machine has: the source code of Python's standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Left out: tests, installed packages, and generated files. pydoc_data is documentation in one huge string. Tables in
# encodings are so similar that held-out ones would make the validation loss too small.
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"}
VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """The bytes of the files, joined. A zero byte stands before each file."""

    train: bytes
    validation: bytes
    train_files: int
    validation_files: int


def read_corpus() -> Corpus:
    """The sources of the running Python, split into two parts by a hash of the relative name of each file."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        # _sysconfigdata is written when Python is built and holds the builder's paths.
        if EXCLUDED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32
        parts[held_out].append(b"\0" + file.read_bytes())
    train, validation = parts[False], parts[True]
    return Corpus(b"".join(train), b"".join(validation), len(train), len(validation))
