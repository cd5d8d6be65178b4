"""``hyperclone-onnx export``."""

from __future__ import annotations

from pathlib import Path

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import json_option, model_path
from hyperclone_onnx.commands.printing import console, print_json, printing, progress


@click.command(short_help="Export a Hugging Face folder to ONNX.")
@click.argument("folder", type=model_path)
@click.option("-o", "--output", required=True, type=model_path, help="The folder to make.")
@click.option("--cache", is_flag=True, help="Write a second file that takes and gives the cache of a text decoder.")
@json_option
@guarded
def export(folder: Path, output: Path, cache: bool, as_json: bool) -> None:
    """Export FOLDER, a Hugging Face checkpoint, as an ONNX file in float32.

    The file has the inputs of the class that config.json names. Free lengths are called batch, sequence,
    target_sequence, past_sequence and so on.
    """
    from hyperclone_onnx.frameworks.hugging_face import export_checkpoint
    from hyperclone_onnx.reports.checkpoint import print_export

    with progress() as (notify, _):
        result = export_checkpoint(folder, output, cache=cache, notify=notify)
    with printing():
        print_json(result.to_json()) if as_json else print_export(console(), result)
