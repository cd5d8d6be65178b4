"""`--html`: checks the file before any work, and writes the page at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hyperclone_onnx.commands.guard import published
from hyperclone_onnx.commands.options import model_path
from hyperclone_onnx.errors import BadRequest, CannotWrite

if TYPE_CHECKING:
    from hyperclone_onnx.reports.html.page import Page

html_option = click.option(
    "--html",
    "page",
    type=model_path,
    metavar="FILE.html",
    help="Also write the report as a page: one file that needs no network.",
)


def check_page(page: Path | None, inputs: Iterable[Path | None], outputs: Iterable[Path | None] = ()) -> None:
    """Refuse a page that cannot be written, or that would overwrite an input or another output.

    Args:
        page: the file of the page; None if none was asked for.
        inputs: files and folders that the command reads; None stands for an option that was left out.
        outputs: other files and folders that the command writes.

    Raises:
        BadRequest, CannotWrite: it is refused.
        BadModel: the page exists already, and an input is not readable, so that nobody knows its data files.
    """
    if page is None:
        return
    from hyperclone_onnx.publishing.journal import data_files
    from hyperclone_onnx.publishing.publication import check_output

    check_output(page, _files(page, inputs))
    for output in outputs:
        if output is None or page.parent.resolve() != output.parent.resolve():
            continue
        if page.name == output.name or data_files(output.name).fullmatch(page.name):
            raise BadRequest(f"{page}: {output} is written there; choose another file for the page")


def _files(page: Path, inputs: Iterable[Path | None]) -> list[Path]:
    """The files of the inputs that the page could overwrite."""
    from hyperclone_onnx.reading import loading

    files: list[Path] = []
    for source in inputs:
        if source is None:
            continue
        resolved = source.resolve()
        files.append(resolved)
        if not page.exists():  # then it can overwrite nothing
            continue
        if resolved.is_dir() and page.resolve().is_relative_to(resolved):
            files.append(page.resolve())
        elif resolved.suffix == ".onnx":
            files += loading.source_files(source, loading.load(source))
    return files


def write_page(path: Path | None, page: Page) -> None:
    """Write a page so that it appears whole or not at all.

    Raises:
        CannotWrite: it cannot be written. The text says if another output is written and complete.
    """
    if path is None:
        return
    from hyperclone_onnx.publishing.publication import write_text
    from hyperclone_onnx.reports.html.page import render

    done = published("but ")
    try:
        write_text(path, render(page))
    except CannotWrite as problem:
        raise CannotWrite(f"{done}{problem}") from problem
