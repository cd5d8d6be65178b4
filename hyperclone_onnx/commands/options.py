"""Options that several commands have, and the parsers of their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_path = click.Path(readable=False, path_type=Path)
"""A path. The command reports a file that it cannot read itself (exit code 4): click would end with 2."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where ONNX Runtime runs the models. auto takes CUDA when it starts; the report says which ran.",
)

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes at work; by default one for a small model, else as many as there are cores, at most 4. "
    "The results are the same.",
)

no_validate_option = click.option("--no-validate", is_flag=True, help="Do not compare ONNX Runtime with the framework.")

_HOW_TO_VALIDATE = (
    "full: every tensor, and every output on random inputs. algebraic: every tensor and node, without running the "
    "models. By default full where both models fit in free memory, else algebraic and the first layers run."
)


def validate_option(name: str, *modes: str) -> Decorator:
    """``--validate`` as the argument `name`, with some of its modes."""
    return click.option("--validate", name, type=click.Choice(modes), help=_HOW_TO_VALIDATE)


def _named_number(text: str) -> tuple[str, int] | None:
    """The name and the whole number of a text such as ``hidden=960``; None if it is no such text."""
    name, equals, number = text.rpartition("=")
    return (name, int(number)) if equals and name and number.isascii() and number.isdigit() else None


def _size_of(text: str) -> tuple[str, int] | None:
    """The same, with a number from 1 on for a role, a dimension or a stack, whose names have no equals sign."""
    entry = _named_number(text)
    return entry if entry is not None and entry[1] > 0 and "=" not in entry[0] else None


def parse_dims(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """A callback that makes a number by name of texts such as ``sequence_length=64``."""
    dims: dict[str, int] = {}
    for text in values:
        entry = _named_number(text)
        if entry is None:
            raise click.BadParameter(f"{text!r}: write NAME=N, such as sequence_length=64, with N a whole number")
        dims[entry[0]] = entry[1]
    return dims


dim_option = click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=N",
    callback=parse_dims,
    help="Run the models with this number for a size that the inputs call so, such as sequence_length=64.",
)


def inputs_option(whose: str) -> Decorator:
    """``--inputs``: a path with inputs of a model."""
    return click.option(
        "--inputs",
        type=model_path,
        help=f"Run the models on these inputs of {whose} instead of random ones: an .npz file, a folder of .npy files, "
        "or ONNX's test data (a folder of input_0.pb and so on, or of test_data_set_*).",
    )


def seed_option(what: str) -> Decorator:
    """``--seed``, which draws something."""
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help=f"Draws {what}.")


def shard_size_option(text: str, default: float | None = None) -> Decorator:
    """``--max-shard-size`` in gigabytes; the command gets bytes, as `max_shard_size`."""
    return click.option(
        "--max-shard-size",
        type=click.FloatRange(min=0.0, min_open=True),
        callback=_bytes,
        default=default,
        show_default=default is not None,
        metavar="GB",
        help=text,
    )


def finite(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """A callback that refuses infinity and NaN, which click takes for numbers."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number; give one such as 10")
    return value


def _bytes(context: click.Context, option: click.Parameter, gigabytes: float | None) -> int | None:
    return None if gigabytes is None else max(1, int(finite(context, option, gigabytes) * 1e9))


def parse_sizes(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """A callback that makes a size by role of texts such as ``hidden=960``."""
    sizes: dict[str, int] = {}
    for text in values:
        entry = _size_of(text)
        if entry is None:
            raise click.BadParameter(f"{text!r}: write ROLE=SIZE, such as hidden=960, with SIZE a whole number")
        name, size = entry
        if sizes.setdefault(name, size) != size:
            raise click.BadParameter(f"{text!r}: {name} has the size {sizes[name]} already; leave one of the two out")
    return sizes


def parse_layers(_context: click.Context, _option: click.Parameter, text: str | None) -> int | dict[str, int] | None:
    """A callback that makes a number of layers of ``8``, and one for each stack of ``encoder=8,decoder=12``."""
    if text is None:
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    layers: dict[str, int] = {}
    for part in text.split(","):
        entry = _size_of(part)
        if entry is None:
            raise click.BadParameter(f"{text!r}: write N, such as 8, or STACK=N,STACK=N, such as encoder=8,decoder=12")
        name, count = entry
        if name in layers:
            raise click.BadParameter(f"{text!r}: the stack {name!r} is named twice")
        layers[name] = count
    return layers


def parse_experts_in(_context: click.Context, _option: click.Parameter, text: str) -> str | int | list[int]:
    """A callback that makes a number of ``every 2``, a list of numbers of ``1,3``, and leaves ``all``."""
    if text == "all":
        return text
    word, _, number = text.partition(" ")
    if word == "every" and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r}: write all, 'every 2', or numbers of feed-forward blocks such as 1,3")
    return [int(part) for part in parts]


def parse_layers_at(_context: click.Context, _option: click.Parameter, text: str) -> str | list[int]:
    """A callback that makes a list of numbers of ``3,7``, and leaves ``even`` and ``end``."""
    if text in ("even", "end"):
        return text
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r}: write even, end, or numbers of layers such as 3,7")
    return [int(part) for part in parts]


class Factor(click.ParamType[float]):
    """A factor from 1 on, or from above 0 up to `most`: an int where it is whole, else a float."""

    name = "number"

    def __init__(self, most: float | None = None) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a factor."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a valid number: give one such as 2 or 1.5", param, ctx)
        if self.most is not None and not 0 < number <= self.most:
            self.fail(f"{value} is not in the range 0<x<={self.most:g}: to grow, use expand.", param, ctx)
        if self.most is None and (not math.isfinite(number) or number < 1):
            self.fail(f"{value} is not in the range x>=1.", param, ctx)
        return int(number) if number.is_integer() else number


def parse_requests(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """A callback that makes a factor by role of texts such as ``ffn=2``."""
    requests: dict[str, int] = {}
    for text in values:
        entry = _size_of(text)
        if entry is None:
            raise click.BadParameter(f"{text!r}: write ROLE=N, such as ffn=2 or head_dim=1, with N a whole number")
        requests[entry[0]] = entry[1]
    return requests
