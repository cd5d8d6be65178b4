"""The coverage-guided fuzzer: for any bytes in a file, reading and planning must end in a plan or in one line of text.

    python -m fuzz.coverage --minutes 15

It runs atheris (libFuzzer) on beginnings of the zoo's graphs. Half of its changes are made to bytes, and half to
graphs. It records a defect and continues, so that one defect does not hide the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hyperclone_onnx"]):
    import hyperclone_onnx.algebra.shape_values
    import hyperclone_onnx.rules  # noqa: F401
    from hyperclone_onnx.analysis.analysing import analyse
    from hyperclone_onnx.errors import HypercloneError
    from hyperclone_onnx.expansion.expanding import plan_expansion
    from hyperclone_onnx.reports.inspection import inspection
    from hyperclone_onnx.rewriting.rewriting import rewrite

import numpy as np
import onnx

from fuzz.mutations import mutate
from fuzz.seeds import write_beginnings, write_zoo

LARGEST_SEED = 100_000
"""The most bytes of a seed."""
SLOW = 20.0
"""An input that takes more processor seconds than this is a defect."""


class Target:
    """The function that is called with every input, and its results.

    Args:
        file: the file to which the input is written.
        findings: the folder for inputs that show a defect.
    """

    def __init__(self, file: Path, findings: Path) -> None:
        self.file, self.findings = file, findings
        self.ends: Counter[str] = Counter()
        self.found: dict[str, str] = {}

    def __call__(self, data: bytes) -> None:
        """Read, analyse, plan and rewrite a file with these bytes."""
        self.file.write_bytes(data)
        begun = time.process_time()
        try:
            self.ends[self._run()] += 1
        except HypercloneError as problem:
            self.ends[type(problem).__name__] += 1
            if "\n" in str(problem):
                self._record(data, f"a refusal of several lines: {problem!r}")
        except Exception as problem:
            self.ends["crash"] += 1
            last = traceback.extract_tb(problem.__traceback__)[-1]
            self._record(data, f"{type(problem).__name__} at {last.filename}:{last.lineno}: {problem}")
        if time.process_time() - begun > SLOW:
            self._record(data, f"slow: {time.process_time() - begun:.0f} s")

    def _run(self) -> str:
        analysis = analyse(self.file)
        inspection(analysis)
        plan = plan_expansion(analysis, 2)
        plan.dumps()
        rewrite(analysis.model, plan)
        return "planned"

    def _record(self, data: bytes, text: str) -> None:
        key = text.partition(": ")[0]
        if key not in self.found:
            self.found[key] = text
            name = hashlib.sha256(data).hexdigest()[:16]
            (self.findings / f"{name}.onnx").write_bytes(data)
            print(f"FOUND {text} ({name}.onnx)", flush=True)


def change(data: bytes, most: int, seed: int) -> bytes:
    """Change the bytes of a file, or the graph in it."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        model = onnx.ModelProto()
        try:
            model.ParseFromString(data)
            mutate(model, rng)
            changed = model.SerializeToString()
            if len(changed) <= most:
                return bytes(changed)
        except Exception:  # the bytes are no graph, or the changed graph cannot be written: we change bytes instead
            pass
    return bytes(atheris.Mutate(data, most))


def main() -> None:
    """Fuzz for the given time. The last line has the number of inputs, and how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seeds", type=Path, help="a folder of graphs; the zoo's by default")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="hyperclone-fuzz."))
    corpus = folder / "corpus"
    corpus.mkdir()
    for seed in write_beginnings(write_zoo(arguments.seeds or folder / "zoo"), folder / "beginnings"):
        if seed.stat().st_size <= LARGEST_SEED:
            (corpus / seed.name).write_bytes(seed.read_bytes())
    target = Target(folder / "input.onnx", arguments.findings)
    begun = time.monotonic()

    def one_input(data: bytes) -> None:
        target(data)
        if time.monotonic() - begun > 60 * arguments.minutes:
            ends = dict(target.ends.most_common())
            print(json.dumps({"minutes": arguments.minutes, "inputs": sum(ends.values()), **ends}), flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1 if target.found else 0)  # libFuzzer would report any other exit as a defect

    options = [f"-max_len={2 * LARGEST_SEED}", "-timeout=300", "-rss_limit_mb=4096", "-len_control=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=change, enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
