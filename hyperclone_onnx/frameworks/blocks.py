"""Layers that repeat, found by their tensors' names and equal structure."""

from __future__ import annotations

from collections.abc import Iterator

from hyperclone_onnx.frameworks.program import BlockCall, Program


def block_paths(program: Program) -> Iterator[tuple[str, int]]:
    """The path of each block call, and which of the program's blocks it calls."""
    for step in program.body.steps:
        if isinstance(step, BlockCall):
            yield step.path, step.block
