"""The generated pages of docs/ are those that the code generates."""

from __future__ import annotations

import subprocess
import sys

from models.dialects import DIALECTS
from tests.conftest import ROOT


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_dialect_is_described_and_measured() -> None:
    text = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
    for name, dialect in DIALECTS.items():
        assert f"| {name} | {dialect.made_by} |" in text, name
        assert f"smollm2-135m {name} x2" in text, name
        assert dialect.decoders_only or f"all-minilm-l6-v2 {name} x3" in text, name
