"""``hyperclone-onnx validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import (
    device_option,
    dim_option,
    inputs_option,
    json_option,
    model_path,
    seed_option,
    validate_option,
    workers_option,
)
from hyperclone_onnx.commands.pages import check_page, html_option, write_page
from hyperclone_onnx.commands.printing import console, print_json, printing


@click.command(short_help="Compare a grown model with its source.")
@click.argument("small", type=model_path)
@click.argument("big", type=model_path)
@device_option
@validate_option("mode", "full", "algebraic")
@seed_option("the inputs")
@inputs_option("SMALL")
@dim_option
@workers_option
@html_option
@json_option
@guarded
def validate(
    small: Path,
    big: Path,
    device: Any,
    mode: Any,
    seed: int,
    inputs: Path | None,
    dims: dict[str, int],
    workers: int | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Check that BIG, as it is stored, computes what SMALL computes (exit 1 when it does not)."""
    from hyperclone_onnx.expansion.validating import validate_files
    from hyperclone_onnx.reports.validation import print_validation

    check_page(page, [small, big, inputs])
    result = validate_files(small, big, device, seed, mode or "auto", workers, inputs=inputs, dims=dims)
    if page is not None:
        from hyperclone_onnx.reports.html.validation import validation_page

        write_page(page, validation_page(small, big, result))
    with printing():
        print_json(result.to_json()) if as_json else print_validation(console(), result)
    if not result.equal:
        raise SystemExit(1)
