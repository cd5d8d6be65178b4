"""``hyperclone-onnx inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import json_option, model_path
from hyperclone_onnx.commands.pages import check_page, html_option, write_page
from hyperclone_onnx.commands.printing import console, print_json, printing, say
from hyperclone_onnx.frameworks.targets import is_checkpoint

if TYPE_CHECKING:
    from hyperclone_onnx.analysis.analysing import Analysis


@click.command(short_help="Show which dimensions of a model can grow.")
@click.argument("model", type=model_path)
@html_option
@json_option
@guarded
def inspect(model: Path, page: Path | None, as_json: bool) -> None:
    """Show the dimensions of MODEL: which can grow, which cannot and why, and what each tensor's axes are.

    MODEL is an ONNX file, or a Hugging Face folder without ONNX files. Such a folder is exported to look at it.
    """
    from hyperclone_onnx.analysis.analysing import analyse

    check_page(page, [model])
    if not is_checkpoint(model):
        _report(analyse(model), page, as_json)
        return
    from hyperclone_onnx.frameworks.hugging_face import exported_file

    with exported_file(model, say) as file:
        _report(replace(analyse(file), path=model), page, as_json)


def _report(analysis: Analysis, page: Path | None, as_json: bool) -> None:
    from hyperclone_onnx.reports.inspection import inspection, print_inspection

    if page is not None:
        from hyperclone_onnx.reports.html.inspection import inspection_page

        write_page(page, inspection_page(analysis))
    with printing():
        print_json(inspection(analysis)) if as_json else print_inspection(console(), analysis)
