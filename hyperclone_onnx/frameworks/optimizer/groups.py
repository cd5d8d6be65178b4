"""Parameter groups of torch optimizers for a grown model, and the clipping of its gradient.

    optimizer = torch.optim.AdamW(adamw_groups(model, lr=3e-4, weight_decay=0.1))

`lr`, `weight_decay` and the like are the settings of the *source's* training. Each group has those with which its
tensors move as the source's tensors would. So with the grown moments (see `resume`) a model that was grown
symmetrically repeats the source's further training step by step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from hyperclone_onnx.analysis.trainable import matches
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE, NAME, continuations_in
from hyperclone_onnx.frameworks.compiled_model import PathLike
from hyperclone_onnx.frameworks.continuation import (
    Continuation,
    Parametrisation,
    adafactor_factors,
    adamw_factors,
    muon_factors,
    sgd_factors,
)

Group = dict[str, Any]
Settings = Callable[[Continuation, float], Group]
"""(a tensor's continuation, its weight decay) -> the settings of its group."""


def adamw_groups(
    model: Any,
    *,
    lr: float,
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    continue_from: Literal["source"] = "source",
    parametrisation: Parametrisation = "exact",
    no_decay: Sequence[str] = (),
    folder: PathLike | None = None,
) -> list[Group]:
    """Groups for ``torch.optim.AdamW`` with which a grown model goes on as its source would.

    Args:
        model: a module of `frameworks.torch.load`, also sharded; or another module with `folder`.
        lr: the learning rate of the source.
        weight_decay: the decoupled weight decay of the source.
        eps: the eps of the source.
        continue_from: the model to whose training the settings belong; the source is the only choice.
        parametrisation: "exact", or "mup": the rate is divided by the growth of the fan-in (Yang et al., arXiv
            2203.03466, table 3) and nothing else changes. The two differ where growth multiplies a tensor by a number.
        no_decay: globs of parameter names that have no weight decay.
        folder: the folder that ``handoff`` wrote, whose manifest says how the parameters grew. A model of Hugging Face
            needs it.

    Returns:
        One group for each set of settings, with the parameters' names. Parameters that are not trained are left out.

    Raises:
        BadRequest: the model was not grown, or the folder's manifest lacks a parameter.
        BadModel: the folder has no readable manifest.
    """
    del continue_from

    def settings(tensor: Continuation, decay: float) -> Group:
        factors = adamw_factors(tensor, parametrisation)
        return {"lr": lr * factors.rate, "eps": eps * factors.eps, "weight_decay": decay * factors.weight_decay}

    return _groups(model, folder, weight_decay, no_decay, settings)


def sgd_groups(
    model: Any,
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    folder: PathLike | None = None,
) -> list[Group]:
    """Groups for ``torch.optim.SGD``, with or without momentum.

    The arguments and errors are those of `adamw_groups`.
    """

    def settings(tensor: Continuation, decay: float) -> Group:
        factors = sgd_factors(tensor)
        return {"lr": lr * factors.rate, "weight_decay": decay * factors.weight_decay}

    return _groups(model, folder, weight_decay, no_decay, settings)


def muon_groups(
    model: Any,
    *,
    lr: float,
    weight_decay: float = 0.1,
    adjust_lr_fn: str | None = None,
    names: Sequence[str] = ("*",),
    folder: PathLike | None = None,
) -> list[Group]:
    """Groups for ``torch.optim.Muon``, of the trained matrices among `names`.

    Muon makes all singular values of a matrix's gradient equal (Jordan et al., 2024). The other parameters, and often
    embeddings and heads, belong to an AdamW beside it.

    Args:
        model: see `adamw_groups`.
        lr: the learning rate of the source.
        weight_decay: the decoupled weight decay of the source.
        adjust_lr_fn: the same as for ``torch.optim.Muon``.
        names: globs of parameter names.
        folder: see `adamw_groups`.

    Raises:
        BadRequest, BadModel: see `adamw_groups`.
    """

    def settings(tensor: Continuation, decay: float) -> Group:
        factors = muon_factors(tensor, adjust_lr_fn)
        return {"lr": lr * factors.rate, "weight_decay": decay * factors.weight_decay}

    def is_matrix(name: str, parameter: Any) -> bool:
        return parameter.ndim == 2 and matches(name, names)

    return _groups(model, folder, weight_decay, (), settings, is_matrix)


def adafactor_groups(
    model: Any,
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: tuple[float | None, float] = (None, 1e-3),
    no_decay: Sequence[str] = (),
    folder: PathLike | None = None,
) -> list[Group]:
    """Groups for ``torch.optim.Adafactor``, whose rate is relative to the size of the weights.

    The arguments and errors are those of `adamw_groups`. `eps` is (eps1, eps2) of the source, and None stands for the
    smallest positive number of the parameter's type, as in torch.
    """

    def settings(tensor: Continuation, decay: float) -> Group:
        factors = adafactor_factors(tensor)
        first = None if eps[0] is None else eps[0] * factors.eps1
        return {"lr": lr, "eps": (first, eps[1] * factors.eps2), "weight_decay": decay}

    return _groups(model, folder, weight_decay, no_decay, settings)


def clip_grad_norm(model: Any, max_norm: float, *, folder: PathLike | None = None) -> Any:
    """Clip the gradient of a grown model as the source's would be clipped: by the norm of the source's gradient.

    A global norm over the grown model's parameters counts each copy, so it is not the source's norm. Here the squares
    of each tensor are multiplied by the number that undoes the copies.

    Args:
        model: see `adamw_groups`.
        max_norm: the largest norm, as in the source's training.
        folder: see `adamw_groups`.

    Returns:
        The norm before clipping, as a tensor without dimensions.

    Raises:
        BadRequest, BadModel: see `adamw_groups`.
    """
    import torch

    gradients = [
        (parameter.grad, tensor.norm) for _, parameter, tensor in _trained(model, folder) if parameter.grad is not None
    ]
    norms = [torch.linalg.vector_norm(gradient.detach()) * math.sqrt(factor) for gradient, factor in gradients]
    if not norms:
        return torch.tensor(0.0)
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]  # of sharded parameters
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    limit = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient, _ in gradients:
        gradient.mul_(limit.to(gradient.device, gradient.dtype))
    return total


def continuations_of(model: Any, folder: PathLike | None = None) -> dict[str, Continuation]:
    """How each trained parameter follows the source, by its name.

    Raises:
        BadRequest, BadModel: see `adamw_groups`.
    """
    return {name: tensor for name, _, tensor in _trained(model, folder)}


def not_exact(model: Any, folder: PathLike | None = None) -> dict[str, str]:
    """The trained parameters that do not follow the source exactly, with the reasons. Their settings are means.

    Raises:
        BadRequest, BadModel: see `adamw_groups`.
    """
    return {name: tensor.reason for name, tensor in continuations_of(model, folder).items() if not tensor.exact}


def _groups(
    model: Any,
    folder: PathLike | None,
    weight_decay: float,
    no_decay: Sequence[str],
    settings: Settings,
    chosen: Callable[[str, Any], bool] = lambda *_: True,
) -> list[Group]:
    members: dict[tuple[tuple[str, Any], ...], list[tuple[str, Any]]] = defaultdict(list)
    for name, parameter, tensor in _trained(model, folder):
        if chosen(name, parameter):
            decay = 0.0 if matches(name, no_decay) else weight_decay
            members[tuple(settings(tensor, decay).items())].append((name, parameter))
    return [{"params": parameters, **dict(values)} for values, parameters in members.items()]


def _trained(model: Any, folder: PathLike | None) -> Iterator[tuple[str, Any, Continuation]]:
    known = _known(model, folder)
    for name, parameter in _named(model):
        if not parameter.requires_grad:
            continue
        if name not in known:
            where = "the model's plan" if folder is None else f"{folder}: the manifest"
            raise BadRequest(f"{where} does not say how the parameter {name!r} grew. Is it another model's?")
        yield name, parameter, known[name]


def _named(model: Any) -> Iterable[tuple[str, Any]]:
    return [(name.removeprefix("_orig_mod."), parameter) for name, parameter in model.named_parameters()]


def _known(model: Any, folder: PathLike | None) -> Mapping[str, Continuation]:
    if folder is not None:
        manifests = [Path(folder) / name for name in (HUGGING_FACE, NAME)]
        return _read(Path(folder), tuple(path.stat().st_mtime_ns for path in manifests if path.is_file()))
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module
    known: Mapping[str, Continuation] | None = getattr(model, "continuations", None)
    if known is None:
        raise BadRequest(
            "the model does not say how it grew: load a grown file with hyperclone_onnx.frameworks.torch.load, "
            "or give folder=, the folder that handoff wrote"
        )
    return known


@lru_cache(maxsize=4)
def _read(folder: Path, _modified: tuple[int, ...]) -> Mapping[str, Continuation]:
    """What a folder's manifest says. `clip_grad_norm` asks in every step, so it is read once."""
    return continuations_in(folder)
