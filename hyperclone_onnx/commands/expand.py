"""``hyperclone-onnx expand``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hyperclone_onnx.commands.guard import guarded
from hyperclone_onnx.commands.options import (
    Factor,
    device_option,
    dim_option,
    finite,
    inputs_option,
    json_option,
    model_path,
    parse_experts_in,
    parse_layers,
    parse_layers_at,
    parse_requests,
    parse_sizes,
    seed_option,
    shard_size_option,
    validate_option,
    workers_option,
)
from hyperclone_onnx.commands.pages import check_page, html_option, write_page
from hyperclone_onnx.commands.printing import console, print_json, printing, progress, say
from hyperclone_onnx.commands.recipe_options import Request, with_recipe
from hyperclone_onnx.commands.sections import Sectioned
from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.frameworks.targets import DTYPES, is_checkpoint, may_have_onnx, no_weights
from hyperclone_onnx.plan.strategies import HIGHEST_SNR_DB, LOWEST_SNR_DB, OFFERED, Strategy

SECTIONS = {
    "How much to grow": "--factor --set --size --like --recipe --write-recipe".split(),
    "More layers": "--layers --depth --layers-at".split(),
    "Experts": "--experts --top-k --experts-in --granularity --shared-expert --more-experts --expert-noise "
    "--drop-upcycle --moe-operator".split(),
    "How the clones share a weight": "--strategy --snr-db --seed --untie --separate --interface --allow-change".split(),
    "Validation": "--validate --no-validate --inputs --dim --precision --device".split(),
    "Output": "--output --max-shard-size --plan-out --plan-only --html --json --workers".split(),
    "Folders": "--exclude --keep-onnx --dtype".split(),
}


@click.command(cls=Sectioned, sections=SECTIONS, short_help="Grow a model. The result computes the same.")
@click.argument("model", type=model_path)
@click.option("-o", "--output", type=model_path, help="The file to write, e.g. big.onnx.")
@click.option(
    "--factor",
    type=Factor(),
    help="Grow hidden, ffn, heads (query and key/value) and other widths by this; head sizes are kept. A fraction such "
    "as 1.5 gives the nearest sizes that the graph allows.",
)
@click.option(
    "--set",
    "requests",
    multiple=True,
    metavar="ROLE=N",
    callback=parse_requests,
    help="Grow one role (hidden, ffn, heads, group, head_dim) or one dimension (ffn.3) by N; 1 keeps it.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="ROLE=SIZE",
    callback=parse_sizes,
    help="Grow one role (hidden, ffn, heads, kv_heads, group, head_dim, width) or one dimension (ffn.3) to SIZE.",
)
@click.option(
    "--like",
    type=model_path,
    metavar="TARGET",
    help="Grow to the sizes of another model: a Hugging Face folder, its config.json, or an ONNX file.",
)
@click.option(
    "--layers",
    metavar="N",
    callback=parse_layers,
    help="Grow to N layers; encoder=8,decoder=12 where there are several stacks. Also without a width.",
)
@click.option(
    "--depth",
    type=click.Choice(["identity", "stack", "interpose"]),
    default="identity",
    show_default=True,
    help="How new layers are made. identity: copies that add nothing at first. stack (1..L, 1..L) and interpose "
    "(1 1 2 2): plain copies, which change what the model computes (--allow-change).",
)
@click.option(
    "--layers-at",
    metavar="PLACES",
    default="even",
    show_default=True,
    callback=parse_layers_at,
    help="Where identity layers stand: even, end, or behind the layers of a list such as 3,7 (counted from 0).",
)
@click.option(
    "--experts",
    type=click.IntRange(min=1),
    metavar="N",
    help="Make N experts and a router of each feed-forward block. They compute the same as the block at first.",
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="K", help="How many experts are chosen for each token.")
@click.option(
    "--experts-in",
    metavar="BLOCKS",
    default="all",
    show_default=True,
    callback=parse_experts_in,
    help="Which feed-forward blocks become experts: all, 'every 2' (the last of every two), or a list such as 1,3 "
    "(counted from 0).",
)
@click.option(
    "--granularity",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="G",
    help="Cut each expert into G smaller ones, of which G times as many are chosen.",
)
@click.option(
    "--expert-noise",
    type=click.FloatRange(min=0.0),
    callback=finite,
    default=0.0,
    metavar="LEVEL",
    help="Add noise to the weights of each expert, LEVEL times as large as their deviation (--allow-change).",
)
@click.option(
    "--drop-upcycle",
    type=click.FloatRange(0.0, 1.0),
    callback=finite,
    default=0.0,
    metavar="RATIO",
    help="Draw this ratio of the hidden units of each expert anew, such as 0.5 (--allow-change).",
)
@click.option(
    "--moe-operator",
    type=click.Choice(["standard", "microsoft"]),
    default="standard",
    show_default=True,
    help="How the mixture is written: with ONNX's own operators, or with ONNX Runtime's operator MoE, which computes "
    "only the chosen experts and knows few activation functions.",
)
@click.option(
    "--more-experts",
    type=click.IntRange(min=1),
    metavar="N",
    help="For a mixture of experts: N times as many experts, of which N times as many are chosen. Exact.",
)
@click.option("--shared-expert", is_flag=True, help="Also keep the block as an expert that always runs.")
@click.option(
    "--strategy",
    type=click.Choice(OFFERED),
    default="noisy-diagonal",
    show_default=True,
    help="How the repeats share a weight. Without noise the repeats of a unit get equal gradients and, in a model "
    "trained without dropout, stay equal for ever: the added width is then dead weight.",
)
@click.option(
    "--snr-db",
    type=click.FloatRange(LOWEST_SNR_DB, HIGHEST_SNR_DB),
    callback=finite,
    default=10.0,
    show_default=True,
    help="Weight power over noise power, in dB.",
)
@click.option(
    "--allow-change",
    is_flag=True,
    help="Allow growth that changes what the model computes. The report says how far the outputs moved.",
)
@seed_option("the noise")
@click.option("--untie", is_flag=True, help="Split a tied embedding instead of keeping it one tensor.")
@click.option(
    "--separate",
    is_flag=True,
    help="Split tensors that hold one value everywhere and are used in several places, so that each use is trained.",
)
@click.option(
    "--interface",
    type=click.Choice(["grow", "keep"]),
    default="grow",
    show_default=True,
    help="keep: inputs and outputs keep the source's shapes, so that the grown model is a drop-in.",
)
@device_option
@validate_option("validation", "full", "algebraic", "none")
@click.option("--no-validate", is_flag=True, help="The same as --validate none.")
@inputs_option("MODEL")
@dim_option
@click.option(
    "--precision",
    type=click.Choice(["stored", "float64"]),
    default="stored",
    show_default=True,
    help="float64: also build and run both models in double precision, where rounding can hide nothing.",
)
@click.option("--plan-out", type=model_path, help="Also write the plan, as JSON.")
@click.option("--plan-only", is_flag=True, help="Plan and report, and write nothing but --plan-out.")
@shard_size_option("Gigabytes in one data file; more are spread over several. By default there is one, above 1.5 GB.")
@workers_option
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out files of a folder, such as 'onnx/*_q4.onnx'. A Hugging Face folder without its ONNX files "
    "('*.onnx*') grows as a checkpoint.",
)
@click.option(
    "--recipe",
    type=model_path,
    help="A YAML file that says all that these options can, and strategies for single roles, dimensions and tensors "
    "(docs/sizes.md). Options on the command line replace those of the file.",
)
@click.option("--write-recipe", type=model_path, help="Also write the recipe that this command line means.")
@click.option(
    "--keep-onnx", is_flag=True, help="For a Hugging Face folder: keep the grown ONNX files beside the result."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="For a Hugging Face folder: the type of the weights; else as is."
)
@html_option
@json_option
@guarded
@click.pass_context
def expand(
    context: click.Context,
    /,
    model: Path,
    output: Path | None,
    plan_out: Path | None,
    plan_only: bool,
    recipe: Path | None,
    write_recipe: Path | None,
    keep_onnx: bool,
    dtype: str | None,
    page: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Grow MODEL into a larger model that computes the same, and write it only once that is proven.

    MODEL may be a folder: every .onnx file in it grows by itself, the other files are copied, and OUTPUT is the new
    folder. A Hugging Face folder without ONNX files (or with --exclude '*.onnx*') is exported first, and OUTPUT is the
    grown checkpoint.
    """
    request = with_recipe(context, options, recipe)
    options = dict(request.options)
    factor, validation, exclude = options["factor"], options["validation"], options["exclude"]
    deeper = {name: options[name] for name in ("layers", "depth", "layers_at")}
    experts = _experts(options)
    if factor is None and not any(
        options[name] for name in ("requests", "sizes", "like", "layers", "experts", "more_experts")
    ):
        raise click.UsageError(
            "say how much to grow: --factor 2, or --set ffn=2, --size hidden=960, --like TARGET, --layers 32, "
            "--experts 8 --top-k 2"
        )
    if deeper["layers"] is None and (deeper["depth"], deeper["layers_at"]) != ("identity", "even"):
        raise click.UsageError("--depth and --layers-at say how --layers adds layers: give --layers too")
    if factor is not None and options["like"] is not None:
        raise click.UsageError("--factor and --like contradict each other: leave one of the two out")
    if output is None and not plan_only:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if options["no_validate"] and validation not in (None, "none"):
        raise click.UsageError(f"--no-validate and --validate {validation} contradict each other")
    if not model.is_dir() and exclude:
        raise click.UsageError("--exclude leaves out files of a folder; MODEL is a file")
    checkpoint = is_checkpoint(model, exclude)
    if checkpoint and options["more_experts"] is not None:
        raise click.UsageError(
            "--more-experts is for ONNX files: export the checkpoint first (export FOLDER), then expand the file"
        )
    if not checkpoint and (keep_onnx or dtype is not None):
        raise click.UsageError(
            "--keep-onnx and --dtype are for a Hugging Face folder without ONNX files (or with --exclude '*.onnx*')"
        )
    several = model.is_dir() and not checkpoint
    if several and not may_have_onnx(model):
        raise BadModel(f"{model}: {no_weights(model)}")
    if several and plan_out is not None:
        raise click.UsageError("--plan-out is for one model; each grown file carries its plan in its metadata")
    if several and options["inputs"] is not None:
        raise click.UsageError("--inputs is for one model; the files of a folder have inputs of their own")
    if plan_only and (several or output is not None):
        raise click.UsageError("--plan-only plans one model and writes no other: give a file, and no -o")

    check_page(page, [model, options["inputs"], options["like"], recipe], [output, plan_out, write_recipe])
    text = None if write_recipe is None else _recipe_text(request, write_recipe, model)
    growth: dict[str, Any] = {
        "factor": factor or 1,
        "requests": options["requests"],
        "sizes": options["sizes"],
        "like": options["like"],
        "strategy": Strategy(options["strategy"], options["snr_db"], options["seed"]),
        "untie": options["untie"],
        "separate": options["separate"],
        "keep_interface": options["interface"] == "keep",
        **experts,
        **({} if options["more_experts"] is None else {"more_experts": options["more_experts"]}),
        "allow_change": options["allow_change"],
    }
    if recipe is not None or write_recipe is not None:
        from hyperclone_onnx.planning.recipe_file import strategy_rules

        growth |= {"strategies": strategy_rules(recipe, request.recipe), "recipe": request.growth_recipe()}
    how: dict[str, Any] = {
        "device": options["device"],
        "check": False if validation == "none" else validation or True,
        "precision": options["precision"],
        "max_shard_size": options["max_shard_size"],
        "workers": options["workers"],
        "inputs": options["inputs"],
        "dims": options["dims"],
    }
    if output is None:
        _plan(model, growth | deeper | {"plan_out": plan_out}, checkpoint, page, as_json)
    elif checkpoint:
        chosen = {"plan_out": plan_out, "keep_onnx": keep_onnx, "dtype": dtype, "exclude": exclude}
        _expand_checkpoint(model, output, growth | deeper | how | chosen, page, as_json)
    elif model.is_dir():
        _expand_folder(model, output, exclude, growth | deeper | how, page, as_json)
    else:
        _expand_file(model, output, growth | deeper | how | {"plan_out": plan_out}, page, as_json)
    if text is not None and write_recipe is not None:
        from hyperclone_onnx.publishing.publication import write_text

        write_text(write_recipe, text)


def _experts(options: dict[str, Any]) -> dict[str, Any]:
    """The argument of `expand` for experts, none if none were asked for."""
    if options["experts"] is None:
        names: dict[str, Any] = {"top_k": None, "experts_in": "all", "granularity": 1, "shared_expert": False}
        names |= {"expert_noise": 0.0, "drop_upcycle": 0.0, "moe_operator": "standard"}
        given = [name for name, usual in names.items() if options[name] != usual]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise click.UsageError(f"{option} says how --experts makes experts: give --experts too")
        return {}
    if options["top_k"] is None:
        raise click.UsageError("--experts needs --top-k: the number of experts that are chosen for a token, such as 2")
    from hyperclone_onnx.planning.experts import Experts

    return {
        "experts": Experts(
            options["experts"],
            options["top_k"],
            options["experts_in"],
            options["granularity"],
            options["shared_expert"],
            options["seed"],
            options["expert_noise"],
            options["drop_upcycle"],
            options["moe_operator"],
        )
    }


def _recipe_text(request: Request, path: Path, model: Path) -> str:
    """The text of the recipe file to write.

    Raises:
        CannotWrite, BadRequest: the file cannot be written there.
    """
    from hyperclone_onnx.planning.recipe_file import written_recipe
    from hyperclone_onnx.publishing.publication import check_output

    check_output(path, {model.resolve()})
    return written_recipe(request.recipe, path.parent)


def _expand_checkpoint(model: Path, output: Path, options: dict[str, Any], page: Path | None, as_json: bool) -> None:
    from hyperclone_onnx.frameworks.hugging_face import expand_checkpoint
    from hyperclone_onnx.reports.checkpoint import print_checkpoint

    with progress() as (notify, tensors_done):
        result = expand_checkpoint(model, output, **options, notify=notify, progress=tensors_done)
    if page is not None:
        from hyperclone_onnx.reports.html.checkpoint import checkpoint_page
        from hyperclone_onnx.system.memory import peak_memory

        write_page(page, checkpoint_page(result, peak_memory()))
    with printing():
        print_json(result.to_json()) if as_json else print_checkpoint(console(), result)


def _plan(model: Path, growth: dict[str, Any], checkpoint: bool, page: Path | None, as_json: bool) -> None:
    from hyperclone_onnx.reports.expansion import print_expansion

    if checkpoint:
        from hyperclone_onnx.frameworks.hugging_face import plan_checkpoint

        result = plan_checkpoint(model, **growth, notify=say)
    else:
        from hyperclone_onnx.expansion.expanding import plan_file

        result = plan_file(model, **growth, notify=say)
    if page is not None:
        from hyperclone_onnx.reports.html.expansion import expansion_page
        from hyperclone_onnx.system.memory import peak_memory

        write_page(page, expansion_page(result, peak_memory()))
    with printing():
        print_json(result.to_json()) if as_json else print_expansion(console(), result)


def _expand_file(model: Path, output: Path, options: dict[str, Any], page: Path | None, as_json: bool) -> None:
    from hyperclone_onnx.expansion.expanding import expand as run
    from hyperclone_onnx.reports.expansion import print_expansion

    with progress() as (notify, tensors_done):
        result = run(model, output, **options, notify=notify, progress=tensors_done)
    if page is not None:
        from hyperclone_onnx.reports.html.expansion import expansion_page
        from hyperclone_onnx.system.memory import peak_memory

        write_page(page, expansion_page(result, peak_memory()))
    with printing():
        print_json(result.to_json()) if as_json else print_expansion(console(), result)


def _expand_folder(
    model: Path, output: Path, exclude: tuple[str, ...], options: dict[str, Any], page: Path | None, as_json: bool
) -> None:
    from hyperclone_onnx.folders import expand_folder
    from hyperclone_onnx.reports.folder import print_folder

    with progress() as (notify, tensors_done):
        result = expand_folder(model, output, exclude=exclude, **options, notify=notify, progress=tensors_done)
    if page is not None:
        from hyperclone_onnx.reports.html.expansion import folder_page
        from hyperclone_onnx.system.memory import peak_memory

        write_page(page, folder_page(result, peak_memory()))
    with printing():
        print_json(result.to_json()) if as_json else print_folder(console(), result)
