"""The reports of `export`, and of `expand` for a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperclone_onnx.frameworks.hugging_face.expanding import CheckpointExpansion, CheckpointExport
from hyperclone_onnx.reports.expansion import print_growth
from hyperclone_onnx.reports.handover import print_handover
from hyperclone_onnx.reports.validation import print_validation


def print_export(console: Any, result: CheckpointExport) -> None:
    """Print the inputs and outputs of each file."""
    for file in result.files:
        console.print(f"{Path(result.output) / file.file}")
        for kind, values in (("input", file.inputs), ("output", file.outputs)):
            shown = [(name, shape) for name, shape in values.items() if not name.startswith(("past_", "present."))]
            for name, shape in shown:
                console.print(f"  {kind} {name}: {', '.join(map(str, shape))}")
        if file.cache:
            layers = sum(name.startswith("past_") for name in file.inputs) // 2
            shape = next(shape for name, shape in file.inputs.items() if name.startswith("past_"))
            console.print(f"  cache of {layers} layers (past_key_values.N.key, .value): {', '.join(map(str, shape))}")


def print_checkpoint(console: Any, result: CheckpointExpansion) -> None:
    """Print what grew, how the ONNX files and the checkpoint were validated, and how to load the checkpoint."""
    for number, (name, expansion) in enumerate(result.models.items()):
        if not number:
            print_growth(console, expansion)
        if expansion.validation or result.kept:
            console.print(f"{name}: " + ("validated" if expansion.validation else "not validated (--validate none)"))
        if expansion.validation is not None:
            print_validation(console, expansion.validation)
    if result.kept:
        console.print(f"ONNX files: {', '.join(result.kept)}")
    print_handover(console, Path(result.source), result.handover)
