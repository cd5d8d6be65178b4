"""The questions of a study, the runs that answer them, and the rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from growing.network import BYTES, HEAD, Shape, shape
from growing.runs import Continued, Grown, Lab, Outcome, Random, Run, Upcycled
from growing.tasks import Recipe
from hyperclone_onnx.plan.strategies import STRATEGIES, StrategyName


@dataclass(frozen=True)
class Size:
    """The sizes and numbers of a study."""

    name: str
    width: int
    """The width of the source. The grown model is twice as wide."""
    steps: int
    """The training steps of the model from random weights."""
    layers: int = 3
    length: int = 128
    batch: int = 8
    evaluations: int = 20
    examined: int = 96
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    """The learning rates that are tried for random weights."""
    source_rates: tuple[float, ...] = (8e-3, 1.6e-2)
    grown_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    source_part: float = 2.0
    """The bytes that the source is trained on, divided by those of the baseline."""
    seeds: int = 2
    strategies: tuple[StrategyName, ...] = tuple(STRATEGIES)
    """The strategies that are compared. The best one answers the other questions."""
    questions: tuple[str, ...] = ("strategy",)
    device: str = "cpu"
    vocabulary: int = BYTES
    series: tuple[int, ...] = ()
    """Widths of grown models for which the gain is measured."""

    @property
    def unit(self) -> str:
        """What the models read: bytes, or tokens of a BPE."""
        return "byte" if self.vocabulary == BYTES else "token"

    def shape(self, width: int) -> Shape:
        """The shape of a model of this width."""
        return shape(width, layers=self.layers, length=self.length, vocabulary=self.vocabulary)


@dataclass(frozen=True)
class Row:
    """The results of a variant.

    A gain is the cost of the model from random weights divided by the cost of this one to reach the same loss. It is
    infinite if this one begins below that loss, and None if it does not reach it.
    """

    variant: str
    recipe: Recipe
    steps: int
    start: float
    loss: float
    gain_tokens: float | None
    gain_flops: float | None
    gain_total: float | None
    """The gain in FLOPs, including those of the source."""
    runs: tuple[Outcome, ...] = field(repr=False, compare=False)


@dataclass
class Findings:
    """The results of a study."""

    size: Size
    target: float
    """The loss of the model from random weights at the end of its training: the mean over the seeds."""
    baseline: list[Outcome]
    tables: dict[str, list[Row]]
    """The rows of each question."""


class Study:
    """Answers the questions of a size.

    Args:
        lab: does the runs.
        size: the questions, and the sizes of the models.
    """

    def __init__(self, lab: Lab, size: Size) -> None:
        self.lab, self.size = lab, size
        self.steps = size.steps
        self.tables: dict[str, list[Row]] = {}

    def answers(self) -> Iterator[Findings]:
        """Answer the questions one by one. Yields all findings so far after each question."""
        self.measure_baseline()
        self.choose_source()
        for name in ("strategy", *(name for name in self.size.questions if name != "strategy")):
            self.tables[name] = list(getattr(self, f"ask_{name}")())
            yield Findings(self.size, self.target, self.baseline, dict(self.tables))

    # -- the baseline and the source -----------------------------------------------------------------------------------

    def measure_baseline(self) -> None:
        """Train from random weights with each rate, and with the best rate also with other seeds."""
        size, big = self.size, self.size.shape(2 * self.size.width)
        swept = self.lab.do([Run(Random(big, 0), Recipe(rate), self.steps) for rate in size.rates], "random weights")
        best = min(swept, key=lambda outcome: outcome.loss).run
        seeds = [replace(best, start=Random(big, seed), seed=seed) for seed in range(size.seeds)]
        self.baseline = self.lab.do(seeds, "random weights, other seeds")
        self.target = sum(outcome.loss for outcome in self.baseline) / len(self.baseline)
        self.tables["baseline"] = [
            self.row(f"random weights, rate {outcome.run.recipe.rate:g}", [outcome]) for outcome in swept
        ]
        self.tables["baseline"] += [
            self.row(f"the same, seed {outcome.run.seed}", [outcome]) for outcome in self.baseline[1:]
        ]

    def choose_source(self) -> None:
        """Train the source with each rate, and choose the best."""
        small, part = self.size.shape(self.size.width), self.size.source_part
        swept = [self.trained(small, Recipe(rate), part) for rate in self.size.source_rates]
        outcomes = self.lab.do(swept, "the source")
        self.source_run = min(outcomes, key=lambda outcome: outcome.loss).run
        self.tables["sources"] = [
            self.row(f"source, rate {outcome.run.recipe.rate:g}", [outcome]) for outcome in outcomes
        ]

    def trained(self, shape: Shape, recipe: Recipe, part: float, seed: int = 0) -> Run:
        """The run of a source from random weights, for `part` of the baseline's bytes."""
        return Run(Random(shape, 100 + seed), recipe, round(part * self.steps), 100 + seed)

    def source(self, part: float = 0.0, seed: int = 0, width: int = 0) -> Run:
        """The run of a source for `part` of the baseline's bytes, whose rate decays to 0."""
        small = self.size.shape(width or self.size.width)
        return self.trained(small, self.source_run.recipe, part or self.size.source_part, seed)

    def early(self, shape: Shape, part: float = 1.0, seed: int = 0) -> Run:
        """The run of a source whose rate has not decayed, for `part` of the baseline's bytes.

        Its rate is half of the best peak rate of the study's source, times the ratio of the widths.
        """
        rate = self.source_run.recipe.rate / 2 * self.size.width / shape.width
        recipe = replace(self.source_run.recipe, rate=rate, decay="none")
        return self.trained(shape, recipe, part, seed)

    def start(self, small: Shape, seed: int, part: float = 1.0, **changes: Any) -> Grown:
        """The best start, from a source of this shape whose rate has not decayed."""
        return replace(self.winner, run=self.early(small, part, seed), seed=seed, **changes)

    # -- runs and rows ---------------------------------------------------------------------------------

    def grown(self, start: Grown | Upcycled, recipe: Recipe, budget: float = 0.5, seed: int = 0) -> Run:
        """The run of a grown model, for a part of the baseline's bytes."""
        return Run(start, recipe, round(budget * self.steps), 7 + seed)

    def row(self, variant: str, outcomes: Sequence[Outcome], baseline: Sequence[Outcome] = ()) -> Row:
        """The row of a variant, from its run that reached the target first, or that has the lowest loss.

        The target is the mean loss of `baseline`, by default that of the study.
        """
        baseline = baseline or self.baseline
        target = sum(outcome.loss for outcome in baseline) / len(baseline)
        steps = {outcome: reached(outcome, target) for outcome in outcomes}
        best = min(outcomes, key=lambda outcome: (steps[outcome] or float("inf"), outcome.loss))
        run, took = best.run, steps[best]
        gains: list[float | None] = [None, None, None]
        if took is not None:
            reference = baseline[0].run
            tokens, flops = self.lab.tokens(reference, self.steps), self.lab.flops(reference, self.steps)
            own = self.lab.flops(run, took)
            gains = [tokens / self.lab.tokens(run, took), flops / own] if took else [math.inf, math.inf]
            gains.append(flops / (own + best.flops_before) if own + best.flops_before else math.inf)
        return Row(variant, run.recipe, run.steps, best.curve[0].loss, best.loss, *gains, tuple(outcomes))

    def compare(self, stage: str, variants: Mapping[str, Run | Sequence[Run]]) -> Iterator[Row]:
        """One row for each variant. Of several runs, it shows the one that reached the target first."""
        for name, outcomes in self.do(stage, variants).items():
            yield self.row(name, outcomes)

    def do(self, stage: str, variants: Mapping[str, Run | Sequence[Run]]) -> dict[str, list[Outcome]]:
        """Do all runs of all variants, as many at a time as there are workers."""
        every = {name: [runs] if isinstance(runs, Run) else runs for name, runs in variants.items()}
        self.lab.do([run for runs in every.values() for run in runs], stage)
        return {name: self.lab.do(runs, stage) for name, runs in every.items()}

    # -- the questions -------------------------------------------------------------------------------------------

    def ask_strategy(self) -> Iterator[Row]:
        """Each strategy at its best rate."""
        every = {
            name: [
                self.grown(Grown(self.source(), name, state="carried"), Recipe(rate, 0.0))
                for rate in self.size.grown_rates
            ]
            for name in self.size.strategies
        }
        best: dict[str, Outcome] = {}
        self.tables["rates"] = []
        for name, outcomes in self.do("strategies", every).items():
            best[name] = min(outcomes, key=lambda outcome: outcome.loss)
            self.tables["rates"] += [
                self.row(f"{name}, rate {outcome.run.recipe.rate:g}", [outcome]) for outcome in outcomes
            ]
            yield self.row(name, [best[name]])
        winner = min(best.values(), key=lambda outcome: outcome.loss).run
        assert isinstance(winner.start, Grown)
        self.winner, self.recipe = winner.start, winner.recipe

    def ask_recipe(self) -> Iterator[Row]:
        """The best strategy with smaller budgets, and with other seeds for source, noise and data."""
        budgets = {"half": 1 / 2, "a third": 1 / 3, "a quarter": 1 / 4, "a fifth": 1 / 5}
        yield from self.compare(
            "the best recipe",
            {
                f"{name} of the bytes, seed {seed}": [
                    self.grown(
                        replace(self.winner, run=self.source(seed=seed), seed=seed),
                        replace(self.recipe, rate=rate),
                        budget,
                        seed,
                    )
                    for rate in (self.recipe.rate, self.recipe.rate / 2)
                ]
                for seed in range(self.size.seeds)
                for name, budget in budgets.items()
            },
        )

    def ask_unannealed(self) -> Iterator[Row]:
        """Grow a source whose rate was never decayed, and let the rate decay once, after growth."""
        small = self.size.shape(self.size.width)
        last = self.early(small).recipe.rate
        settings: list[tuple[StrategyName, float, int, float, tuple[float, ...]]] = [
            ("noisy-diagonal", 1.0, 0, last / 2, (1 / 2, 1 / 1.6)),
            ("noisy-diagonal", 1.0, 1, last / 2, (1 / 2, 1 / 1.6)),
            ("noisy-diagonal", 1.0, 0, last, (1 / 2,)),
            ("noisy-diagonal", 0.5, 0, last / 2, (1 / 2, 1 / 1.6)),
            ("symmetric", 1.0, 0, last / 2, (1 / 2, 1 / 1.6)),
        ]
        variants = {
            f"{strategy}, rate {rate:g}, source trained for {part:g}, seed {seed}": [
                self.grown(
                    self.start(small, seed, part, strategy=strategy),
                    replace(self.recipe, rate=rate),
                    budget,
                    seed,
                )
                for budget in budgets
            ]
            for strategy, part, seed, rate, budgets in settings
        }
        yield from self.compare("unannealed", variants)

    def ask_cheapest(self) -> Iterator[Row]:
        """The cheapest growth with everything counted: shorter budgets, from a decayed source and from one whose rate
        has not decayed, with each seed."""
        small = self.size.shape(self.size.width)
        last = self.early(small).recipe.rate
        part = self.size.source_part
        variants: dict[str, Run] = {}
        for seed in range(self.size.seeds):
            decayed = replace(self.winner, run=self.source(seed=seed), seed=seed)
            early = self.start(small, seed, part)
            for text, start, rate in (
                ("decayed", decayed, self.recipe.rate),
                ("not decayed", early, last / 2),
                ("not decayed", early, last),
            ):
                for name, budget in (("0.4", 0.4), ("a third", 1 / 3)):
                    variants[f"source {text}, rate {rate:g}, {name} of the {self.size.unit}s, seed {seed}"] = (
                        self.grown(start, replace(self.recipe, rate=rate), budget, seed)
                    )
        yield from self.compare("the cheapest", variants)

    def ask_small(self) -> Iterator[Row]:
        """Train the source further instead of growing it, for the same bytes and for the same FLOPs."""
        own = self.size.source_part
        ratio = self.size.shape(2 * self.size.width).flops() / self.size.shape(self.size.width).flops()
        settings = [(own, f"{self.size.unit}s", 1.0), (own, "FLOPs", ratio)]
        if "source" in self.size.questions:
            settings.append((2 * own, "FLOPs", ratio))
        yield from self.compare(
            "the source trained on",
            {
                f"trained for {part:g}, then for the same {text}, rate {rate:g}": Run(
                    Continued(self.source(part)), Recipe(rate, 0.0), round(0.5 * self.steps * times), 7
                )
                for part, text, times in settings
                for rate in self.size.grown_rates
            },
        )

    def ask_source(self) -> Iterator[Row]:
        """How well the source is trained."""
        variants = {
            f"source trained for {part:g} of the baseline's bytes": [
                self.grown(replace(self.winner, run=self.source(part)), replace(self.recipe, rate=rate))
                for rate in self.size.grown_rates
            ]
            for part in (0.5, 1.0, 2.0, 4.0)
        }
        for name, outcomes in self.do("sources", variants).items():
            yield self.row(name, [min(outcomes, key=lambda outcome: outcome.loss)])

    def ask_state(self) -> Iterator[Row]:
        """Whether the optimizer's state is reset or carried over."""
        kinds = {"reset": "reset", "carried": "carried over", "half": "carried over, reset for the clones"}
        variants: dict[str, Run] = {}
        for name in ("noisy-diagonal", "noisy-symmetric"):
            for state, text in kinds.items():
                start = replace(self.winner, strategy=name, state=state)
                variants[f"{name}, {text}"] = self.grown(start, self.recipe)
                if state == "reset":
                    variants[f"{name}, {text}, warm-up"] = self.grown(start, replace(self.recipe, warm_up=0.1))
        yield from self.compare("optimizer's state", variants)

    def ask_snr(self) -> Iterator[Row]:
        """The amount of noise."""
        starts = {f"{snr:g} dB": replace(self.winner, snr_db=snr) for snr in (0.0, 5.0, 10.0, 20.0, 40.0)}
        yield from self.compare("SNR", {name: self.grown(start, self.recipe) for name, start in starts.items()})

    def ask_schedule(self) -> Iterator[Row]:
        """Schedules of the rate."""
        plain, peak = self.recipe, self.recipe.rate
        variants: dict[str, Recipe] = {
            "no warm-up, linear to 0": plain,
            "warm-up 5 %": replace(plain, warm_up=0.05),
            "warm-up 20 %": replace(plain, warm_up=0.2),
            "cosine": replace(plain, decay="cosine"),
            "constant, last quarter to 0": replace(plain, decay="late"),
            "constant": replace(plain, decay="none"),
            "the source's peak, warm-up 5 %": replace(plain, rate=self.source_run.recipe.rate, warm_up=0.05),
            "by fan-in (muP), the same peak": replace(plain, by_fan_in=True),
            "by fan-in (muP), twice the peak": replace(plain, rate=2 * peak, by_fan_in=True),
        }
        yield from self.compare(
            "schedules", {name: self.grown(self.winner, recipe) for name, recipe in variants.items()}
        )

    def ask_strategy_whole(self) -> Iterator[Row]:
        """Each strategy trained for as many bytes as the baseline."""
        yield from self.compare(
            "strategies, whole",
            {name: self.grown(replace(self.winner, strategy=name), self.recipe, 1.0) for name in STRATEGIES},
        )

    def ask_factor(self) -> Iterator[Row]:
        """Growth by 2, by 4, and by 2 twice."""
        width, recipe = self.size.width, self.recipe
        quarter = self.source(width=width // 2)
        once = self.grown(replace(self.winner, run=quarter), recipe)
        yield from self.compare(
            "factors",
            {
                f"{width} x 2": self.grown(self.winner, recipe),
                f"{width // 2} x 4": self.grown(replace(self.winner, run=quarter, factor=4), recipe),
                f"{width // 2} x 2, trained, x 2": self.grown(replace(self.winner, run=once), recipe),
            },
        )

    def ask_sharing(self) -> Iterator[Row]:
        """Unequal shares without noise, compared with equal ones."""
        names = ("symmetric", "uneven", "noisy-symmetric")
        starts: dict[str, Grown] = {name: replace(self.winner, strategy=name) for name in names}
        yield from self.compare("sharing", {name: self.grown(start, self.recipe) for name, start in starts.items()})

    def ask_what(self) -> Iterator[Row]:
        """Growth of a part of the model only."""
        names = {"all": "", "ffn only": "ffn", "heads only": "heads"}
        starts = {name: replace(self.winner, only=only) for name, only in names.items()}
        yield from self.compare("what grows", {name: self.grown(start, self.recipe) for name, start in starts.items()})

    def ask_dropout(self) -> Iterator[Row]:
        """Whether dropout makes clones different."""
        yield from self.compare(
            "dropout",
            {
                f"{start.strategy}, {f'dropout {share:g}' if share else 'no dropout'}": self.grown(
                    start, replace(self.recipe, dropout=share)
                )
                for start in (replace(self.winner, strategy="symmetric"), self.winner)
                for share in (0.0, 0.05)
            },
        )

    def ask_ways(self) -> Iterator[Row]:
        """Other ways to grow, each from a source whose rate has not decayed, for 0.4 of the baseline's bytes.

        Two rates are tried with the first seed. The other seeds repeat the better one.
        """
        size = self.size
        small, big = size.shape(size.width), size.shape(2 * size.width)
        narrower = size.shape(HEAD * round(big.width / 1.5 / HEAD))
        layers = max(2, size.layers // 2)  # one layer alone is no stack
        wider, other = f"width {small.width} to {big.width}", f"{layers} to {big.layers} layers"
        plain, exact = self.recipe, replace(self.recipe, exact=True)
        ways: dict[str, tuple[Callable[[int], Grown | Upcycled], Recipe]] = {
            f"{wider}, {self.winner.strategy}": (lambda seed: self.start(small, seed), plain),
            f"{wider}, each tensor's settings": (lambda seed: self.start(small, seed, state="carried"), exact),
            f"{wider}, aki": (lambda seed: self.start(small, seed, strategy="aki", state="reset"), plain),
            f"width {narrower.width} to {big.width}": (lambda seed: self.start(narrower, seed, to=big), plain),
            other: (lambda seed: self.start(replace(big, layers=layers), seed, to=big), plain),
            f"{wider}, {other}": (lambda seed: self.start(replace(small, layers=layers), seed, to=big), plain),
            "4 experts, 2 for each token": (lambda seed: Upcycled(self.early(small, 1.0, seed), 4, 2, seed), plain),
            "8 experts, 2 for each token": (lambda seed: Upcycled(self.early(small, 1.0, seed), 8, 2, seed), plain),
        }
        last = self.early(small).recipe.rate
        first = self.do(
            "ways to grow",
            {
                name: [self.grown(start(0), replace(recipe, rate=rate), 0.4) for rate in (last / 2, last)]
                for name, (start, recipe) in ways.items()
            },
        )
        best = {name: min(outcomes, key=lambda outcome: outcome.loss).run for name, outcomes in first.items()}
        runs = {
            f"{name}, seed {seed}": best[name] if seed == 0 else self.grown(start(seed), best[name].recipe, 0.4, seed)
            for name, (start, _) in ways.items()
            for seed in range(size.seeds)
        }
        yield from self.compare("ways to grow, other seeds", runs)

    def ask_stages(self) -> Iterator[Row]:
        """A quarter of the width, then half, then the whole. The rate is high in each stage and falls in the last.

        A stage of half the width has twice the rate. Where the part of the first stage is 0, the model grows only once.
        """
        size, recipe = self.size, replace(self.recipe, warm_up=0.0)
        quarter, half, whole = (size.shape(width) for width in (size.width // 2, size.width, 2 * size.width))
        variants: dict[str, Run] = {}
        for seed in range(size.seeds):
            for first, second in ((0.0, 0.5), (0.0, 1.0), (0.5, 0.5), (1.0, 0.5), (0.5, 1.0)):
                middle = self.early(half, second, seed)
                if first:
                    start = self.start(quarter, seed, part=first)
                    middle = self.grown(start, replace(recipe, rate=middle.recipe.rate, decay="none"), second, seed)
                parts = [(first, quarter), (second, half), (0.4, whole)]
                name = ", ".join(f"{part:g} at width {stage.width}" for part, stage in parts if part)
                last = replace(self.winner, run=middle, seed=seed)
                rate = self.early(whole).recipe.rate
                variants[f"{name}, seed {seed}"] = self.grown(last, replace(recipe, rate=rate), 0.4, seed)
        yield from self.compare("stages", variants)

    def ask_series(self) -> Iterator[Row]:
        """How the gain moves with the size: the best recipe at other widths, each against its own baseline.

        Rates are those of this width times the ratio of the widths, for random weights, sources and grown models alike.
        """
        whole = 2 * self.size.width
        best = self.baseline[0].run.recipe
        for width in self.size.series:
            ratio = whole / width
            big, seeds = self.size.shape(width), range(self.size.seeds)
            recipe = replace(best, rate=best.rate * ratio)
            baseline = self.lab.do(
                [Run(Random(big, seed), recipe, self.steps, seed) for seed in seeds], f"width {width}"
            )
            for outcome in baseline:
                name = (
                    f"{big.multiplied():,} weights, random, rate {outcome.run.recipe.rate:g}, seed {outcome.run.seed}"
                )
                yield self.row(name, [outcome], baseline)
            small = self.size.shape(width // 2)
            decaying = replace(self.source_run.recipe, rate=self.source_run.recipe.rate * ratio)
            last = self.early(big).recipe.rate
            runs: dict[str, Run] = {}
            for seed in seeds:
                source = self.trained(small, decaying, self.size.source_part, seed)
                start = replace(self.winner, run=source, seed=seed)
                rate = self.recipe.rate * ratio
                runs[f"decayed, seed {seed}"] = self.grown(start, replace(self.recipe, rate=rate), 0.5, seed)
                start = self.start(small, seed)
                runs[f"not decayed, seed {seed}"] = self.grown(start, replace(self.recipe, rate=last), 0.4, seed)
            for name, outcomes in self.do(f"width {width}, grown", runs).items():
                yield self.row(f"{big.multiplied():,} weights, grown, source {name}", outcomes, baseline)

    def ask_framework(self) -> Iterator[Row]:
        """The same run in PyTorch and in JAX, both with a fresh optimizer."""
        run = self.grown(replace(self.winner, state="reset"), self.recipe)
        yield from self.compare("frameworks", {"PyTorch": run, "JAX": replace(run, framework="jax")})


def reached(outcome: Outcome, loss: float) -> float | None:
    """The first step at which a curve reaches a loss, interpolated between two points. None if it never does."""
    before = None
    for point in outcome.curve:
        if point.loss <= loss:
            if before is None:
                return float(point.step)
            part = (before.loss - loss) / (before.loss - point.loss)
            return before.step + (point.step - before.step) * part
        before = point
    return None


ALL = (
    "strategy", "recipe", "small", "unannealed", "source", "state", "snr", "schedule", "factor", "sharing", "what",
    "dropout", "framework", "strategy_whole",
)  # fmt: skip

LARGE = ("strategy", "cheapest", "ways", "stages", "small", "series")
"""The questions of the large study."""
