"""A command whose help shows its options in sections, and a group whose help lists its commands in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click


class InOrder(click.Group):
    """A group of commands whose help lists them in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands."""
        return list(self.commands)


class Sectioned(click.Command):
    """A command with many options, which its help shows in sections.

    Args:
        sections: the options of each section, by its title. The options that no section has come last.

    Raises:
        ValueError: a section names an option that the command does not have.
    """

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections = sections
        own = {name for option in self.params for name in option.opts}
        unknown = [name for names in sections.values() for name in names if name not in own]
        if unknown:
            raise ValueError(f"the command has no option {unknown[0]}")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, each with its title."""
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        left = [(option, record) for option in options if (record := option.get_help_record(ctx)) is not None]
        for title, names in self.sections.items():
            chosen = [(option, record) for option, record in left if not set(names).isdisjoint(option.opts)]
            left = [pair for pair in left if pair not in chosen]
            _write(formatter, title, [record for _, record in chosen])
        _write(formatter, "Other options", [record for _, record in left])


def _write(formatter: click.HelpFormatter, title: str, records: Sequence[tuple[str, str]]) -> None:
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
