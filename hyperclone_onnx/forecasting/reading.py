"""Reads loss curves: CSV, JSON and JSON lines, the state of the Hugging Face Trainer, and TensorBoard's event files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadModel, BadRequest, first_line
from hyperclone_onnx.forecasting.curves import Curve, Point
from hyperclone_onnx.forecasting.numbers import number

TOKENS = ("tokens", "num_input_tokens_seen", "bytes")
STEPS = ("step", "steps", "iteration")
LOSSES = ("eval_loss", "validation_loss", "val_loss", "loss")
"""A loss on held-out text comes first: the training loss is measured before the step, and is noisier."""
RATES = ("learning_rate", "lr", "rate")
SIZES = ("parameters", "weights", "size")
CSV = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Row:
    """A row of a file: the name of its run, and the numbers that it has, by column."""

    run: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Given:
    """What the user says about curves that their files do not say.

    Args:
        tokens_per_step: the tokens of a step, for files that only number their steps.
        tag: the name of the loss in TensorBoard's files.
    """

    tokens_per_step: float | None = None
    tag: str | None = None


def read_curves(argument: str, given: Given) -> list[Curve]:
    """Read the curves of an argument of the command.

    Args:
        argument: ``FILE``, or ``SIZE=FILE`` where the file does not say the number of weights.
        given: what the user says besides.

    Raises:
        BadModel: the file cannot be read or is no curve.
        BadRequest: the size or the tokens of a step are needed and not given.
    """
    size, path = _parts(argument)
    runs: dict[str, list[Row]] = {}
    for row in _rows(path, given):
        runs.setdefault(row.run, []).append(row)
    if not runs:
        raise BadModel(f"{path}: it has no rows")
    return [_curve(path, run, members, size, given) for run, members in runs.items()]


def file_of(argument: str) -> Path:
    """The file of an argument of the command."""
    return _parts(argument)[1]


def _parts(argument: str) -> tuple[float | None, Path]:
    prefix, sign, rest = argument.partition("=")
    size = number(prefix) if sign else None
    return size, Path(argument if size is None else rest)


def _curve(path: Path, run: str, rows: Sequence[Row], size: float | None, given: Given) -> Curve:
    name = f"{path} ({run})" if run else str(path)
    if size is None:
        sizes = {value for row in rows if (value := _first(row, SIZES)) is not None}
        if len(sizes) != 1:
            why = "its rows have several numbers of weights" if sizes else "it does not say the number of weights"
            raise BadRequest(f"{name}: {why}: add a column 'parameters', or write it in front: 125M={path}")
        size = sizes.pop()
    loss_name = next((column for column in LOSSES if any(column in row.numbers for row in rows)), None)
    if loss_name is None:
        raise BadModel(f"{name}: it has no numbers under 'loss' (nor under {', '.join(LOSSES[:-1])})")
    if not size > 0.0:
        raise BadModel(f"{name}: the number of weights is {size:g}")
    points: dict[float, Point] = {}
    rate: float | None = None
    for row in rows:
        own = _first(row, RATES)
        rate = rate if own is None else own
        loss = row.numbers.get(loss_name)
        if loss is None:
            continue
        tokens = _tokens(row, name, given)
        if not (math.isfinite(loss) and loss > 0.0):
            raise BadModel(f"{name}: the loss after {tokens:g} tokens is {loss:g}: a loss is a positive number")
        if tokens > 0.0:
            points[tokens] = Point(tokens, loss, rate)
    if not points:
        raise BadModel(f"{name}: it has no loss after the start of the training")
    return Curve(name, size, tuple(points[tokens] for tokens in sorted(points)))


def _tokens(row: Row, name: str, given: Given) -> float:
    tokens = _first(row, TOKENS)
    if tokens is not None:
        return tokens
    step = _first(row, STEPS)
    if step is None:
        raise BadModel(f"{name}: a row has a loss, but neither 'tokens' nor 'step'")
    if given.tokens_per_step is None:
        raise BadRequest(f"{name}: it counts steps, not tokens: give --tokens-per-step (batch x length)")
    return step * given.tokens_per_step


def _first(row: Row, columns: Sequence[str]) -> float | None:
    return next((row.numbers[column] for column in columns if column in row.numbers), None)


# -- formats ----------------------------------------------------------------------------------------------


def _rows(path: Path, given: Given) -> list[Row]:
    if path.is_dir() or path.name.startswith("events.out.tfevents"):
        return [_row(path, row) for row in _tensorboard(path, given)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadModel(f"{path}: it cannot be read ({first_line(problem)})") from problem
    rows: Sequence[Mapping[str, Any]] = _csv(text) if path.suffix.lower() in CSV else _json(path, text)
    return [_row(path, row) for row in rows]


def _row(path: Path, row: Mapping[str, Any]) -> Row:
    values = {str(name).strip().lower(): value for name, value in row.items()}
    numbers: dict[str, float] = {}
    for name in (*TOKENS, *STEPS, *LOSSES, *RATES, *SIZES):
        value = values.get(name)
        if value is None or value == "":
            continue
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as problem:
            raise BadModel(f"{path}: {name} is {value!r}, which is no number") from problem
    return Row(str(values.get("run", "")), numbers)


def _csv(text: str) -> list[dict[str, Any]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    return [
        {name: value for name, value in row.items() if name is not None}
        for row in csv.DictReader(text.splitlines(), delimiter=delimiter)
    ]


def _json(path: Path, text: str) -> list[Mapping[str, Any]]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        try:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as problem:
            raise BadModel(f"{path}: it is neither CSV (by its suffix) nor JSON ({first_line(problem)})") from problem
    if isinstance(data, dict) and isinstance(data.get("log_history"), list):
        tokens = data.get("num_input_tokens_seen")
        steps = data.get("global_step")
        rows = list(data["log_history"])
        if tokens and steps and not any(isinstance(row, dict) and TOKENS[1] in row for row in rows):
            rows = [{**row, "tokens": row["step"] * tokens / steps} if _has_step(row) else row for row in rows]
        data = rows
    elif isinstance(data, dict) and isinstance(data.get("points"), list):
        common = {name: value for name, value in data.items() if not isinstance(value, list | dict)}
        data = [{**common, **row} if isinstance(row, dict) else row for row in data["points"]]
    elif isinstance(data, dict):
        columns = {name: value for name, value in data.items() if isinstance(value, list)}
        lengths = {len(value) for value in columns.values()}
        if len(lengths) > 1:
            raise BadModel(f"{path}: its columns have different lengths ({', '.join(map(str, sorted(lengths)))})")
        common = {name: value for name, value in data.items() if name not in columns}
        data = [{**common, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]
    if not (isinstance(data, list) and all(isinstance(row, dict) for row in data)):
        raise BadModel(f"{path}: it is JSON, but no list of rows such as {{'tokens': 1e6, 'loss': 3.2}}")
    return data


def _has_step(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int | float)


def _tensorboard(path: Path, given: Given) -> list[dict[str, Any]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as problem:
        raise BadRequest(
            f"{path}: event files need the package tensorboard: pip install 'hyperclone-onnx[tensorboard]'"
        ) from problem
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    if not tags:
        raise BadModel(f"{path}: it has no scalars of TensorBoard")
    loss = given.tag or _loss_tag(path, tags)
    if loss not in tags:
        raise BadRequest(f"{path}: it has no scalar {loss!r}; it has {', '.join(tags)}")
    rows: list[dict[str, Any]] = [
        {"step": event.step, "learning_rate": event.value}
        for tag in tags
        if tag.rpartition("/")[2] in RATES[:2]
        for event in events.Scalars(tag)
    ]
    rows += [{"step": event.step, "loss": event.value} for event in events.Scalars(loss)]
    return sorted(rows, key=lambda row: (row["step"], "loss" in row))


def _loss_tag(path: Path, tags: Sequence[str]) -> str:
    """The tag of the loss: the only one that is called loss, or the only one of them on held-out text."""
    losses = [tag for tag in tags if tag.rpartition("/")[2] in LOSSES]
    held_out = [tag for tag in losses if any(word in tag for word in ("eval", "val"))]
    for candidates in (held_out, losses):
        if len(candidates) == 1:
            return candidates[0]
    raise BadRequest(f"{path}: say which scalar is the loss: --tag, one of {', '.join(losses or tags)}")
