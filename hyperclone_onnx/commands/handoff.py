"""``hyperclone-onnx handoff``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import (
    dim_option,
    inputs_option,
    json_option,
    model_path,
    no_validate_option,
    shard_size_option,
)
from hyperclone_onnx.commands.printing import console, print_json, printing, progress, warn
from hyperclone_onnx.frameworks.targets import DTYPES, TARGETS


@click.command(short_help="Write a checkpoint for PyTorch, JAX or Hugging Face.")
@click.argument("model", type=model_path)
@click.option("--list", "listing", is_flag=True, help="Show each stored tensor: trained or not, and why.")
@click.option(
    "--to",
    "target",
    type=click.Choice(TARGETS),
    help="Write the weights as a checkpoint of torch.distributed.checkpoint or of Orbax, as safetensors, or as a "
    "Hugging Face checkpoint.",
)
@click.option("-o", "--output", type=model_path, help="The folder to make.")
@click.option(
    "--plan", type=model_path, help="MODEL is the small file: grow it on the way, by this plan (expand --plan-out)."
)
@click.option("--like", type=model_path, help="For hf: the Hugging Face checkpoint of the small model.")
@click.option("--source", type=model_path, help="The small ONNX file, for names or tensors that MODEL does not hold.")
@click.option("--optimizer", type=model_path, help="The small model's AdamW state, to grow beside the weights.")
@click.option(
    "--teacher",
    type=model_path,
    metavar="BIG",
    help="A model that MODEL is to learn from: the manifest says which of its values belong to which of MODEL.",
)
@click.option("--freeze", multiple=True, metavar="GLOB", help="Tensors that are not to be trained, by name.")
@click.option("--train", multiple=True, metavar="GLOB", help="Tensors that are to be trained; stronger than --freeze.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="For hf: the type of the weights. By default each keeps the type that it has in the checkpoint --like.",
)
@shard_size_option(
    "Gigabytes in one safetensors file; more are spread over several. By default 5; for hf as in the checkpoint --like."
)
@no_validate_option
@inputs_option("MODEL, or of the model that it was grown from,")
@dim_option
@json_option
@guarded
def handoff(
    model: Path,
    listing: bool,
    target: Any,
    output: Path | None,
    plan: Path | None,
    like: Path | None,
    source: Path | None,
    optimizer: Path | None,
    teacher: Path | None,
    freeze: tuple[str, ...],
    train: tuple[str, ...],
    dtype: str | None,
    max_shard_size: int | None,
    no_validate: bool,
    inputs: Path | None,
    dims: dict[str, int],
    as_json: bool,
) -> None:
    """Hand MODEL over to a trainer: list what it would train, or write a checkpoint (--to TARGET -o FOLDER).

    With --plan, all processes of `torchrun -m hyperclone_onnx handoff ...` write one checkpoint together.

    In Python, `hyperclone_onnx.frameworks.torch.load` and `hyperclone_onnx.frameworks.jax.load` take the file itself.
    """
    if listing == (target is not None):
        raise click.UsageError("say what to do: --list, or --to TARGET -o FOLDER")
    if listing:
        _list(model, freeze, train, as_json)
        return
    if output is None:
        raise click.UsageError("name the folder to make: -o FOLDER")
    from hyperclone_onnx.frameworks.exports import hand_over
    from hyperclone_onnx.frameworks.processes import place
    from hyperclone_onnx.reports.handover import print_handover

    with progress() as (notify, _):
        result = hand_over(
            model,
            target,
            output,
            plan=plan,
            like=like,
            source=source,
            optimizer=optimizer,
            teacher=teacher,
            freeze=freeze,
            train=train,
            dtype=dtype,
            largest_file=max_shard_size,
            check=not no_validate,
            inputs=inputs,
            dims=dims,
            notify=notify,
        )
    if result.processes > 1 and place()[0] > 0:
        return  # process 0 reports
    warn(result.warning)
    with printing():
        print_json(result.to_json()) if as_json else print_handover(console(), model, result)


def _list(model: Path, freeze: tuple[str, ...], train: tuple[str, ...], as_json: bool) -> None:
    from hyperclone_onnx.frameworks.listing import list_weights
    from hyperclone_onnx.reports.weights import print_weights

    listing = list_weights(model, freeze=freeze, train=train)
    warn(listing.warning)
    with printing():
        if as_json:
            print_json({"model": str(model), "weights": listing.rows, "warning": listing.warning})
        else:
            print_weights(console(), listing.rows)
