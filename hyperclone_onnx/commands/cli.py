"""The command line: ``hyperclone-onnx inspect | expand | validate | handoff | absorb | diagnose``.

Exit codes: 0 done and valid; 1 the models differ; 2 bad usage; 3 refused; 4 bad or unreadable input. Results go to
stdout (JSON with --json), progress and errors to stderr; no traceback reaches a user.
"""

from __future__ import annotations

import _thread
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import wraps
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from hyperclone_onnx.entry import EXIT_CODE, INTERRUPTED
from hyperclone_onnx.errors import HypercloneError, printable
from hyperclone_onnx.plan.strategies import HIGHEST_SNR_DB, LOWEST_SNR_DB, STRATEGIES, Strategy
from hyperclone_onnx.publishing import publication
from hyperclone_onnx.system.signals import STOPPING

DEBUG = "HYPERCLONE_DEBUG"


def _guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn every error into one line on stderr and its exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _ending, _interrupted
        _ending = _interrupted = False
        publication.forget()
        sys.unraisablehook = _unraisable
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, _stop)
        try:
            result = command(*args, **kwargs)
            _ending = True  # what comes now is too late
            return result
        except HypercloneError as problem:
            _fail(str(problem), problem.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail(INTERRUPTED, EXIT_CODE)
        except BrokenPipeError:
            raise SystemExit(1) from None
        except OSError as problem:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            there = f"{publication.finished()} is written and complete, but " if publication.finished() else ""
            _fail(f"{there}the result cannot be printed ({problem.strerror or problem})", 2)
        except (MemoryError, OverflowError):
            _fail("this needs more memory than there is: ask for a smaller factor", 3)
        except Exception as problem:
            if os.environ.get(DEBUG):
                raise
            text = str(problem).strip().splitlines()
            reason = f"{type(problem).__name__}: {text[0] if text else ''}"
            _fail(
                f"this model met a defect of hyperclone-onnx ({reason}); nothing was written. "
                f"Please report it, with the traceback that {DEBUG}=1 shows",
                3,
            )

    return run


_ending = _interrupted = False


def _fail(message: str, code: int) -> NoReturn:
    global _ending
    _ending = True
    if _interrupted:  # an import, or a library, may have made another error of it
        message, code = INTERRUPTED, EXIT_CODE
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    raise SystemExit(code)


class _Interrupt(KeyboardInterrupt):
    """What an interrupt raises.

    Not KeyboardInterrupt itself: where that passes through `exec`, as in an import that makes dataclasses, CPython
    ends by SIGINT, whatever exit code is asked for.
    """


def _stop(_number: int, frame: FrameType | None) -> None:
    """End the command, unless it ends already, or it is too late: what has been published is there, and is reported."""
    global _interrupted
    if not _ending and publication.finished() is None:
        _interrupted = True
        while frame is not None:
            if _lets_nothing_out(frame):
                return _interrupt_soon()
            frame = frame.f_back
        raise _Interrupt


def _lets_nothing_out(frame: FrameType) -> bool:
    """Whether what is raised within is lost, as in the hook below, or aborts, as in C++ that is being imported."""
    return frame.f_code is _unraisable.__code__ or isinstance(frame.f_locals.get("self"), ExtensionFileLoader)


def _unraisable(problem: sys.UnraisableHookArgs) -> None:
    """Interrupt again what an interrupt did not end, since it fell into a place that lets no exception out."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        _interrupt_soon()
    else:
        sys.__unraisablehook__(problem)


def _interrupt_soon() -> None:
    def interrupt() -> None:
        time.sleep(0.001)
        _thread.interrupt_main()

    _thread.start_new_thread(interrupt, ())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hyperclone-onnx")
def main() -> None:
    """Grow a pretrained ONNX transformer without changing what it computes.

    The grown model is wider by whole factors and equal to its source: train on from there (HyperCloning,
    arXiv 2409.12903).
    """
    # A graph of 20,000 nodes is a million objects that all stay: looking through them again and again takes a third
    # of the time.
    gc.set_threshold(100_000, 50, 1000)


def _console() -> Any:
    from rich.console import Console

    class Printer(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            """Print what may hold a model's names: line breaks are this program's alone, at the beginning of a text."""
            super().print(*(_clean(each) if isinstance(each, str) else each for each in objects), **options)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # Piped output has no terminal's width: lines are not broken there.
    return Printer(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def _clean(text: str) -> str:
    breaks = len(text) - len(text.lstrip("\n"))
    return "\n" * breaks + printable(text[breaks:])


@contextmanager
def _printing() -> Iterator[None]:
    """Print a result; a reader that left (`| head`) changes nothing about how the command ends."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2))


_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where ONNX Runtime runs the models; auto takes CUDA when it starts, and says which ran.",
)
_model_path = click.Path(readable=False, path_type=Path)  # who may not read is told as of any other bad file
_VALIDATE = (
    "full: every tensor, and every output on random inputs. algebraic: every tensor and node, without running the "
    "models. By default full where both models fit in free memory, else algebraic and the first layers run."
)
_workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes at work; by default one for a small model, else as many as there are cores, at most 4. "
    "The results are the same.",
)
_validate_option = click.option(
    "--validate", "validation", type=click.Choice(["full", "algebraic", "none"]), help=_VALIDATE
)


@main.command()
@click.argument("model", type=_model_path)
@_json_option
@_guarded
def inspect(model: Path, as_json: bool) -> None:
    """Show the dimensions of MODEL: which can grow, which cannot and why, and what each tensor's axes are."""
    from hyperclone_onnx.analysis.analysing import analyse
    from hyperclone_onnx.reports import report

    analysis = analyse(model)
    with _printing():
        if as_json:
            _print_json(report.inspection(analysis))
        else:
            report.print_inspection(_console(), analysis)


def _parse_requests(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    requests: dict[str, int] = {}
    for text in values:
        name, equals, number = text.partition("=")
        if not equals or not name or not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise click.BadParameter(f"{text!r}: write ROLE=N, such as ffn=2 or head_dim=1, with N a whole number")
        requests[name] = int(number)
    return requests


def _finite(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number; give one such as 10")
    return value


def _finite_or_none(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    return None if value is None else _finite(context, option, value)


@main.command()
@click.argument("model", type=_model_path)
@click.option("-o", "--output", type=_model_path, help="The file to write, e.g. big.onnx.")
@click.option(
    "--factor",
    type=click.IntRange(min=1),
    help="Grow hidden, ffn, heads (query and key/value) and other widths by this; head sizes are kept.",
)
@click.option(
    "--set",
    "requests",
    multiple=True,
    metavar="ROLE=N",
    callback=_parse_requests,
    help="Grow one role (hidden, ffn, heads, group, head_dim) or one dimension (ffn.3) by N; 1 keeps it.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="noisy-diagonal",
    show_default=True,
    help="How the repeats share a weight. Without noise the repeats of a unit get equal gradients and, in a model "
    "trained without dropout, stay equal for ever: the added width is then dead weight.",
)
@click.option(
    "--snr-db",
    type=click.FloatRange(LOWEST_SNR_DB, HIGHEST_SNR_DB),
    callback=_finite,
    default=10.0,
    show_default=True,
    help="Weight power over noise power, in dB.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the noise.")
@click.option("--untie", is_flag=True, help="Split a tied embedding instead of keeping it one tensor.")
@click.option(
    "--interface",
    type=click.Choice(["grow", "keep"]),
    default="grow",
    show_default=True,
    help="keep: inputs and outputs keep the source's shapes, so that the grown model is a drop-in.",
)
@_device_option
@_validate_option
@click.option("--no-validate", is_flag=True, help="The same as --validate none.")
@click.option(
    "--precision",
    type=click.Choice(["stored", "float64"]),
    default="stored",
    show_default=True,
    help="float64: also build and run both models in double precision, where rounding can hide nothing.",
)
@click.option("--plan-out", type=_model_path, help="Also write the plan, as JSON.")
@click.option("--plan-only", is_flag=True, help="Plan and report, and write nothing but --plan-out.")
@click.option(
    "--max-shard-size",
    type=click.FloatRange(min=0.0, min_open=True),
    callback=_finite_or_none,
    metavar="GB",
    help="Gigabytes in one data file; more are spread over several. By default there is one, above 1.5 GB.",
)
@_workers_option
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out files of a folder, such as 'onnx/*_q4.onnx'.",
)
@_json_option
@_guarded
def expand(
    model: Path,
    output: Path | None,
    factor: int | None,
    requests: dict[str, int],
    strategy: Any,
    snr_db: float,
    seed: int,
    untie: bool,
    interface: str,
    device: Any,
    validation: str | None,
    no_validate: bool,
    precision: Any,
    plan_out: Path | None,
    plan_only: bool,
    max_shard_size: float | None,
    workers: int | None,
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Grow MODEL into a larger model that computes the same, and write it only once that is proven.

    MODEL may be a folder: every .onnx file in it grows by itself, the other files are copied, and OUTPUT is the new
    folder.
    """
    if factor is None and not requests:
        raise click.UsageError("say how much to grow: --factor 2, or --set ffn=2")
    if output is None and not plan_only:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if no_validate and validation not in (None, "none"):
        raise click.UsageError(f"--no-validate and --validate {validation} contradict each other")
    from hyperclone_onnx.expansion import expand as run
    from hyperclone_onnx.folders import expand_folder
    from hyperclone_onnx.reports import report

    options: dict[str, Any] = {
        "strategy": Strategy(strategy, snr_db, seed),
        "untie": untie,
        "keep_interface": interface == "keep",
        "device": device,
        "check": False if no_validate or validation == "none" else validation or True,
        "precision": precision,
        "max_shard_size": None if max_shard_size is None else max(1, int(max_shard_size * 1e9)),
        "workers": workers,
    }
    if not model.is_dir() and exclude:
        raise click.UsageError("--exclude leaves out files of a folder; MODEL is a file")
    if model.is_dir() and plan_out is not None:
        raise click.UsageError("--plan-out is for one model; each grown file carries its plan in its metadata")
    if plan_only:
        _plan_only(model, output, factor or 1, requests, options, plan_out, as_json)
        return
    assert output is not None
    with _progress() as (notify, progress):
        options |= {"progress": progress, "notify": notify}
        if model.is_dir():
            grown = expand_folder(model, output, factor or 1, requests, exclude=exclude, **options)
        else:
            result = run(model, output, factor or 1, requests, plan_out=plan_out, **options)
    with _printing():
        if model.is_dir():
            _print_json(grown.to_json()) if as_json else report.print_folder(_console(), grown)
        elif as_json:
            _print_json(result.to_json())
        else:
            report.print_expansion(_console(), result)


def _plan_only(
    model: Path,
    output: Path | None,
    factor: int,
    requests: dict[str, int],
    options: dict[str, Any],
    plan_out: Path | None,
    as_json: bool,
) -> None:
    if model.is_dir() or output is not None:
        raise click.UsageError("--plan-only plans one model and writes no other: give a file, and no -o")
    from hyperclone_onnx.expansion import plan_file
    from hyperclone_onnx.reports import report

    chosen = {name: options[name] for name in ("strategy", "untie", "keep_interface")}
    result = plan_file(model, factor, requests, plan_out=plan_out, notify=_say, **chosen)
    with _printing():
        if as_json:
            _print_json(result.to_json())
        else:
            report.print_expansion(_console(), result)


def _say(stage: str) -> None:
    with suppress(OSError):  # nobody reads stderr: go on
        click.echo(f"{printable(stage)} ...", err=True)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None] | None]]:
    """A progress bar on stderr when it is a terminal; a line for each stage otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _say, None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("reading", total=None)
        yield (
            lambda stage: bars.update(task, description=printable(stage)),
            lambda done, total: bars.update(task, completed=done, total=total),
        )


@main.command()
@click.argument("small", type=_model_path)
@click.argument("big", type=_model_path)
@_device_option
@click.option("--validate", "mode", type=click.Choice(["full", "algebraic"]), help=_VALIDATE)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the inputs.")
@_workers_option
@_json_option
@_guarded
def validate(small: Path, big: Path, device: Any, mode: Any, seed: int, workers: int | None, as_json: bool) -> None:
    """Check that BIG, as it is stored, computes what SMALL computes (exit 1 when it does not)."""
    from hyperclone_onnx.expansion import validate_files
    from hyperclone_onnx.reports import report

    result = validate_files(small, big, device, seed, mode or "auto", workers)
    with _printing():
        if as_json:
            _print_json(result.to_json())
        else:
            report.print_validation(_console(), result)
    if not result.equal:
        raise SystemExit(1)


@main.command()
@click.argument("model", type=_model_path)
@click.option("--list", "listing", is_flag=True, help="Show each stored tensor: trained or not, and why.")
@click.option(
    "--to",
    "target",
    type=click.Choice(["pytorch", "jax", "safetensors", "hf"]),
    help="Write the weights as a checkpoint of torch.distributed.checkpoint or of Orbax, as safetensors, or as a "
    "Hugging Face checkpoint.",
)
@click.option("-o", "--output", type=_model_path, help="The folder to make.")
@click.option("--like", type=_model_path, help="For hf: the Hugging Face checkpoint of the small model.")
@click.option("--source", type=_model_path, help="The small ONNX file, where names or tensors are told by it.")
@click.option("--optimizer", type=_model_path, help="The small model's AdamW state, to grow beside the weights.")
@click.option("--freeze", multiple=True, metavar="GLOB", help="Tensors that are not to be trained, by name.")
@click.option("--train", multiple=True, metavar="GLOB", help="Tensors that are to be trained; stronger than --freeze.")
@click.option(
    "--max-shard-size",
    type=click.FloatRange(min=0.0, min_open=True),
    callback=_finite,
    default=5.0,
    show_default=True,
    help="Gigabytes in one safetensors file; more are spread over several.",
)
@click.option("--no-validate", is_flag=True, help="Do not compare ONNX Runtime with the framework.")
@_json_option
@_guarded
def handoff(
    model: Path,
    listing: bool,
    target: Any,
    output: Path | None,
    like: Path | None,
    source: Path | None,
    optimizer: Path | None,
    freeze: tuple[str, ...],
    train: tuple[str, ...],
    max_shard_size: float,
    no_validate: bool,
    as_json: bool,
) -> None:
    """Hand MODEL over to a trainer: list what it would train, or write a checkpoint (--to TARGET -o FOLDER).

    In Python, `hyperclone_onnx.frameworks.torch.load` and `hyperclone_onnx.frameworks.jax.load` take the file itself.
    """
    if listing == (target is not None):
        raise click.UsageError("say what to do: --list, or --to TARGET -o FOLDER")
    if listing:
        from hyperclone_onnx.frameworks.listing import print_weights, weights

        found = weights(model, freeze=freeze, train=train)
        with _printing():
            if as_json:
                _print_json({"model": str(model), "weights": found})
            else:
                print_weights(_console(), found)
        return
    if output is None:
        raise click.UsageError("name the folder to make: -o FOLDER")
    from hyperclone_onnx.frameworks.exports import hand_over
    from hyperclone_onnx.frameworks.exports.report import print_handover

    with _progress() as (notify, _):
        result = hand_over(
            model,
            target,
            output,
            like=like,
            source=source,
            optimizer=optimizer,
            freeze=freeze,
            train=train,
            largest_file=round(max_shard_size * 1e9),
            check=not no_validate,
            notify=notify,
        )
    with _printing():
        _print_json(result.to_json()) if as_json else print_handover(_console(), model, result)


@main.command()
@click.argument("model", type=_model_path)
@click.argument("weights", type=_model_path)
@click.option("-o", "--output", required=True, type=_model_path, help="The file to write, e.g. trained.onnx.")
@click.option("--no-validate", is_flag=True, help="Do not compare ONNX Runtime with a framework before publishing.")
@_json_option
@_guarded
def absorb(model: Path, weights: Path, output: Path, no_validate: bool, as_json: bool) -> None:
    """Write MODEL anew with trained WEIGHTS.

    WEIGHTS is a state_dict in safetensors (sharded ones with their index too), an .npz file, a folder of
    torch.distributed.checkpoint or of Orbax, or a Hugging Face folder that handoff wrote.
    """
    from hyperclone_onnx.frameworks.absorb import absorb as run

    result = run(model, weights, output, check=not no_validate)
    with _printing():
        if as_json:
            _print_json(asdict(result))
        else:
            by = f", as {result.validated_by} computes it" if result.validated_by else ""
            cast = "".join(f", {count} cast {kind}" for kind, count in result.casts.items())
            click.echo(f"{output}: {len(result.replaced)} tensors replaced, {len(result.kept)} kept{cast}{by}")


@main.command()
@click.argument("model", type=_model_path)
@click.option("--source", type=_model_path, help="The small model's file: ranks are then compared with its own.")
@click.option("--plan", type=_model_path, help="What expand --plan-out wrote, where MODEL carries no plan any more.")
@click.option("--inputs", type=_model_path, help="An .npz file of MODEL's inputs by name, in the place of random ones.")
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Of random inputs.")
@click.option(
    "--length", type=click.IntRange(min=1), default=32, show_default=True, help="Of random inputs, in tokens."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the inputs.")
@click.option("--no-activations", is_flag=True, help="Do not run MODEL: judge by its weights alone.")
@click.option("--no-ranks", is_flag=True, help="Leave out effective ranks, which take most of the time.")
@_device_option
@click.option("--plot", type=_model_path, metavar="FILE.png", help="Draw a picture (needs the extra plot).")
@click.option("--json-out", type=_model_path, metavar="FILE.json", help="Also write the result as JSON.")
@_json_option
@_guarded
@click.pass_context
def diagnose(
    context: click.Context,
    model: Path,
    source: Path | None,
    plan: Path | None,
    inputs: Path | None,
    batch: int,
    length: int,
    seed: int,
    no_activations: bool,
    no_ranks: bool,
    device: Any,
    plot: Path | None,
    json_out: Path | None,
    as_json: bool,
) -> None:
    """Tell how far the clones of MODEL, grown and perhaps trained since, have parted, layer by layer.

    Stuck or not, the exit code is 0: it is a diagnosis.
    """
    from hyperclone_onnx.diagnosis import diagnose as run
    from hyperclone_onnx.diagnosis.plot import require_matplotlib, save_plot
    from hyperclone_onnx.diagnosis.report import print_diagnosis
    from hyperclone_onnx.publishing.publication import check_output, write_text

    asked = any(context.get_parameter_source(each) == ParameterSource.COMMANDLINE for each in ("batch", "length"))
    read = [each.resolve() for each in (model, source, plan, inputs) if each is not None]
    for path in (plot, json_out):
        if path is not None:
            check_output(path, [*read, *(each for each in (plot, json_out) if each not in (None, path))])
    if plot is not None:
        require_matplotlib()
    with _progress() as (notify, _):
        found = run(
            model,
            source,
            not no_activations,
            plan=plan,
            inputs=inputs,
            lengths=(batch, length) if asked else None,
            seed=seed,
            ranks=not no_ranks,
            device=device,
            notify=notify,
        )
    if json_out is not None:
        write_text(json_out, json.dumps(found.to_json(), indent=1) + "\n")
    if plot is not None:
        save_plot(found, plot)
    with _printing():
        _print_json(found.to_json()) if as_json else print_diagnosis(_console(), found)
