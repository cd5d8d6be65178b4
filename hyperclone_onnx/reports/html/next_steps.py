"""The part of a page that says how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hyperclone_onnx.errors import in_bytes
from hyperclone_onnx.planning.training_recipe import RECIPE
from hyperclone_onnx.reports.html.elements import element, joined
from hyperclone_onnx.reports.html.page import Section
from hyperclone_onnx.reports.html.tables import Step, bullets, steps
from hyperclone_onnx.reports.html.wording import sentence

TRAINED_BYTES = 16
"""The bytes of a parameter while AdamW trains it in float32: the weight, its gradient and two moments."""


def command(*words: str | Path) -> str:
    """A line for a shell: `words` after the name of our command.

    >>> command("expand", Path("my model.onnx"))
    "hyperclone-onnx expand 'my model.onnx'"
    """
    return shlex.join(["hyperclone-onnx", *map(str, words)])


def next_steps(entries: Sequence[Step], advice: Sequence[str] = ()) -> Section:
    """The section about what to do next."""
    parts = [steps(entries)]
    if advice:
        parts += [element("h3", "Training"), bullets([sentence(line) for line in advice])]
    return Section("go-on", "Go on", joined(parts))


def after_growth(
    source: Path | str, grown: Path | str, parameters: int | None = None, *, validate: bool = False
) -> Section:
    """How to train a grown model, to take its weights back, and to see whether its clones part.

    Args:
        source: the source's file.
        grown: the grown file.
        parameters: the number of its parameters, where it is known.
        validate: whether the first step is to validate it.
    """
    path = str(grown)
    memory = (
        [] if parameters is None else [f"AdamW in float32 needs about {in_bytes(TRAINED_BYTES * parameters)} for it"]
    )
    first = [Step("Validate it.", [command("validate", str(source), path)])] if validate else []
    return next_steps(
        [
            *first,
            Step(
                "Train it in PyTorch (or JAX: from hyperclone_onnx.frameworks.jax import load).",
                ["from hyperclone_onnx.frameworks.torch import load", f"model = load({path!r})"],
            ),
            Step("Or write a checkpoint for your trainer.", [command("handoff", path, "--to", "pytorch", "-o", "DIR")]),
            Step("Put trained weights back into ONNX.", [command("absorb", path, "TRAINED", "-o", "trained.onnx")]),
            Step(
                "See whether the clones have become different.",
                [command("diagnose", "trained.onnx", "--source", str(source), "--html", "diagnosis.html")],
            ),
        ],
        (*RECIPE.lines(), *memory),
    )
