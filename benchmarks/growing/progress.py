"""Shows how far the runs of a study are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for each stage. Without a terminal, a stage prints one line when it begins."""
    console = Console(stderr=True)
    counted = TextColumn("{task.completed:.0f} of {task.total:.0f} steps")
    columns = (TextColumn("{task.description:32}"), BarColumn(), counted, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        tasks: dict[str, TaskID] = {}

        def show(done: int, total: int, stage: str) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(f"{stage}: {total - done} of {total} steps to do")
            shown.update(tasks[stage], completed=done, total=total)

        yield show
