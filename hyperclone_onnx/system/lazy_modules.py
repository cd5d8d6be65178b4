"""Modules that are loaded when something asks for what is in them, not when they are imported.

`onnx_ir` imports SymPy for arithmetic on symbolic shapes, which no command does: a fifth of a second, and 30 MB.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

DEFERRED = ("sympy", "onnx_ir._symbolic_shapes")
"""The second uses the first as it is loaded."""


class _Deferring(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def defer() -> None:
    """From now on, load these modules when they are used."""
    sys.meta_path.insert(0, _Deferring())
