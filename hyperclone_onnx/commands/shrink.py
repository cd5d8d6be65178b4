"""``hyperclone-onnx shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import (
    Factor,
    device_option,
    dim_option,
    inputs_option,
    json_option,
    model_path,
    parse_layers,
    parse_sizes,
    shard_size_option,
    validate_option,
    workers_option,
)
from hyperclone_onnx.commands.printing import console, print_json, printing, progress


@click.command(short_help="Make a small model out of a large one.")
@click.argument("model", type=model_path)
@click.option("-o", "--output", required=True, type=model_path, help="The file to write, e.g. small.onnx.")
@click.option(
    "--method",
    type=click.Choice(["collapse", "selection", "importance"]),
    help="collapse: undo the growth by which MODEL was made; the small model has the mean of what the clones became. "
    "selection: keep some of the rows, columns and layers. importance: keep those that matter most on --data. By "
    "default selection if sizes are asked for, else collapse.",
)
@click.option(
    "--factor",
    type=Factor(most=1),
    help="Multiply hidden, ffn, heads (query and key/value) and other widths by this, such as 0.5; head sizes stay.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="ROLE=SIZE",
    callback=parse_sizes,
    help="Shrink one role (hidden, ffn, heads, kv_heads, group, head_dim, width) or one dimension (ffn.3) to SIZE.",
)
@click.option(
    "--like",
    type=model_path,
    metavar="TARGET",
    help="Shrink to the sizes of another model: a Hugging Face folder, its config.json, or an ONNX file.",
)
@click.option(
    "--layers",
    metavar="N",
    callback=parse_layers,
    help="Keep N layers, the first ones; encoder=8,decoder=12 where there are several stacks.",
)
@click.option(
    "--select",
    default="even",
    show_default=True,
    metavar="WHICH",
    help="Which indices a selection keeps: even (evenly spaced), first, or a JSON file with lists of indices by "
    "dimension or role, and of layers.",
)
@click.option(
    "--data",
    type=model_path,
    metavar="INPUTS",
    help="For importance and selection: measure activations on these inputs of MODEL (the forms of --inputs, or a text "
    "file) instead of random ones.",
)
@click.option(
    "--tokenizer",
    type=model_path,
    help="For a text as --data: the tokenizer.json, or its folder. By default it is looked for beside MODEL.",
)
@click.option("--scores", type=model_path, help="For importance: also write the scores of all parts, as JSON.")
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
@click.option("--plan-out", type=model_path, help="For a selection: also write which indices were kept, as JSON.")
@device_option
@validate_option("validation", "full", "algebraic", "none")
@inputs_option("MODEL (for collapse: of the small model)")
@dim_option
@shard_size_option("Gigabytes in one data file; more are spread over several. By default there is one, above 1.5 GB.")
@workers_option
@json_option
@guarded
def shrink(model: Path, output: Path, validation: str | None, as_json: bool, **options: Any) -> None:
    """Make a small model out of MODEL, and report how far its outputs moved."""
    from hyperclone_onnx.reports.shrinkage import print_shrinkage
    from hyperclone_onnx.shrinking.shrinking import shrink as run

    with progress() as (notify, tensors_done):
        check: Any = False if validation == "none" else validation or True
        result = run(model, output, check=check, **options, progress=tensors_done, notify=notify)
    with printing():
        print_json(result.to_json()) if as_json else print_shrinkage(console(), result)
