"""``hyperclone-onnx forecast``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import json_option, model_path, seed_option
from hyperclone_onnx.commands.printing import console, print_json, printing

if TYPE_CHECKING:
    from hyperclone_onnx.forecasting.curves import Choice


def _amount(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """A positive number such as 125M or 3e11."""
    from hyperclone_onnx.forecasting.numbers import number

    if text is None:
        return None
    value = number(text)
    if value is None:
        raise click.BadParameter(f"{text!r} is no positive number such as 125M, 1.5B or 3e11")
    return value


@click.command(short_help="Forecast the loss and the cost of a larger model.")
@click.argument("curves", nargs=-1, required=True)
@click.option("--target", callback=_amount, required=True, metavar="SIZE", help="The weights of the large model.")
@click.option(
    "--tokens", callback=_amount, help="The tokens that it is to be trained on.  [default: those of the longest curve]"
)
@click.option("--loss", callback=_amount, help="The loss to reach.  [default: that of random weights after --tokens]")
@click.option(
    "--source",
    callback=_amount,
    metavar="SIZE",
    help="The weights of the model to grow.  [default: the largest curve's]",
)
@click.option(
    "--source-tokens", callback=_amount, help="The tokens of its training.  [default: those of its longest curve]"
)
@click.option(
    "--points",
    type=click.Choice(["auto", "last", "all"]),
    default="auto",
    show_default=True,
    help="The points to use: by the learning rates, or of every curve the last one or all.",
)
@click.option("--tokens-per-step", callback=_amount, help="Batch times length, for files that count steps.")
@click.option("--tag", help="The scalar of TensorBoard's files that is the loss.")
@click.option("--samples", type=click.IntRange(20, 10_000), default=200, show_default=True, help="Of the bootstrap.")
@seed_option("the bootstrap")
@click.option("--plot", type=model_path, metavar="FILE.png", help="Draw a picture (needs the extra plot).")
@click.option("--json-out", type=model_path, metavar="FILE.json", help="Also write the result as JSON.")
@json_option
@guarded
def forecast(
    curves: tuple[str, ...],
    target: float,
    tokens: float | None,
    loss: float | None,
    source: float | None,
    source_tokens: float | None,
    points: Choice,
    tokens_per_step: float | None,
    tag: str | None,
    samples: int,
    seed: int,
    plot: Path | None,
    json_out: Path | None,
    as_json: bool,
) -> None:
    """Forecast the loss and the cost of a large model from CURVES of small ones, from random weights and grown.

    CURVES are files of finished runs: CSV or JSON with tokens, loss, learning_rate and parameters; trainer_state.json
    of the Hugging Face Trainer; event files of TensorBoard. A size that the file does not say stands in front:
    125M=run/trainer_state.json.
    """
    from hyperclone_onnx.forecasting.answers import Target
    from hyperclone_onnx.forecasting.answers import forecast as run
    from hyperclone_onnx.forecasting.curves import choose
    from hyperclone_onnx.forecasting.law import require_scipy
    from hyperclone_onnx.forecasting.plot import require_matplotlib, save_plot
    from hyperclone_onnx.forecasting.reading import Given, file_of, read_curves
    from hyperclone_onnx.forecasting.sources import choose_source
    from hyperclone_onnx.publishing.publication import check_output, write_text
    from hyperclone_onnx.reports.forecast import print_forecast

    require_scipy()
    outputs = [path for path in (plot, json_out) if path is not None]
    for path in outputs:
        check_output(path, [*map(file_of, curves), *(other for other in outputs if other != path)])
    if plot is not None:
        require_matplotlib()
    given = Given(tokens_per_step, tag)
    read = [curve for argument in curves for curve in read_curves(argument, given)]
    chosen = choose(read, points)
    asked = Target(target, tokens or max(one.tokens for one in chosen.observations), loss)
    result = run(read, chosen, asked, choose_source(chosen, target, source, source_tokens), samples, seed)
    if json_out is not None:
        write_text(json_out, json.dumps(result.to_json(), indent=1) + "\n")
    if plot is not None:
        save_plot(result, plot)
    with printing():
        print_json(result.to_json()) if as_json else print_forecast(console(), result)
