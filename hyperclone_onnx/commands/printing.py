"""Printing: results on stdout as tables or JSON, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from hyperclone_onnx.commands.guard import published
from hyperclone_onnx.errors import CannotWrite, printable
from hyperclone_onnx.progress import Notify, Progress


def console() -> Any:
    """A rich console on stdout for texts that may hold a model's names."""
    from rich.console import Console

    class Printer(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            """Print texts; a name in a text can neither break the line nor steer the terminal."""
            super().print(*(_clean(item) if isinstance(item, str) else item for item in objects), **options)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # A pipe or a file has no width: lines are not broken there.
    return Printer(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def _clean(text: str) -> str:
    """The text with everything unprintable written out, but for our own line breaks at its beginning."""
    breaks = len(text) - len(text.lstrip("\n"))
    return "\n" * breaks + printable(text[breaks:])


def print_json(data: dict[str, Any]) -> None:
    """Print a result as JSON."""
    click.echo(json.dumps(data, indent=2))


@contextmanager
def printing() -> Iterator[None]:
    """Surrounds the printing of a result.

    A reader that has ended (`| head`) changes nothing about how the command ends.

    Raises:
        CannotWrite: stdout cannot be written for another reason, such as a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
    except OSError as problem:
        _discard_stdout()
        why = problem.strerror or problem
        raise CannotWrite(f"{published('but ')}the result cannot be printed ({why})") from problem


def _discard_stdout() -> None:
    """Send the rest of stdout nowhere: Python flushes it once more as it ends, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(stage: str) -> None:
    """Print the name of a stage on stderr."""
    with suppress(OSError):  # nobody reads stderr: go on
        click.echo(f"{printable(stage)} ...", err=True)


def warn(text: str | None) -> None:
    """Print a warning on stderr, if there is one."""
    if text is not None:
        with suppress(OSError):  # nobody reads stderr: go on
            click.echo(f"warning: {printable(text)}", err=True)


@contextmanager
def progress() -> Iterator[tuple[Notify, Progress | None]]:
    """Progress on stderr: a bar where that is a terminal, otherwise a line for each stage.

    While a file is written, the bar counts bytes and says how long it takes yet.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Bytes(DownloadColumn):
        def render(self, task: Any) -> Text:
            """The written bytes and all bytes, in a stage that writes."""
            return Text() if task.total is None else super().render(task)

    class Remaining(TimeRemainingColumn):
        def render(self, task: Any) -> Text:
            """How long it takes yet, where that is known."""
            known = task.total is not None and task.time_remaining is not None
            return Text.assemble(super().render(task), " to go") if known else Text()

    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield say, None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Bytes(),
        Remaining(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=terminal, transient=True) as bars:
        task = bars.add_task("reading", total=None)

        def begin(stage: str) -> None:
            nonlocal task
            bars.remove_task(task)  # rich keeps the total of a task; a stage that does not write has none
            task = bars.add_task(printable(stage), total=None)

        yield begin, lambda done, total: bars.update(task, completed=done, total=total)
