"""``hyperclone-onnx shrink``."""

from __future__ import annotations

from pathlib import Path

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import (
    device_option,
    dim_option,
    inputs_option,
    json_option,
    model_path,
    shard_size_option,
    validate_option,
    workers_option,
)
from hyperclone_onnx.commands.printing import console, print_json, printing, progress


@click.command()
@click.argument("model", type=model_path)
@click.option("-o", "--output", required=True, type=model_path, help="The file to write, e.g. small.onnx.")
@click.option(
    "--method",
    type=click.Choice(["collapse"]),
    default="collapse",
    show_default=True,
    help="collapse: undo the growth by which MODEL was made. The small model has the mean of what the clones became.",
)
@click.option(
    "--plan",
    type=model_path,
    help="For collapse, the plan that expand --plan-out wrote, if MODEL does not carry it.",
)
@click.option(
    "--source",
    type=model_path,
    help="For collapse, the small model that MODEL was grown from, if MODEL does not carry its graph. Its weights are "
    "not used.",
)
@device_option
@validate_option("validation", "full", "algebraic", "none")
@inputs_option("the small model")
@dim_option
@shard_size_option("Gigabytes in one data file; more are spread over several. By default there is one, above 1.5 GB.")
@workers_option
@json_option
@guarded
def shrink(
    model: Path,
    output: Path,
    method: str,
    plan: Path | None,
    source: Path | None,
    device: str,
    validation: str | None,
    inputs: Path | None,
    dims: dict[str, int],
    max_shard_size: int | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Make a small model out of MODEL, and report how far its outputs moved."""
    from hyperclone_onnx.reports.shrinkage import print_shrinkage
    from hyperclone_onnx.shrinking.shrinking import shrink as run

    with progress() as (notify, tensors_done):
        result = run(
            model,
            output,
            method=method,  # type: ignore[arg-type]
            plan=plan,
            source=source,
            check=False if validation == "none" else validation or True,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            max_shard_size=max_shard_size,
            workers=workers,
            inputs=inputs,
            dims=dims,
            progress=tensors_done,
            notify=notify,
        )
    with printing():
        print_json(result.to_json()) if as_json else print_shrinkage(console(), result)
