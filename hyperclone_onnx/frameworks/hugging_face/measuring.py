"""The grown model beside its source: which settings matter, and what has to be folded into its tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hyperclone_onnx.errors import Refused, first_line
from hyperclone_onnx.frameworks.hugging_face.assembly import Assembly, Given
from hyperclone_onnx.frameworks.hugging_face.checking import Feeding, Outputs, outputs, torch_feeds
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, Search, built
from hyperclone_onnx.frameworks.hugging_face.matching import constant
from hyperclone_onnx.frameworks.hugging_face.recording import Step, record
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation, compensations
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source

Array = npt.NDArray[Any]

CASES = 3
"""Input sets that are compared."""


class DoesNotRun(Refused):
    """A model cannot run with the sizes that its configuration then has."""


@dataclass
class Runs:
    """The source's recording on one case, and its outputs on all."""

    steps: list[Step]
    feeds: dict[str, Any]
    outputs: list[tuple[Any, Outputs]]
    tensors: dict[str, Array]
    """What was recorded: the checkpoint's tensors, but none that is one number all over."""

    @staticmethod
    def of(given: Given, fed: Feeding, checkpoint: Checkpoint, doubtful: Collection[str]) -> Runs:
        """Run the source on the first cases that it takes; of doubtful tensors it is not certain how they grow."""
        model = given.model.float()
        found: list[tuple[Any, Outputs]] = []
        problem: Exception | None = None
        for case in fed.cases:
            try:
                found.append((case, outputs(model, case)))
            except (RuntimeError, ValueError, IndexError) as failure:
                problem = failure
            if len(found) == CASES:
                break
        if not found:
            raise Refused(f"{checkpoint.folder}: its model runs on none of the inputs made for it ({problem})")
        feeds = torch_feeds(found[0][0], model)
        tensors = {name: array if name in doubtful else _stirred(array) for name, array in given.floating.items()}
        fill(model, {name: lambda array=array: array for name, array in {**tensors, **given.others}.items()})  # type: ignore[misc]
        steps, _ = record(model, feeds)
        return Runs(steps, feeds, found, tensors)


def _stirred(array: Array) -> Array:
    """A tensor of which all elements are equal, with noise: zeros have no scale that could be measured.

    Tensors of one size get the same noise, so that what is one tensor elsewhere can remain one.
    """
    if array.size < 2 or not constant(array):
        return array
    noise = np.random.default_rng(array.size).standard_normal(array.size, dtype=np.float32)
    return np.asarray(array + 0.1 * noise.reshape(array.shape).astype(array.dtype))


def effective(
    checkpoint: Checkpoint, search: Search, changes: list[Change], runs: Runs, given: Given
) -> list[list[Change]]:
    """The changes that matter, then without each of those that only show in activations."""
    kept, unseen = list(changes), []
    for change in changes:
        rest = [each for each in kept if each is not change]
        if search.wrong(rest):
            continue
        if _shows(checkpoint, change, runs, given):
            unseen.append(change)
        else:
            kept = rest
    attempts = [[each for each in kept if each not in left] for left in ([], *([each] for each in unseen), unseen)]
    distinct = [each for number, each in enumerate(attempts) if each not in attempts[:number]]
    return [each for each in distinct if search.wrong(each) == 0]


def _shows(checkpoint: Checkpoint, change: Change, runs: Runs, given: Given) -> bool:
    """Whether a field, changed alone, changes the shapes of what the source's model computes."""
    try:
        model = built(checkpoint, [change]).float()
        fill(model, {name: lambda a=a: a for name, a in {**runs.tensors, **given.others}.items()})  # type: ignore[misc]
        steps, _ = record(model, runs.feeds)
    except Exception:  # a model whose sizes do not fit one another raises whatever it likes: the field matters
        return True
    return [(s.name, s.shapes) for s in steps] != [(s.name, s.shapes) for s in runs.steps]


def fill(model: Any, tensors: Mapping[str, Callable[[], Array]]) -> None:
    """Put tensors into a model; what is not given is zero."""
    with torch.no_grad():
        for name, each in stored_tensors(model).items():
            if name in tensors:
                each.copy_(torch.from_numpy(np.array(_float32(tensors[name]()))))
            elif each.is_floating_point() and name in dict(model.named_parameters()):
                each.zero_()


def _float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def measured(
    checkpoint: Checkpoint,
    changes: Sequence[Change],
    assembly: Assembly,
    stored: Mapping[str, Source],
    runs: Runs,
    grown: Grown,
) -> dict[str, Compensation]:
    """What must be folded into the grown checkpoint's tensors."""
    model = built(checkpoint, changes).float()
    fill(model, assembly.fresh(stored, runs.tensors))
    names = {id(each): name for name, each in stored_tensors(model).items() if each.is_floating_point()}
    ratios = {
        index // size
        for index, size in ((each.grown, each.size) for each in grown.plan.maps.values())
        if index % size == 0
    }
    try:
        found = compensations(model, runs.feeds, runs.steps, names, ratios, assembly.scales())
    except (RuntimeError, ValueError, IndexError, TypeError) as problem:
        shown = ", ".join(f"{each.name}={each.after}" for each in changes)
        raise DoesNotRun(
            f"{checkpoint.folder}: its model does not run with {shown} ({first_line(problem)})"
        ) from problem
    finally:
        del model
        gc.collect()
    absent = next((name for name in found if name not in assembly.layouts and name not in assembly.repeated), None)
    if absent is not None:
        raise Refused(f"{checkpoint.folder}: {absent}, which the checkpoint does not have, would have to be scaled")
    return found
