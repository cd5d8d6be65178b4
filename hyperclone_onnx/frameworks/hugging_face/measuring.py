"""Run the grown model and its source, to decide which settings matter and which factors its tensors need."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hyperclone_onnx.errors import Refused, first_line
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, values
from hyperclone_onnx.frameworks.hugging_face.assembly import Assembly, Given
from hyperclone_onnx.frameworks.hugging_face.checking import Feeding, Outputs, outputs, torch_feeds
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, in_torch, stored_tensors
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, Search, built
from hyperclone_onnx.frameworks.hugging_face.matching import constant
from hyperclone_onnx.frameworks.hugging_face.recording import Step, floating_outputs, record, run_model
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation, DerivedNumbers, compensations
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.validation.inputs.cases import Case

Array = npt.NDArray[Any]

EQUAL = 1e-3
"""The largest difference of models that need no factors, relative to the largest output. Wrong constants move more."""

CASES = 3
"""The number of input sets on which models are compared."""


class DoesNotRun(Refused):
    """The model cannot run with the sizes of a changed configuration."""


Compared = list[tuple[Case, Outputs]]
"""Input sets with the outputs of the source's model."""


def expected(given: Given, fed: Feeding, checkpoint: Checkpoint) -> Compared:
    """The outputs of the source's model on the first input sets that it accepts.

    Raises:
        Refused: the model runs on none of the input sets.
    """
    model = given.model.float()
    compared: Compared = []
    problem: Exception | None = None
    for case in fed.cases:
        try:
            compared.append((case, outputs(model, case)))
        except (RuntimeError, ValueError, IndexError) as failure:
            problem = failure
        if len(compared) == CASES:
            break
    if not compared:
        raise Refused(f"{checkpoint.folder}: the model does not run on any of the inputs that we tried ({problem})")
    return compared


@dataclass
class Runs:
    """The source's model, or a part of its layers, as it was recorded on one input set."""

    steps: list[Step]
    feeds: dict[str, Any]
    """The input set, as tensors of PyTorch."""
    tensors: dict[str, Array | StoredArray]
    """The checkpoint's tensors. Those that the recorded model has are as they were in it: with noise if constant."""
    names: frozenset[str]
    """The names of the tensors that the recorded model has."""
    result: Mapping[str, Any]
    """The floating outputs of the model while it was recorded, by name."""

    @staticmethod
    def of(checkpoint: Checkpoint, case: Case, given: Given, doubtful: Collection[str]) -> Runs:
        """Build a model and record it.

        Args:
            checkpoint: the source's checkpoint, or the same with fewer layers.
            case: the input set.
            given: the source's tensors.
            doubtful: tensors that more than one layout fits. They get no noise, because the noise would have to grow
                as they do.
        """
        model = built(checkpoint, ()).float()
        feeds = torch_feeds(case, model)
        names = frozenset(stored_tensors(model))
        tensors = {
            name: array if name in doubtful or name not in names else _with_noise_if_constant(array)
            for name, array in given.floating.items()
        }
        fill(model, readers(tensors, given.others))
        steps, result = record(model, feeds)
        return Runs(steps, feeds, tensors, names, result)


def readers(*several: Mapping[str, Array | StoredArray]) -> dict[str, Callable[[], Array]]:
    """Functions that give the arrays of mappings, by name."""
    return {name: partial(values, array) for arrays in several for name, array in arrays.items()}


def _with_noise_if_constant(array: Array | StoredArray) -> Array | StoredArray:
    """The tensor, with noise added if all its elements are equal.

    The scale of zeros cannot be measured. Tensors of equal size get the same noise, so that tensors that are equal
    stay equal: the ONNX file may store them once.
    """
    if array.size < 2 or not constant(values(array)):
        return array
    noise = np.random.default_rng(array.size).standard_normal(array.size, dtype=np.float32)
    return np.asarray(values(array) + 0.1 * noise.reshape(array.shape).astype(array.dtype))


def effective(
    checkpoint: Checkpoint, search: Search, changes: list[Change], runs: Runs, given: Given
) -> list[list[Change]]:
    """Sets of changes to try, the likeliest first. With each of them all tensors have the wanted shapes.

    A change that affects neither a tensor's shape nor an activation's shape is left out of all sets. The first set has
    all other changes. The next sets leave out changes that affect only shapes of activations: each one alone, and then
    all of them.
    """
    kept, unseen = list(changes), []
    for change in changes:
        rest = [other for other in kept if other is not change]
        if search.wrong(rest):
            continue
        if _shows(checkpoint, change, runs, given):
            unseen.append(change)
        else:
            kept = rest
    attempts = [
        [change for change in kept if change not in omitted]
        for omitted in ([], *([change] for change in unseen), unseen)
    ]
    distinct = [attempt for number, attempt in enumerate(attempts) if attempt not in attempts[:number]]
    return [attempt for attempt in distinct if search.wrong(attempt) == 0]


def _shows(checkpoint: Checkpoint, change: Change, runs: Runs, given: Given) -> bool:
    """Whether a change, made alone, affects the operators of the source's model or the shapes of their results."""
    try:
        model = built(checkpoint, [change]).float()
        fill(model, readers(runs.tensors, given.others))
        steps, _ = record(model, runs.feeds, lambda _: None)
    except Exception:  # a model whose sizes do not fit together may raise any exception, and then the field matters
        return True
    return [(step.name, step.shapes) for step in steps] != [(step.name, step.shapes) for step in runs.steps]


def fill(model: Any, tensors: Mapping[str, Callable[[], Array]]) -> None:
    """Copy tensors into a model. Floating parameters that are not given become zero.

    Args:
        model: the model in PyTorch, whose tensors are overwritten.
        tensors: by name, functions that make the arrays. One array at a time is in memory.
    """
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            if name in tensors:
                tensor.copy_(torch.from_numpy(np.array(in_torch(tensors[name]()))))
            elif tensor.is_floating_point() and name in dict(model.named_parameters()):
                tensor.zero_()


def _needs_no_factors(model: Any, runs: Runs) -> bool:
    """Whether the grown model, as it is, gives the recorded outputs. Outputs that grow cannot be compared."""
    try:
        result = floating_outputs(run_model(model, runs.feeds))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    pairs = [(result[name], output) for name, output in runs.result.items() if name in result]
    return bool(pairs) and all(
        ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= EQUAL * theirs.abs().max())
        for ours, theirs in pairs
    )


def another_growth(plan: Plan, shape: Sequence[int]) -> str:
    """What to grow instead, if numbers that a model derives from its sizes prevent a growth.

    Such numbers come from the residual stream's width (sinusoidal positions), which must stay then; or from the number
    of heads (ALiBi's slopes) or the size of a head (rotary angles), and then the other one of the two may grow.

    Args:
        plan: the plan of the growth.
        shape: the shape of the tensor with these numbers, in the grown model.
    """
    if any(dim.role == "hidden" and dim.map.grown in shape for dim in plan.dims.values()):
        return "grow other dimensions than hidden, such as --set ffn=2"
    factors = {
        dim.role: dim.map.grown // dim.map.size for dim in plan.dims.values() if dim.map.grown % dim.map.size == 0
    }
    grown = [role for role in ("heads", "head_dim") if role in factors]
    if len(grown) != 1 or not set(factors) <= {"hidden", "heads", "head_dim", "ffn"}:
        return "grow other dimensions with --set"
    other, words = {
        "heads": ("head_dim", "the size of a head instead of the number of heads"),
        "head_dim": ("heads", "the number of heads instead of the size of a head"),
    }[grown[0]]
    wanted = {other if role == grown[0] else role: factor for role, factor in factors.items()}
    return f"try {words}: {' '.join(f'--set {role}={factor}' for role, factor in wanted.items())}"


def measured(
    checkpoint: Checkpoint,
    changes: Sequence[Change],
    assembly: Assembly,
    stored: Mapping[str, Source],
    runs: Runs,
    grown: Grown,
) -> dict[str, Compensation]:
    """The factors that must be folded into the grown checkpoint's tensors, by name.

    Args:
        checkpoint: the source's checkpoint.
        changes: the changes of its configuration.
        assembly: how the grown tensors are made.
        stored: the initializers as the source has them.
        runs: the recording of the source's model.
        grown: the grown ONNX file.

    Raises:
        DoesNotRun: the model does not run with these changes.
        Refused: no factors make the models equal, or a tensor would need one that the checkpoint does not have.
    """
    model = built(checkpoint, changes).float()
    fill(model, assembly.fresh(stored, runs.tensors))
    # Stretched channels differ in scale, so that no tensor on their way has one scale that could be measured.
    if grown.plan.stretched and _needs_no_factors(model, runs):
        return {}
    names = {id(tensor): name for name, tensor in stored_tensors(model).items() if tensor.is_floating_point()}
    ratios = {
        after // before
        for after, before in ((dim.grown, dim.size) for dim in grown.plan.maps.values())
        if after % before == 0
    }
    try:
        folded = compensations(model, runs.feeds, runs.steps, names, ratios, assembly.scales())
    except DerivedNumbers as problem:
        raise Refused(f"{problem}; {another_growth(grown.plan, problem.shape)}") from problem
    except (RuntimeError, ValueError, IndexError, TypeError) as problem:
        shown = ", ".join(f"{change.name}={change.after}" for change in changes)
        raise DoesNotRun(
            f"{checkpoint.folder}: its model does not run with {shown} ({first_line(problem)})"
        ) from problem
    finally:
        del model
        gc.collect()
    absent = next((name for name in folded if name not in assembly.layouts and name not in assembly.repeated), None)
    if absent is not None:
        raise Refused(f"{checkpoint.folder}: the checkpoint does not have {absent}, which would need a factor")
    return folded
