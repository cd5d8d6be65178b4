"""The command line: ``hyperclone-onnx COMMAND``, with one module of this package for each command.

Exit codes: 0 done and valid; 1 the models differ; 2 bad usage; 3 refused; 4 bad or unreadable input. Results go to
stdout (JSON with --json), progress and errors to stderr. No traceback is shown to a user.
"""

from __future__ import annotations

import gc
from importlib import import_module

import click

from hyperclone_onnx.commands.sections import InOrder

COMMANDS = ("inspect", "expand", "shrink", "validate", "export", "handoff", "absorb", "diagnose", "forecast")
"""For each command, a module of this name in this package holds a function of this name."""


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hyperclone-onnx")
def main() -> None:
    """Grow a pretrained ONNX transformer without changing what it computes.

    The grown model is wider or deeper than its source, and equal to it: train on from there (HyperCloning,
    arXiv 2409.12903).
    """
    # A graph of 20,000 nodes is a million objects that all stay. With Python's own thresholds a third of the time goes
    # into searching them for garbage.
    gc.set_threshold(100_000, 50, 1000)


for _name in COMMANDS:
    main.add_command(getattr(import_module(f"hyperclone_onnx.commands.{_name}"), _name))
