"""Checks the results of a study, with a margin for noise. A check states the value that it measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from growing.corpus import corpus
from growing.runs import Grown, Lab, Outcome
from growing.study import Findings
from hyperclone_onnx.diagnosis import diagnose
from hyperclone_onnx.frameworks.torch import load

LARGEST_ERROR = 1e-4
LEAST_GAIN = 1.5


@dataclass(frozen=True)
class Check:
    """A statement about a study, whether it is true, and the measured value."""

    statement: str
    holds: bool
    measured: str


def checks(findings: Findings, lab: Lab) -> Iterator[Check]:
    """Grown models are equal to their source at the start, learn sooner than random weights, and need noise."""
    grown = {row.variant: row.runs[0] for row in findings.tables["strategy"]}
    for name, outcome in grown.items():
        error = start_error(outcome, lab)
        yield Check(f"{name}: logits equal at the start", error <= LARGEST_ERROR, f"{error:.1e} of the largest logit")
    gains = [row.gain_tokens or 0.0 for row in findings.tables["strategy"]]
    sooner = f"{max(gains):.2f}x in bytes"
    yield Check(
        f"the best clone is at least {LEAST_GAIN:g}x as soon as random weights", max(gains) >= LEAST_GAIN, sooner
    )
    for name in ("symmetric", "noisy-diagonal"):
        diagnosis = diagnose(grown[name].model)
        apart = (
            f"clones {diagnosis.activations:.1e} apart in activations, {'stuck' if diagnosis.stuck else 'not stuck'}"
        )
        yield Check(
            f"{name}: {'stuck' if name == 'symmetric' else 'not stuck'}",
            diagnosis.stuck == (name == "symmetric"),
            apart,
        )


def start_error(outcome: Outcome, lab: Lab) -> float:
    """The largest difference between the logits of a grown model and its source, divided by the largest logit.

    Both are taken before training.
    """
    start = outcome.run.start
    assert isinstance(start, Grown)
    shape = outcome.run.shape
    windows = torch.from_numpy(corpus(lab.tokens_file(shape)).examination(16, shape.length)[:, :-1])
    with torch.inference_mode():
        small, big = (load(model)(windows).numpy() for model in (lab.outcomes[start.run].model, lab.model(outcome.run)))
    return float(np.abs(small - big).max() / np.abs(small).max())
