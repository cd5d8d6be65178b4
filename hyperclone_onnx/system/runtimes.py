"""Notices several packages of ONNX Runtime in one environment. They overwrite one another's files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

OWNED = "onnxruntime/__init__.py"
"""The file that every package of ONNX Runtime has. Packages beside it, such as onnxruntime-genai, do not have it."""


def runtimes(folders: Sequence[str] | None = None) -> list[str]:
    """The installed packages that contain ONNX Runtime itself.

    Args:
        folders: the folders to look in; by default those from which Python imports.
    """
    names: set[str] = set()
    for folder in dict.fromkeys(sys.path if folders is None else folders):
        for info in Path(folder or ".").glob("onnxruntime*.dist-info"):
            if _has_runtime(info):
                names.add(info.name.partition("-")[0].replace("_", "-"))
    return sorted(names)


def _has_runtime(info: Path) -> bool:
    try:
        with (info / "RECORD").open(encoding="utf-8") as record:
            return any(line.startswith(f"{OWNED},") for line in record)
    except (OSError, ValueError):
        return False


def warning(names: Sequence[str]) -> str | None:
    """One line for an environment with several of these packages; None for any other."""
    if len(names) < 2:
        return None
    return (
        f"{' and '.join(names)} are installed in one environment and overwrite each other's files, so that either may "
        f"be broken: pip uninstall {' '.join(names)}, then install the one that you want"
    )
