"""``hyperclone-onnx diagnose``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import (
    device_option,
    dim_option,
    inputs_option,
    json_option,
    model_path,
    seed_option,
)
from hyperclone_onnx.commands.pages import check_page, html_option, write_page
from hyperclone_onnx.commands.printing import console, print_json, printing, progress


@click.command(short_help="Measure how far the clones of a grown model have parted.")
@click.argument("model", type=model_path)
@click.option("--source", type=model_path, help="The small model's file: ranks are then compared with its own.")
@click.option("--plan", type=model_path, help="The file of expand --plan-out, where MODEL carries no plan any more.")
@inputs_option("MODEL, or of the model that it was grown from,")
@dim_option
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Of random inputs.")
@click.option(
    "--length", type=click.IntRange(min=1), default=32, show_default=True, help="Of random inputs, in tokens."
)
@seed_option("the inputs")
@click.option("--no-activations", is_flag=True, help="Do not run MODEL: judge by its weights alone.")
@click.option("--no-ranks", is_flag=True, help="Leave out effective ranks, which take most of the time.")
@device_option
@click.option(
    "--plot",
    type=model_path,
    metavar="FILE.png",
    help="Draw a picture (needs the extra plot); FILE.svg, FILE.pdf and others that matplotlib writes are possible.",
)
@click.option("--json-out", type=model_path, metavar="FILE.json", help="Also write the result as JSON.")
@html_option
@json_option
@guarded
@click.pass_context
def diagnose(
    context: click.Context,
    model: Path,
    source: Path | None,
    plan: Path | None,
    inputs: Path | None,
    dims: dict[str, int],
    batch: int,
    length: int,
    seed: int,
    no_activations: bool,
    no_ranks: bool,
    device: Any,
    plot: Path | None,
    json_out: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Tell how far the clones of MODEL, grown and perhaps trained since, have parted, layer by layer.

    Stuck or not, the exit code is 0: it is a diagnosis.
    """
    from hyperclone_onnx.diagnosis import diagnose as run
    from hyperclone_onnx.diagnosis.plot import check_plot, save_plot
    from hyperclone_onnx.publishing.publication import check_output, write_text
    from hyperclone_onnx.reports.diagnosis import print_diagnosis

    sized = any(context.get_parameter_source(name) == ParameterSource.COMMANDLINE for name in ("batch", "length"))
    taken = [path.resolve() for path in (model, source, plan, inputs) if path is not None]
    outputs = [path for path in (plot, json_out) if path is not None]
    for path in outputs:
        check_output(path, [*taken, *(other for other in outputs if other != path)])
    check_page(page, [model, source, plan, inputs], outputs)
    if plot is not None:
        check_plot(plot)
    with progress() as (notify, _):
        diagnosis = run(
            model,
            source,
            not no_activations,
            plan=plan,
            inputs=inputs,
            dims=dims,
            lengths=(batch, length) if sized else None,
            seed=seed,
            ranks=not no_ranks,
            device=device,
            notify=notify,
        )
    if json_out is not None:
        write_text(json_out, json.dumps(diagnosis.to_json(), indent=1) + "\n")
    if plot is not None:
        save_plot(diagnosis, plot)
    if page is not None:
        from hyperclone_onnx.reports.html.diagnosis import diagnosis_page

        write_page(page, diagnosis_page(diagnosis))
    with printing():
        print_json(diagnosis.to_json()) if as_json else print_diagnosis(console(), diagnosis)
