"""Training runs and their initial models. A lab does each run once, several at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from growing.corpus import write_tokens
from growing.network import BYTES, HEAD, Shape, export
from growing.results import read_curve
from growing.tasks import Point, Recipe, Task
from growing.training import train
from hyperclone_onnx import Experts, Plan, Strategy, expand, validate_files
from hyperclone_onnx.frameworks.compiled_model import compile_model
from hyperclone_onnx.frameworks.optimizer.growing import write_optimizer
from hyperclone_onnx.plan.strategies import StrategyName


@dataclass(frozen=True)
class Random:
    """Starts from random weights."""

    shape: Shape
    seed: int


@dataclass(frozen=True)
class Continued:
    """Starts from the trained model of another run."""

    run: Run

    @property
    def shape(self) -> Shape:
        return self.run.shape


@dataclass(frozen=True)
class Grown:
    """Starts from the trained model of another run, grown."""

    run: Run
    strategy: StrategyName | Literal["uneven", "aki"] = "noisy-symmetric"
    """`uneven` is symmetric, but with a random share between a quarter and three quarters of each weight."""
    snr_db: float = 10.0
    factor: int = 2
    only: Literal["", "heads", "ffn"] = ""
    to: Shape | None = None
    """The shape to grow to: of any size and depth. None for the factor."""
    state: Literal["reset", "carried", "half"] = "reset"
    """The part of the optimizer's state that the run keeps: nothing, all, or all except the state of later clones."""
    seed: int = 0

    @property
    def shape(self) -> Shape:
        small = self.run.shape
        if self.to is not None:
            return self.to
        hidden, heads, ffn = (1 if self.only not in ("", role) else self.factor for role in ("hidden", "heads", "ffn"))
        return replace(small, width=small.width * hidden, attention=small.attention * heads, ffn=small.ffn * ffn)


@dataclass(frozen=True)
class Upcycled:
    """Starts from the trained model of another run, with experts instead of its feed-forward blocks."""

    run: Run
    experts: int
    chosen: int
    """The number of experts that compute for each token."""
    seed: int = 0

    @property
    def shape(self) -> Shape:
        """The shape of a dense model with as many FLOPs for each token."""
        small = self.run.shape
        return replace(small, ffn=small.ffn * self.chosen)


@dataclass(frozen=True)
class Run:
    """A training run: its initial model, its recipe and its number of steps."""

    start: Random | Continued | Grown | Upcycled
    recipe: Recipe
    steps: int
    seed: int = 0
    """The seed for the order of the data."""
    framework: str = "torch"

    @property
    def shape(self) -> Shape:
        return self.start.shape

    @property
    def key(self) -> str:
        """The name of its folder."""
        return f"{type(self.start).__name__.lower()}-{self.shape.width}-{self.steps}-{_digest(self)}"


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    run: Run
    curve: tuple[Point, ...]
    folder: Path
    flops_before: float
    """The FLOPs of the runs that this one builds on."""

    @property
    def loss(self) -> float:
        """The loss at the end."""
        return self.curve[-1].loss

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.folder / "model.onnx"


@dataclass(frozen=True)
class Settings:
    """The settings that all runs of a lab share."""

    batch: int
    evaluations: int
    examined: int
    device: str = "cpu"
    """On a GPU, PyTorch computes in bfloat16 (autocast)."""


class Lab:
    """Does runs in a folder. A run whose results are there is not repeated.

    Args:
        folder: the folder of all runs.
        settings: the settings of all runs.
        workers: the number of runs at the same time; a run uses one thread.
        progress: called with the finished steps, the total number of steps, and the name of the stage.
    """

    def __init__(
        self, folder: Path, settings: Settings, workers: int, progress: Callable[[int, int, str], None]
    ) -> None:
        self.folder, self.settings, self.workers, self.progress = folder, settings, workers, progress
        self.outcomes: dict[Run, Outcome] = {}

    def do(self, runs: Iterable[Run], stage: str) -> list[Outcome]:
        """Do runs, and before them the runs that they build on."""
        runs = list(runs)
        missing = [run for run in dict.fromkeys(runs) if run not in self.outcomes]
        before = [run.start.run for run in missing if not isinstance(run.start, Random)]
        if before:
            self.do(before, f"{stage}: sources")
        if missing:
            self._do_all(missing, stage)
        return [self.outcomes[run] for run in runs]

    def tokens(self, run: Run, steps: float) -> float:
        """The number of bytes that a run reads in `steps` steps."""
        return steps * self.settings.batch * run.shape.length

    def flops(self, run: Run, steps: float) -> float:
        """The number of floating-point operations of `steps` steps."""
        return self.tokens(run, steps) * run.shape.flops()

    def model(self, run: Run) -> Path:
        """The model that a run starts from."""
        return self._start(run)[0]

    def _do_all(self, runs: Sequence[Run], stage: str) -> None:
        context = multiprocessing.get_context("spawn")
        unfinished = [run for run in runs if not (self._folder(run) / "result.json").exists()]
        total = sum(run.steps for run in runs)
        done = total - sum(run.steps for run in unfinished)
        self.progress(done, total, stage)
        if unfinished:
            with context.Manager() as manager, ProcessPoolExecutor(self.workers, context, _begin) as pool:
                queue = manager.Queue()
                waiting: set[Future[None]] = {
                    pool.submit(_work, self._task(run), self._folder(run), queue) for run in unfinished
                }
                while waiting:
                    ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    while not queue.empty():
                        done += queue.get()
                    self.progress(done, total, stage)
                    for future in ended:
                        future.result()
        for run in runs:
            self.outcomes[run] = self._outcome(run)

    def _folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.key

    def _outcome(self, run: Run) -> Outcome:
        before, folder = 0.0, self._folder(run)
        if not isinstance(run.start, Random):
            parent = run.start.run
            before = self.outcomes[parent].flops_before + self.flops(parent, parent.steps)
        return Outcome(run, tuple(read_curve(folder)), folder, before)

    def _task(self, run: Run) -> Task:
        settings = self.settings
        model, optimizer = self._start(run)
        return Task(
            model,
            run.recipe,
            run.steps,
            run.seed,
            batch=settings.batch,
            length=run.shape.length,
            evaluations=settings.evaluations,
            examined=settings.examined,
            optimizer=optimizer,
            framework=run.framework,
            device=settings.device,
            tokens=self.tokens_file(run.shape),
        )

    def tokens_file(self, shape: Shape) -> Path | None:
        """The file with the tokens that a model of this shape reads; None for bytes."""
        return None if shape.vocabulary == BYTES else write_tokens(shape.vocabulary, self.folder)

    def _start(self, run: Run) -> tuple[Path, Path | None]:
        start = run.start
        folder = self.folder / "starts"
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(start, Random):
            model = folder / f"random-{start.shape.width}-{start.seed}-{_digest(start)}.onnx"
            if not model.exists():
                export(start.shape, start.seed, model.with_suffix(".partial"))
                model.with_suffix(".partial").replace(model)
            return model, None
        parent = self._folder(start.run)
        if isinstance(start, Continued):
            return parent / "model.onnx", None
        if isinstance(start, Upcycled):
            model = folder / f"experts-{_digest(start)}.onnx"
            if not model.exists():
                partial = model.with_suffix(".partial.onnx")
                expand(parent / "model.onnx", partial, experts=Experts(start.experts, start.chosen, seed=start.seed))
                partial.replace(model)
            return model, None
        weights = replace(start, state="reset")
        model = folder / f"grown-{_digest(weights)}.onnx"
        if not model.exists():
            name = "symmetric" if start.strategy == "uneven" else start.strategy
            partial = model.with_suffix(".partial.onnx")
            strategy = Strategy(name, start.snr_db, start.seed)
            expand(parent / "model.onnx", partial, **_growth(start), strategy=strategy, allow_change=name == "aki")
            if start.strategy == "uneven":
                _share_unevenly(partial, start.seed)
                validation = validate_files(parent / "model.onnx", partial, mode="full")
                assert not any(output.problem for output in validation.outputs), validation
            partial.replace(model)
        if start.state == "reset":
            return model, None
        return model, _grown_state(model, parent, start.state)


def _growth(start: Grown) -> dict[str, Any]:
    """The arguments of `expand` that say what grows."""
    if start.to is None:
        return {"requests": {start.only: start.factor}} if start.only else {"factor": start.factor}
    small, big = start.run.shape, start.to
    wanted = {"hidden": big.width, "heads": big.attention // HEAD, "ffn": big.ffn}
    before = {"hidden": small.width, "heads": small.attention // HEAD, "ffn": small.ffn}
    sizes = {role: size for role, size in wanted.items() if size != before[role]}
    return {"sizes": sizes or None, "layers": big.layers if big.layers != small.layers else None}


def _digest(described: Run | Random | Grown | Upcycled) -> str:
    return hashlib.sha256(repr(described).encode()).hexdigest()[:10]


def _grown_state(model: Path, parent: Path, kind: Literal["carried", "half"]) -> Path:
    """The grown optimizer state of the source, whose run has the folder `parent`.

    With "half", only the first clone of each unit keeps its state.
    """
    folder = model.with_suffix(f".{kind}")
    if folder.exists():
        return folder / "optimizer.pt"
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    compiled = compile_model(model)
    state, source = parent / "optimizer.pt", parent / "model.onnx"
    write_optimizer(model, state, partial, "pytorch", source=source, compiled=compiled)
    if kind == "half":
        plan = compiled.plan
        assert plan is not None
        initializers = {weight.path: weight.initializer for weight in compiled.program.weights}
        saved = torch.load(partial / "optimizer.pt", weights_only=True)
        names = {
            number: name
            for group in saved["param_groups"]
            for number, name in zip(group["params"], group["param_names"], strict=True)
        }
        for number, moments in saved["state"].items():
            recipe = plan.tensors.get(initializers[names[number]])
            if recipe is not None:
                for axis, index in enumerate(recipe.index(plan.maps)):
                    later = torch.from_numpy((index.number > 0) | (index.other_number > 0))
                    for moment in ("exp_avg", "exp_avg_sq"):
                        moments[moment].index_fill_(axis, later.nonzero().flatten(), 0.0)
        torch.save(saved, partial / "optimizer.pt")
    partial.replace(folder)
    return folder / "optimizer.pt"


def _share_unevenly(model: Path, seed: int) -> None:
    """Move a random part of each weight from one of its two clones to the other. Their sum stays the same."""
    stored = onnx.load(model)
    plan = Plan.carried_by({entry.key: entry.value for entry in stored.metadata_props})
    assert plan is not None
    rng = np.random.default_rng(seed)
    for tensor in stored.graph.initializer:
        recipe = plan.tensors.get(tensor.name)
        for axis, index in enumerate(() if recipe is None else recipe.index(plan.maps)):
            if index.count.max() > 1:
                values = onnx.numpy_helper.to_array(tensor)
                moved = np.take(rng.uniform(-0.5, 0.5, values.shape), index.collapsed, axis)
                sign = np.where(index.number == 0, 1.0, -1.0)
                sign = np.expand_dims(sign, [other for other in range(values.ndim) if other != axis])
                values = values * (1.0 + sign * moved).astype(values.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(stored, model)


def _begin() -> None:
    """Let an interrupt end a worker without a message. Its checkpoint stays."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def _work(task: Task, folder: Path, queue: Any) -> None:
    train(task, folder, queue.put)
