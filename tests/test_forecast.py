"""Forecasts: known laws are found again, each format gives the same curve, and too little data gives no number."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

from hyperclone_onnx import BadModel, BadRequest
from hyperclone_onnx.forecasting import answers
from hyperclone_onnx.forecasting.answers import Source, Target, forecast, longest_source, route
from hyperclone_onnx.forecasting.curves import Curve, Kind, Observation, Point, choose
from hyperclone_onnx.forecasting.law import Fit, Law, TooLittleData, fit
from hyperclone_onnx.forecasting.reading import Given, read_curves
from hyperclone_onnx.forecasting.sources import choose_source

KNOWN = Law(1.69, 406.4, 0.34, 410.7, 0.28)
SIZES = (1e7, 3e7, 1e8, 3e8)
LENGTHS = (2e8, 1e9, 5e9, 2e10)


def observations(noise: float, seed: int = 0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    grid = [(size, tokens) for size in SIZES for tokens in LENGTHS]
    return [
        Observation(size, tokens, KNOWN.loss(size, tokens) * float(np.exp(noise * rng.standard_normal())), run)
        for run, (size, tokens) in enumerate(grid)
    ]


def decayed(size: float, tokens: float) -> Curve:
    """A run whose loss is that of the law at its end, and higher before."""
    parts = (0.25, 0.5, 0.75, 1.0)
    points = [Point(tokens * part, KNOWN.loss(size, tokens * part) + 0.3 * (1 - part), 1 - part) for part in parts]
    return Curve(f"{size:g}-{tokens:g}", size, tuple(points))


CURVES = [decayed(size, tokens) for size in SIZES for tokens in LENGTHS]


@pytest.fixture(scope="module")
def noisy() -> Fit:
    return fit(observations(0.002, 1), 100)


# -- the law ----------------------------------------------------------------------------------------------


def test_a_law_without_noise_is_found_exactly() -> None:
    law = fit(observations(0.0)).law
    assert dataclasses.astuple(law) == pytest.approx(dataclasses.astuple(KNOWN), rel=1e-4)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Law)])
def test_a_law_with_noise_is_found_within_its_range(noisy: Fit, name: str) -> None:
    low, high = noisy.range(lambda law: float(getattr(law, name)))
    known = float(getattr(KNOWN, name))
    assert low <= known <= high
    assert high < 2.0 * known or name in ("size_factor", "token_factor")  # a range that holds everything says nothing


def test_four_times_the_width_is_forecast_to_one_percent(noisy: Fit) -> None:
    size, tokens = 16 * SIZES[-1], LENGTHS[-1]
    low, high = noisy.range(lambda law: law.loss(size, tokens))
    assert noisy.law.loss(size, tokens) == pytest.approx(KNOWN.loss(size, tokens), rel=0.01)
    assert low <= KNOWN.loss(size, tokens) <= high


def test_more_noise_gives_a_wider_range(noisy: Fit) -> None:
    wide = fit(observations(0.01, 1), 60).range(lambda law: law.loss(1.2e9, 2e10))
    narrow = noisy.range(lambda law: law.loss(1.2e9, 2e10))
    assert wide[1] - wide[0] > 2.0 * (narrow[1] - narrow[0])


def test_a_wrong_law_lies_outside_the_range(noisy: Fit) -> None:
    """The check above can fail: without the term of the size, the loss of a larger model is another."""
    low, high = noisy.range(lambda law: law.loss(1.2e9, 2e10))
    wrong = dataclasses.replace(KNOWN, size_exponent=0.3).loss(1.2e9, 2e10)
    assert not low <= wrong <= high


def test_tokens_and_loss_are_inverse() -> None:
    assert KNOWN.tokens(1e8, KNOWN.loss(1e8, 3e9)) == pytest.approx(3e9)
    assert KNOWN.tokens(1e8, KNOWN.floor(1e8)) == float("inf")


# -- which points -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "kind"),
    [
        ((0.5, 1.0, 0.5, 0.0), "decayed"),
        ((0.5, 1.0, 0.5, 0.1), "decayed"),
        ((0.5, 1.0, 0.7, 0.5), "between"),
        ((0.5, 1.0, 1.0, 1.0), "constant"),
        ((None, None, None, None), "unknown"),
    ],
)
def test_the_kind_of_a_run(rates: tuple[float | None, ...], kind: Kind) -> None:
    points = tuple(Point(number + 1.0, 2.0, rate) for number, rate in enumerate(rates))
    assert Curve("run", 1.0, points).kind == kind


def with_rates(curve: Curve, *rates: float) -> Curve:
    return dataclasses.replace(
        curve, points=tuple(dataclasses.replace(p, rate=rate) for p, rate in zip(curve.points, rates, strict=True))
    )


def test_runs_that_had_not_decayed_are_left_out_and_named() -> None:
    unfinished = dataclasses.replace(with_rates(CURVES[0], 1, 1, 0.8, 0.6), name="unfinished")
    chosen = choose([*CURVES[1:4], unfinished])
    assert [one.run for one in chosen.observations] == [0, 1, 2]
    assert chosen.notes == ("left out unfinished: the learning rate had not decayed like that of the other runs",)
    with pytest.raises(BadRequest, match="unfinished: the learning rate has neither fallen"):
        choose([unfinished])


def test_all_points_of_constant_runs_count() -> None:
    constant = [with_rates(curve, 1, 1, 1, 1) for curve in CURVES[:3]]
    assert len(choose(constant).observations) == 12
    assert len(choose([*constant, CURVES[3]]).observations) == 1
    assert len(choose(constant, "last").observations) == 3


def test_many_points_are_averaged() -> None:
    points = tuple(Point(float(number), 3.0, 1.0) for number in range(1, 5001))
    chosen = choose([Curve("run", 1e6, points)])
    assert 20 <= len(chosen.observations) <= 40 and {one.loss for one in chosen.observations} == {3.0}


# -- too little data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("curves", [CURVES[:4], CURVES[:8], CURVES[::4], [decayed(1e6 * n, 1e9) for n in range(1, 9)]])
def test_too_little_data_is_one_line_and_no_number(curves: list[Curve]) -> None:
    with pytest.raises(TooLittleData, match=r"needs 3 sizes, 3 numbers of tokens and 6 losses: add finished runs"):
        forecast(curves, choose(curves), Target(1.2e9, 2e10), None, 0, 0)


def test_one_size_answers_for_this_size_alone() -> None:
    result = forecast(CURVES[:4], choose(CURVES[:4]), Target(SIZES[0], 1e11), None, 0, 0)
    assert result.fit.of_size == SIZES[0] and result.routes == () and result.grown is None
    assert result.loss.value == pytest.approx(KNOWN.loss(SIZES[0], 1e11), rel=1e-3)
    with pytest.raises(BadRequest, match="do not say the source's loss"):
        forecast(CURVES[:4], choose(CURVES[:4]), Target(SIZES[0], 1e11), Source(1e6, 1e9), 0, 0)


# -- grown ------------------------------------------------------------------------------------------------


def test_a_grown_model_begins_at_its_source_and_follows_the_target() -> None:
    chosen = choose(CURVES)
    source = choose_source(chosen, 1.2e9, None, None)
    assert source is not None and (source.size, source.tokens) == (SIZES[-1], LENGTHS[-1])
    grown = forecast(CURVES, chosen, Target(1.2e9, 2e10), source, 0, 0).grown
    assert grown is not None
    start = KNOWN.loss(SIZES[-1], LENGTHS[-1])
    ahead = KNOWN.tokens(1.2e9, start)
    assert grown.start.value == pytest.approx(start)
    assert grown.head_start.value == pytest.approx(ahead, rel=1e-3)
    assert grown.loss.value == pytest.approx(KNOWN.loss(1.2e9, answers.KEPT * (2e10 + ahead)), rel=1e-3)
    assert grown.tokens.value == pytest.approx(2e10 / answers.KEPT - ahead, rel=1e-3)
    assert grown.total.value - grown.flops.value == pytest.approx(6 * SIZES[-1] * LENGTHS[-1])
    saved = 6 * (1.2e9 * (2e10 - grown.tokens.value) - SIZES[-1] * LENGTHS[-1])
    assert grown.saved.value == pytest.approx(saved, rel=2e-2)


def test_at_the_break_even_a_source_costs_what_it_saves() -> None:
    goal = KNOWN.loss(1.2e9, 8e9)
    tokens = longest_source(KNOWN, 3e8, 1.2e9, goal)
    saved = 8e9 - answers.grown_tokens(KNOWN, 1.2e9, KNOWN.loss(3e8, tokens), goal)
    assert 1.2e9 * saved == pytest.approx(3e8 * tokens, rel=1e-6)
    assert longest_source(KNOWN, 1.19e9, 1.2e9, KNOWN.loss(1.2e9, 1e13)) == 0.0


@pytest.mark.parametrize("tokens", [1e8, 1e9, 1e10, 1e12])
def test_a_grown_model_is_no_worse_than_its_source_or_random_weights(tokens: float) -> None:
    loss = answers.grown_loss(KNOWN, 1.2e9, 2.8, tokens)
    assert loss <= min(2.8, KNOWN.loss(1.2e9, tokens))
    if loss < 2.8:
        assert answers.grown_tokens(KNOWN, 1.2e9, 2.8, loss) == pytest.approx(tokens)


@pytest.mark.parametrize("kept", [1.0, 0.9])
def test_a_route_switches_where_it_is_cheapest(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEPT", kept)
    goal = KNOWN.loss(1.2e9, 8e9)
    two = route(KNOWN, (3e8, 1.2e9), goal)
    three = route(KNOWN, (7.5e7, 3e8, 1.2e9), goal)
    assert two is not None and three is not None

    def cost(switch: float) -> float:
        later = answers.grown_tokens(KNOWN, 1.2e9, switch, goal)
        return 6 * (3e8 * KNOWN.tokens(3e8, switch) + 1.2e9 * later)

    switch = KNOWN.loss(3e8, two.stages[0].tokens)
    assert two.flops == pytest.approx(cost(switch))
    assert cost(switch) < min(cost(switch + 0.01), cost(switch - 0.01))
    if kept == 1.0:
        assert three.flops < two.flops < 6 * 1.2e9 * 8e9


def test_a_source_is_smaller_than_its_target() -> None:
    with pytest.raises(BadRequest, match="a source is smaller"):
        forecast(CURVES, choose(CURVES), Target(1e8, 1e10), Source(1e8, 1e9), 0, 0)
    with pytest.raises(BadRequest, match="no curve has 5e\\+07 weights: give --source-tokens"):
        choose_source(choose(CURVES), 1e9, 5e7, None)


# -- files ------------------------------------------------------------------------------------------------

ROWS = [(1000.0, 4.0, 0.5), (2000.0, 3.5, 1.0), (3000.0, 3.25, 0.0)]


def as_csv(separator: str) -> str:
    lines = ["Parameters", "tokens", "loss", "learning_rate"], *([5e4, *row] for row in ROWS)
    return "\n".join(separator.join(map(str, line)) for line in lines) + "\n"


def rows(**more: float) -> list[dict[str, float]]:
    return [{**more, "tokens": tokens, "loss": loss, "learning_rate": rate} for tokens, loss, rate in ROWS]


def columns() -> dict[str, Any]:
    names = ("tokens", "loss", "lr")
    return {"parameters": 5e4, **dict(zip(names, zip(*ROWS, strict=True), strict=True))}


def trainer_state(*, counts_tokens: bool) -> dict[str, Any]:
    log: list[dict[str, float]] = [{"step": 0, "eval_loss": 9.0}]
    for tokens, loss, rate in ROWS:
        step = tokens / 100
        log += [{"step": step, "loss": 7.0, "learning_rate": rate}, {"step": step, "eval_loss": loss}]
    return {"global_step": 30, "log_history": log, **({"num_input_tokens_seen": 3000} if counts_tokens else {})}


@pytest.mark.parametrize(
    ("name", "text", "prefix"),
    [
        ("a.csv", as_csv(","), ""),
        ("a.tsv", as_csv("\t"), ""),
        ("a=b.csv", as_csv(";"), ""),
        ("a.jsonl", "\n".join(json.dumps(row) for row in rows(parameters=5e4)), ""),
        ("a.json", json.dumps(rows()), "50k="),
        ("a.json", json.dumps({"parameters": 5e4, "points": rows()}), ""),
        ("a.json", json.dumps(columns()), ""),
        ("trainer_state.json", json.dumps(trainer_state(counts_tokens=True)), "5e4="),
        ("trainer_state.json", json.dumps(trainer_state(counts_tokens=False)), "0.05M="),
    ],
)
def test_every_format_gives_the_same_curve(tmp_path: Path, name: str, text: str, prefix: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    (curve,) = read_curves(f"{prefix}{path}", Given(tokens_per_step=100.0))
    assert curve == Curve(str(path), 5e4, tuple(Point(*row) for row in ROWS))


def test_a_file_may_have_several_runs(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("run,parameters,tokens,loss\na,10,1,2.0\nb,20,1,1.5\na,10,2,1.8\n")
    assert [(curve.size, len(curve.points)) for curve in read_curves(str(path), Given())] == [(10.0, 2), (20.0, 1)]


BAD = [
    ("a.csv", "tokens,loss\n1,2\n", BadRequest, "does not say the number of weights: add a column 'parameters', or"),
    ("a.csv", "parameters,tokens,loss\n1,1,2\n2,2,1\n", BadRequest, "several numbers of weights"),
    ("a.csv", "parameters,step,loss\n5,1,2\n", BadRequest, "it counts steps, not tokens: give --tokens-per-step"),
    ("a.csv", "parameters,loss\n5,2\n", BadModel, "neither 'tokens' nor 'step'"),
    ("a.csv", "parameters,tokens,los\n5,1,2\n", BadModel, "no numbers under 'loss'"),
    ("a.csv", "parameters,tokens,loss\n5,1,much\n", BadModel, "loss is 'much', which is no number"),
    ("a.csv", "parameters,tokens,loss\n5,1,nan\n", BadModel, "a loss is a positive number"),
    ("a.csv", "parameters,tokens,loss\n5,0,2\n", BadModel, "no loss after the start"),
    ("a.csv", "", BadModel, "it has no rows"),
    ("a.json", "{", BadModel, "neither CSV"),
    ("a.json", '{"tokens": [1, 2], "loss": [1]}', BadModel, "columns have different lengths"),
    ("a.json", "3", BadModel, "no list of rows"),
]


@pytest.mark.parametrize(("name", "text", "error", "words"), BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, text: str, error: type[Exception], words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(error, match=words) as problem:
        read_curves(str(path), Given())
    assert str(problem.value).startswith(str(path)) and "\n" not in str(problem.value)


def test_event_files_without_tensorboard_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BadRequest, match=r"pip install 'hyperclone-onnx\[tensorboard\]'"):
        read_curves(f"5k={tmp_path}", Given())


def test_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(tmp_path)
    for tokens, loss, rate in ROWS:
        writer.add_scalar("train/loss", 7.0, tokens / 100)
        writer.add_scalar("eval/loss", loss, tokens / 100)
        writer.add_scalar("train/learning_rate", rate, tokens / 100)
    writer.close()
    (curve,) = read_curves(f"50k={tmp_path}", Given(tokens_per_step=100.0))
    assert curve.points == tuple(Point(*row) for row in ROWS)
    (other,) = read_curves(f"50k={tmp_path}", Given(tokens_per_step=100.0, tag="train/loss"))
    assert {point.loss for point in other.points} == {7.0}
    with pytest.raises(BadRequest, match="it has no scalar 'loss'; it has eval/loss, train/"):
        read_curves(f"50k={tmp_path}", Given(tokens_per_step=100.0, tag="loss"))


# -- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for curve in CURVES:
        lines = [f"{curve.size},{point.tokens},{point.loss},{point.rate}" for point in curve.points]
        paths.append(tmp_path / f"{curve.name}.csv")
        paths[-1].write_text("\n".join(["parameters,tokens,loss,lr", *lines]))
    return paths


def test_the_command_answers(cli: Command, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--target", "1.2B", "--samples", "20")
    outcome = cli("forecast", *files, *options, "--json-out", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert (outcome.code, outcome.stderr) == (0, "")
    goal = f"{KNOWN.loss(1.2e9, 2e10):.4f}"
    for words in (
        "the losses of 300 M are forecast ",
        "target: 1.2 B weights, 20 B tokens",
        f"to the loss {goal}: FLOPs",
        "grown from 300 M",
        "break-even",
    ):
        assert words in outcome.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["random"]["loss"]["value"] == pytest.approx(KNOWN.loss(1.2e9, 2e10), rel=1e-3)
    assert result["grown"]["tokens"]["value"] < result["random"]["tokens"]["value"]
    assert all(route["gain"]["value"] > 1.0 for route in result["routes"])


def test_the_command_refuses_in_one_line(
    cli: Command, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "needs 3 sizes", (*files[:4], "--target", "1B")),
        (4, "cannot be read", (tmp_path / "none.csv", "--target", "1B")),
        (2, "no positive number", (*files, "--target", "big")),
    ]
    for code, words, arguments in cases:
        outcome = cli("forecast", *map(str, arguments), "--json-out", tmp_path / "out.json")
        assert (outcome.code, outcome.stdout) == (code, "") and words in outcome.error
    assert not (tmp_path / "out.json").exists()
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else find(name, *rest))
    outcome = cli("forecast", *files, "--target", "1B")
    assert outcome.code == 2 and "pip install 'hyperclone-onnx[forecast]'" in outcome.error
