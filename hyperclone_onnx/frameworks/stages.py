"""Grow a model while it trains: from one size to the next in one process, without files.

    training = Training.begin("small.onnx", lr=3e-4, weight_decay=0.1)
    ...                                    # train training.model with training.optimizer
    training = training.grow(factor=2)     # larger, at the same loss; the optimizer goes on
    ...
    training.save_checkpoint("step-1000")  # Training.resume("step-1000") goes on from there, at the grown size

The weights grow by a plan, AdamW's moments by the dual of that plan (`optimizer.moments`), and each tensor gets the
settings with which it moves as its source did (`continuation`). So a symmetric growth to whole multiples changes
nothing: the grown training takes the steps that the small one would have taken. With noise, the default, the clones
part from there.

The way of one tensor W of the small model through `grow`: its parameter in `training.model` -> the numbers of the
initializer W of `training.graph` -> by the plan's recipe, the numbers of a grown initializer W' -> the parameter of the
new model. Its moments take the same way with the dual recipe. Its settings are those of W, times those that follow
from the recipe; so a model may grow several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.expansion.expanding import grown_model
from hyperclone_onnx.frameworks import MissingExtra
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import from_torch
from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model
from hyperclone_onnx.frameworks.continuation import Continuation, composed
from hyperclone_onnx.frameworks.optimizer.groups import adamw_groups, clip_grad_norm
from hyperclone_onnx.frameworks.optimizer.growing import deepened_moments
from hyperclone_onnx.frameworks.optimizer.moments import Moments, forget, grow_moments
from hyperclone_onnx.frameworks.optimizer.saved_state import load_torch_file
from hyperclone_onnx.frameworks.torch import OnnxModule, as_torch, load
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.publishing.publication import publication, publication_folder
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.in_memory import IN_MEMORY, GivenModel, path_of, taken
from hyperclone_onnx.transforms.interface import Placed, places_of
from hyperclone_onnx.transforms.layers import deepened
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.writing import onnx_files as writer
from hyperclone_onnx.writing.onnx_files import needs_data_file

try:
    import torch
except ImportError as problem:
    raise MissingExtra("torch", problem) from problem


CHECKPOINT_MODEL, CHECKPOINT_STATE = "model.onnx", "training.pt"
"""The files of a checkpoint."""


@dataclass(frozen=True)
class Settings:
    """The settings of AdamW for the model that the training began with. Each tensor gets its own from these."""

    weight_decay: float = 1e-2
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    no_decay: tuple[str, ...] = ()
    """Globs of parameter names without weight decay. A grown model has the names of its source."""


@dataclass(frozen=True)
class Training:
    """A training run that may grow: a model, its optimizer, and the graph that the model was made from.

    Make it with `begin`, and after `grow` use only what that gives: the old model's memory is then free.
    """

    model: OnnxModule
    optimizer: Any
    """A ``torch.optim.AdamW``, whose groups have the settings of their tensors."""
    graph: ir.Model
    """The model as ONNX. Its trained tensors read the parameters of `model`, so it can be saved at any time."""
    settings: Settings
    rate: float
    """The learning rate of the model that the training began with; see `set_rate`."""

    @staticmethod
    def begin(
        model: GivenModel,
        *,
        lr: float,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        no_decay: Sequence[str] = (),
        device: Any = None,
    ) -> Training:
        """Load a model and make its AdamW.

        Args:
            model: the path of an ONNX file, an ``onnx.ModelProto`` or an ``onnx_ir.Model``. If it was grown, the
                settings are those of its source, as for `adamw_groups`.
            lr: the learning rate.
            weight_decay: the decoupled weight decay.
            eps: AdamW's eps.
            betas: AdamW's betas.
            no_decay: globs of parameter names without weight decay.
            device: where to put the parameters; the CPU by default.

        Raises:
            BadModel, Refused, MissingExtra: see `frameworks.torch.load`.
        """
        graph = taken(model) if isinstance(model, IN_MEMORY) else loading.load(path_of(model))
        module = load(graph.clone(), device=device)
        settings = Settings(weight_decay, eps, betas, tuple(no_decay))
        return _with_optimizer(module, graph, settings, lr)

    def set_rate(self, lr: float) -> None:
        """Set the learning rate, as a schedule asks for it. Each group gets this rate times the factor of its tensors.

        `lr` is the rate of the model that the training began with. So a schedule goes on through all growths.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate_factor"]
        object.__setattr__(self, "rate", lr)

    def clip(self, max_norm: float) -> Any:
        """Clip the gradient by the norm that the gradient of the first model would have. Returns that norm."""
        return clip_grad_norm(self.model, max_norm)

    def save(self, path: PathLike) -> None:
        """Write the model, as it is trained so far, as an ONNX file.

        Raises:
            CannotWrite: the file cannot be written.
        """
        with publication(Path(path)) as written:
            writer.save(self.graph, written, external=needs_data_file(self.graph))

    def save_checkpoint(self, folder: PathLike) -> None:
        """Write all that `resume` needs: the model as ONNX, AdamW's state, and the settings of each tensor.

        The folder appears when it is complete.

        Args:
            folder: a folder that does not exist yet, or an empty one.

        Raises:
            BadRequest: the folder has something in it.
            CannotWrite: it cannot be written.
        """
        state = {
            "optimizer": self.optimizer.state_dict(),
            "settings": asdict(self.settings),
            "rate": self.rate,
            "continuations": {path: asdict(known) for path, known in self.model.continuations.items()},
        }
        with publication_folder(Path(folder)) as written:
            writer.save(self.graph, written / CHECKPOINT_MODEL, external=needs_data_file(self.graph))
            torch.save(state, written / CHECKPOINT_STATE)

    @staticmethod
    def resume(folder: PathLike, *, device: Any = None) -> Training:
        """Go on from a checkpoint of `save_checkpoint`, at the size that the model had then.

        Args:
            folder: the checkpoint.
            device: where to put the parameters; the CPU by default.

        Raises:
            BadRequest: the folder is no such checkpoint.
            BadModel, Refused: its model cannot be loaded.
        """
        model, state = Path(folder) / CHECKPOINT_MODEL, Path(folder) / CHECKPOINT_STATE
        if not (model.is_file() and state.is_file()):
            raise BadRequest(
                f"{folder}: not a checkpoint of Training.save_checkpoint: it lacks {CHECKPOINT_MODEL} or "
                f"{CHECKPOINT_STATE}"
            )
        saved = load_torch_file(state)
        try:
            settings = Settings(**{**saved["settings"], "no_decay": tuple(saved["settings"]["no_decay"])})
            known = {path: Continuation(**fields) for path, fields in saved["continuations"].items()}
            optimizer, rate = saved["optimizer"], float(saved["rate"])
        except (KeyError, TypeError, ValueError) as problem:
            raise BadRequest(f"{state}: not written by Training.save_checkpoint: {problem!r}") from None
        graph = loading.load(model)
        module = load(graph.clone(), device=device)
        if known.keys() != module.continuations.keys():
            raise BadRequest(f"{folder}: {CHECKPOINT_MODEL} and {CHECKPOINT_STATE} belong to different models")
        module.continuations = known
        result = _with_optimizer(module, graph, settings, rate)
        result.optimizer.load_state_dict(optimizer)
        return result

    def grow(self, factor: float | None = None, **request: Any) -> Training:
        """Grow the model and go on: weights, moments, step counts, learning rates and weight decays.

        Nothing is written and nothing is run. To validate a growth, grow a file of the same graph with `expand`.

        Args:
            factor: the factor of all widths.
            request: further arguments of `expand` that say what grows and how: `requests`, `sizes`, `like`, `maps`,
                `strategy`, `layers`, `depth`, `untie`, `allow_change` and the like.

        Returns:
            The grown training. The learning rate stays as it is. New layers that add nothing yet begin with moments of
            zero.

        Raises:
            BadRequest, Refused: the model cannot grow so; see `expand`.
        """
        plan, grown = grown_model(self.graph, factor, **request)
        compiled = compile_model(grown.clone())
        model = OnnxModule(compiled).materialize(next(iter(self.model.parameters())).device)
        places = places_of(source_of(self.graph, plan.transforms).model.graph) if deepened(plan.transforms) else {}
        before = {self.model.initializers[path]: known for path, known in self.model.continuations.items()}
        model.continuations = {
            path: composed(before[_origin(name, plan, places)], model.continuations[path])
            for path, name in model.initializers.items()
        }
        result = _with_optimizer(model, grown, self.settings, self.rate)
        _carry_moments(self, result, plan, places)
        return result


def _with_optimizer(model: OnnxModule, graph: ir.Model, settings: Settings, rate: float) -> Training:
    """A training of a model, with an optimizer that has taken no step."""
    groups = adamw_groups(
        model, lr=1.0, weight_decay=settings.weight_decay, eps=settings.eps, no_decay=settings.no_decay
    )
    for group in groups:
        group["rate_factor"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas)
    for path, name in model.initializers.items():
        _read_from(graph.graph.initializers[name], model.get_parameter(path))
    training = Training(model, optimizer, graph, settings, rate)
    training.set_rate(rate)
    return training


def _read_from(value: ir.Value, parameter: Any) -> None:
    """Let a stored tensor of a graph read a parameter."""
    stored = value.const_value
    assert stored is not None

    def read(dtype: ir.DataType, name: str | None) -> Any:
        return ir.Tensor(from_torch(parameter.detach().cpu())(), dtype=dtype, name=name)

    shape = ir.Shape(stored.shape.numpy())
    value.const_value = ir.LazyTensor(
        partial(read, stored.dtype, value.name), dtype=stored.dtype, shape=shape, name=value.name
    )


def _origin(name: str, plan: Plan, places: Mapping[str, Placed]) -> str:
    """The tensor of the smaller model that a tensor of the grown model is, or is a copy of."""
    recipe = plan.tensors.get(name)
    source = name if recipe is None else recipe.source
    return places[source].source if source in places else source


def _carry_moments(old: Training, new: Training, plan: Plan, places: Mapping[str, Placed]) -> None:
    """Grow the moments of one optimizer into another. Parameters without moments begin without."""
    moments: dict[str, Moments] = {}
    for path, name in old.model.initializers.items():
        state = old.optimizer.state.get(old.model.get_parameter(path), {})
        if state:
            first, second = (from_torch(state[key]) for key in ("exp_avg", "exp_avg_sq"))
            moments[name] = Moments(first, second, float(state["step"]))
    grown = grow_moments(plan, deepened_moments(moments, places, counts_each=True))
    try:
        for path, name in new.model.initializers.items():
            parameter = new.model.get_parameter(path)
            if name in grown and parameter.requires_grad:
                new.optimizer.state[parameter] = {
                    "step": torch.tensor(grown[name].step),
                    "exp_avg": as_torch(grown[name].first.numpy()).to(parameter),
                    "exp_avg_sq": as_torch(grown[name].second.numpy()).to(parameter),
                }
    finally:
        forget()
