"""``hyperclone-onnx inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import json_option, model_path
from hyperclone_onnx.commands.pages import check_page, html_option, write_page
from hyperclone_onnx.commands.printing import console, print_json, printing


@click.command(short_help="Show which dimensions of a model can grow.")
@click.argument("model", type=model_path)
@html_option
@json_option
@guarded
def inspect(model: Path, page: Path | None, as_json: bool) -> None:
    """Show the dimensions of MODEL: which can grow, which cannot and why, and what each tensor's axes are."""
    from hyperclone_onnx.analysis.analysing import analyse
    from hyperclone_onnx.reports.inspection import inspection, print_inspection

    check_page(page, [model])
    analysis = analyse(model)
    if page is not None:
        from hyperclone_onnx.reports.html.inspection import inspection_page

        write_page(page, inspection_page(analysis))
    with printing():
        print_json(inspection(analysis)) if as_json else print_inspection(console(), analysis)
