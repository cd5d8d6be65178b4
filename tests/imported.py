"""The imports of a Python file. Every file is parsed once in a test run."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Imported(NamedTuple):
    """One imported name: the module or, for `from package import name`, that name within the package."""

    module: str
    name: str
    line: int


@cache
def imported(path: Path) -> tuple[Imported, ...]:
    """Every absolute import in a file, also those within functions, and those for types only."""
    imports: list[Imported] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            imports += [Imported(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module and not node.level:
                imports += [Imported(node.module, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.Module | ast.stmt | ast.excepthandler | ast.match_case):
            waiting.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    return tuple(sorted(imports, key=lambda one: one.line))
