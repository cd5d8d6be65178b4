"""``hyperclone-onnx absorb``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import dim_option, inputs_option, json_option, model_path, no_validate_option
from hyperclone_onnx.commands.printing import print_json, printing


@click.command(short_help="Put trained weights back into ONNX.")
@click.argument("model", type=model_path)
@click.argument("weights", type=model_path)
@click.option("-o", "--output", required=True, type=model_path, help="The file to write, e.g. trained.onnx.")
@click.option(
    "--manifest",
    type=model_path,
    help="For a Hugging Face folder that a trainer saved: the folder that handoff wrote. By default its file is looked "
    "for in WEIGHTS, in the folder of WEIGHTS, and beside MODEL.",
)
@no_validate_option
@inputs_option("MODEL, or of the model that it was grown from,")
@dim_option
@json_option
@guarded
def absorb(
    model: Path,
    weights: Path,
    output: Path,
    manifest: Path | None,
    no_validate: bool,
    inputs: Path | None,
    dims: dict[str, int],
    as_json: bool,
) -> None:
    """Write MODEL anew with trained WEIGHTS.

    WEIGHTS is a state_dict in safetensors (sharded ones with their index too), an .npz file, a folder of
    torch.distributed.checkpoint or of Orbax, or a Hugging Face folder.
    """
    from hyperclone_onnx.frameworks.absorb import absorb as run

    result = run(model, weights, output, manifest=manifest, check=not no_validate, inputs=inputs, dims=dims)
    with printing():
        if as_json:
            print_json(asdict(result))
        else:
            by = f", as {result.validated_by} computes it" if result.validated_by else ""
            cast = "".join(f", {count} cast {kind}" for kind, count in result.casts.items())
            click.echo(f"{output}: {len(result.replaced)} tensors replaced, {len(result.kept)} kept{cast}{by}")
