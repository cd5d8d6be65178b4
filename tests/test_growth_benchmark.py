"""Small runs of benchmarks/growth.py: they count right and can be continued, and their checks can fail."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import forecast  # noqa: E402
from growing import checks, training_torch  # noqa: E402
from growing.figures import headline, series_headline, series_points, worst_seeds  # noqa: E402
from growing.findings import report, write_random  # noqa: E402
from growing.network import Network, export, shape  # noqa: E402
from growing.results import read_curve  # noqa: E402
from growing.runs import Grown, Lab, Outcome, Random, Run, Settings  # noqa: E402
from growing.study import LARGE, Findings, Row, Size, Study, reached  # noqa: E402
from growing.tasks import Point, Recipe, Task  # noqa: E402
from growing.training import train  # noqa: E402

from hyperclone_onnx.forecasting.reading import Given, read_curves  # noqa: E402

SHAPE = shape(32, layers=2, length=16)


@pytest.mark.parametrize(
    ("losses", "loss", "step"),
    [((3.0, 2.0, 1.0), 2.0, 10), ((3.0, 2.0, 1.0), 1.5, 15), ((3.0, 2.0), 1.0, None), ((1.0, 2.0, 1.5), 1.2, 0)],
)
def test_when_a_curve_comes_to_a_loss(losses: tuple[float, ...], loss: float, step: float | None) -> None:
    curve = tuple(Point(10 * number, value) for number, value in enumerate(losses))
    run = Run(Random(SHAPE, 0), Recipe(1e-3), 20)
    assert reached(Outcome(run, curve, Path(), 0.0), loss) == step


def test_flops_count_the_weights_that_are_multiplied_with() -> None:
    network = Network(SHAPE, 0)
    matrices = sum(matrix.numel() for matrix in network.parameters() if matrix.ndim == 2)
    assert SHAPE.multiplied() == matrices - network.embedding.weight.numel()
    assert SHAPE.flops() == 6 * SHAPE.multiplied() + 12 * 2 * 32 * 16


@pytest.mark.parametrize("only", ["", "heads", "ffn"])
def test_a_grown_shape_is_that_of_the_grown_file(only: Any, tmp_path: Path) -> None:
    from hyperclone_onnx import expand
    from hyperclone_onnx.frameworks.torch import load

    export(SHAPE, 0, tmp_path / "small.onnx")
    start = Grown(Run(Random(SHAPE, 0), Recipe(1e-3), 2), only=only)
    growth: dict[str, Any] = {"requests": {only: 2}} if only else {"factor": 2}
    expand(tmp_path / "small.onnx", tmp_path / "big.onnx", **growth, check=False)
    matrices = sum(matrix.numel() for matrix in load(tmp_path / "big.onnx").parameters() if matrix.ndim == 2)
    assert start.shape.multiplied() == matrices - 256 * start.shape.width


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        (Recipe(1.0, warm_up=0.5), (0.5, 1.0, 0.5, 0.0)),
        (Recipe(1.0, warm_up=0.0), (0.75, 0.5, 0.25, 0.0)),
        (Recipe(1.0, warm_up=0.0, decay="late"), (1.0, 1.0, 1.0, 0.0)),
        (Recipe(1.0, warm_up=0.0, decay="none"), (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_rates(recipe: Recipe, shares: tuple[float, ...]) -> None:
    assert [recipe.share(done) for done in (0.25, 0.5, 0.75, 1.0)] == pytest.approx(shares)


def row(name: str, tokens: float | None, total: float | None, width: int = 32) -> Row:
    run = Run(Random(shape(width, layers=2, length=16), 0), Recipe(1e-3), 20)
    outcome = Outcome(run, (Point(0, 2.0), Point(20, 1.0)), Path(), 1.0)
    return Row(name, run.recipe, 20, 2.0, 1.0, tokens, tokens, total, (outcome,))


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        ([row("a", None, None)], "No variant reached the final loss of random weights"),
        (
            [row("a", 2.0, 0.8), row("b", None, None)],
            "“a” reaches the loss of random weights after 2.0x fewer bytes and, with its source, 1.25x more FLOPs",
        ),
        (
            [row("a", 2.0, 0.8), row("b", 1.5, 1.3)],
            "“a” reaches the loss of random weights after 2.0x fewer bytes;\n"
            "“b” takes, with its source, 1.30x fewer FLOPs",
        ),
        (
            [row("a", float("inf"), 0.8)],
            "Growth begins below the final loss of random weights; “a” ends lowest",
        ),
    ],
)
def test_a_picture_says_its_finding(rows: list[Row], title: str) -> None:
    assert headline(rows, "byte") == title


def test_a_picture_shows_the_seed_that_saves_least() -> None:
    rows = [
        row("a, seed 0", 2.0, 1.5),
        row("a, seed 1", 1.9, 1.4),
        row("b, seed 0", 3.0, 1.2),
        row("b, seed 1", None, None),
    ]
    assert [(one.variant, one.gain_total) for one in worst_seeds(rows)] == [("a", 1.4), ("b", None)]
    assert worst_seeds(rows[:1]) == [row("a", 2.0, 1.5)]
    assert worst_seeds([row("a", 2.0, 1.5)]) == [row("a", 2.0, 1.5)]


def test_a_forecast_is_compared_with_runs_that_it_did_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lab() -> Lab:
        return Lab(tmp_path, Settings(2, 2, 16), 1, lambda *progress: None)

    def do(self: Lab, runs: Iterable[Run], stage: str) -> list[Outcome]:
        return [
            Outcome(run, tuple(Point(step, law(run, step)) for step in (0, run.steps)), tmp_path, 0.0) for run in runs
        ]

    def law(run: Run, step: int) -> float:
        return 1.0 + 400.0 / run.shape.multiplied() ** 0.7 + 30.0 / (256.0 * max(step, 1)) ** 0.4

    monkeypatch.setattr(Lab, "do", do)
    rows = list(forecast.rows(lab(), 100, tmp_path))
    assert [(row.width, round(row.read / 256)) for row in rows] == [(64, 200), (64, 400), (128, 200), (128, 400)]
    assert max(abs(row.error) for row in rows) < 1e-3
    large = law
    monkeypatch.setattr(
        Lab,
        "do",
        lambda self, runs, stage: (
            do(self, runs, stage)
            if stage == "small"
            else [
                replace(outcome, curve=(Point(outcome.run.steps, 1.1 * large(outcome.run, outcome.run.steps)),))
                for outcome in do(self, runs, stage)
            ]
        ),
    )
    assert all(row.error == pytest.approx(-1 / 11, abs=1e-3) for row in forecast.rows(lab(), 100, tmp_path))
    assert forecast.table(rows).count("%") == 4


def test_the_picture_of_sizes_says_where_growth_reaches_random_weights() -> None:
    def of(width: int, decay: str, gain: float | None) -> Row:
        source = Run(Random(shape(width // 2, layers=2, length=16), 0), Recipe(1e-3, decay=decay), 20)
        run = Run(Grown(source), Recipe(1e-3), 20)
        one = row("a", gain, None)
        return replace(one, runs=(replace(one.runs[0], run=run),))

    rows = [row("random", None, None), of(32, "linear", None), of(64, "linear", 2.0), of(64, "linear", 2.5)]
    rows += [of(32, "none", 3.0), of(64, "none", 3.04)]
    assert series_points(rows)[:2] == [(40960, None, "source decayed"), (147456, 2.0, "source decayed")]
    assert series_headline(rows, "token").splitlines() == [
        "Grown models reach the loss of random weights",
        "source decayed: with every seed at 147 k weights, after 2.0x to 2.5x fewer tokens",
        "source not decayed: with every seed at all sizes, after 3.0x fewer tokens",
    ]
    assert series_headline(rows[:2], "token").endswith("source decayed: no size reaches random weights with every seed")


class Interrupted(Exception):
    pass


def test_an_interrupted_run_gives_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(SHAPE, 0, tmp_path / "start.onnx")
    recipe = Recipe(1e-2, dropout=0.1)
    task = Task(tmp_path / "start.onnx", recipe, 12, 0, batch=2, length=16, evaluations=3, examined=16)
    train(task, tmp_path / "whole", lambda steps: None)
    monkeypatch.setattr(training_torch, "SAVE_EVERY", 0.0)
    done: list[int] = []

    def interrupt(steps: int) -> None:
        done.append(steps)
        if len(done) == 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(task, tmp_path / "interrupted", interrupt)
    assert not (tmp_path / "interrupted" / "result.json").exists()
    done.clear()
    train(task, tmp_path / "interrupted", done.append)
    assert done[0] > 0
    assert sum(done) == 12
    assert read_curve(tmp_path / "interrupted") == read_curve(tmp_path / "whole")


def test_jax_and_torch_learn_the_same(tmp_path: Path) -> None:
    pytest.importorskip("optax")
    export(SHAPE, 0, tmp_path / "start.onnx")
    task = Task(tmp_path / "start.onnx", Recipe(1e-2), 12, 0, batch=2, length=16, evaluations=3, examined=16)
    curves = {}
    for framework in ("torch", "jax"):
        train(replace(task, framework=framework), tmp_path / framework, lambda steps: None)
        curves[framework] = [point.loss for point in read_curve(tmp_path / framework)]
    assert curves["jax"] == pytest.approx(curves["torch"], abs=1e-4)
    assert curves["jax"][-1] < curves["jax"][0] - 0.01


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Findings, Lab]]:
    size = Size(
        "tiny", 32, 20, layers=2, length=16, batch=2, evaluations=4, examined=16,
        rates=(1e-2,), source_rates=(1e-2,), grown_rates=(1e-2,), seeds=1, questions=("strategy", "state", "sharing"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("lab")
    lab = Lab(folder, Settings(size.batch, size.evaluations, size.examined), 1, lambda *progress: None)
    *_, findings = Study(lab, size).answers()
    yield findings, lab


def test_a_study_in_miniature(studied: tuple[Findings, Lab]) -> None:
    findings, lab = studied
    assert list(findings.tables) == ["baseline", "sources", "rates", "strategy", "state", "sharing"]
    text = report(findings, lab)
    assert "noisy-diagonal" in text
    by_statement = {check.statement: check for check in checks.checks(findings, lab)}
    assert all(check.holds for statement, check in by_statement.items() if "logits equal" in statement)
    assert by_statement["symmetric: stuck"].holds
    kept = {row.variant: row.runs[0] for row in findings.tables["sharing"]}
    assert checks.start_error(kept["uneven"], lab) < checks.LARGEST_ERROR


@pytest.mark.slow_frameworks
def test_the_large_study_in_miniature(tmp_path: Path) -> None:
    """Its questions go through the product: settings of each tensor, AKI, any size, depth, stages; over BPE tokens."""
    pytest.importorskip("tokenizers")
    size = Size(
        "tiny", 32, 8, layers=3, length=16, batch=2, evaluations=2, examined=16, vocabulary=300, rates=(1e-2,),
        source_rates=(1e-2,), grown_rates=(1e-2,), seeds=1, series=(32,),
        questions=tuple(question for question in LARGE if question != "small"),
    )  # fmt: skip
    lab = Lab(tmp_path, Settings(size.batch, size.evaluations, size.examined), 1, lambda *progress: None)
    *_, findings = Study(lab, size).answers()
    assert set(findings.tables) == {"baseline", "sources", "rates", *size.questions}
    assert "the tokens of a BPE of 300" in report(findings, lab)
    experts = replace(size.shape(32), ffn=2 * size.shape(32).ffn)
    for answer in (*findings.tables["ways"], *findings.tables["stages"]):
        assert answer.runs[0].run.shape == (experts if "experts" in answer.variant else size.shape(64)), answer
    write_random(lab.outcomes.values(), lab, tmp_path / "random.csv")
    assert {curve.kind for curve in read_curves(str(tmp_path / "random.csv"), Given())} == {"decayed", "constant"}


def test_checks_can_fail(studied: tuple[Findings, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    findings, lab = studied
    rows = {row.variant: row for row in findings.tables["strategy"]}
    swapped = [
        replace(rows["noisy-symmetric"], variant="symmetric", gain_tokens=1.1),
        replace(rows["symmetric"], variant="noisy-diagonal", gain_tokens=None),
    ]
    trained = rows["symmetric"].runs[0].model
    monkeypatch.setattr(lab, "model", lambda run: trained)
    broken = replace(findings, tables={"strategy": swapped})
    assert not any(check.holds for check in checks.checks(broken, lab))
