"""Modules that Python loads when something in them is used, not when they are imported.

`onnx_ir` imports SymPy for arithmetic on symbolic shapes, which no command does: a fifth of a second, and 30 MB.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

DEFERRED = ("sympy", "onnx_ir._symbolic_shapes")
"""The second module uses the first while it is loaded."""


class _Finder:
    """Finds the deferred modules as Python would, and gives them a loader that waits for their first use."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in DEFERRED:
            return None
        from importlib.util import LazyLoader

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def defer() -> None:
    """From now on, load these modules when they are used."""
    sys.meta_path.insert(0, _Finder())
