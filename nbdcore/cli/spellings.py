"""Options with more names than their help shows: libnbd's tools understand several spellings of a word, and scripts use them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import click

__all__ = ["SpelledOption", "shown_names"]


class SpelledOption(click.Option):
    """An option, for `click.option(..., cls=SpelledOption)`. Help shows a metavar `[=VALUE]` without a space before it.

    Args:
        spellings: further names, which work and are not shown; a pair of opposites as for click, "--colour/--no-colour".
    """

    def __init__(self, param_decls: Sequence[str], *, spellings: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__([*param_decls, *spellings], **attributes)
        self.spellings: frozenset[str] = frozenset(name for words in spellings for name in words.split("/"))

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return what help shows of it."""
        shown = copy(self)
        shown.opts, shown.secondary_opts = shown_names(self)
        record = click.Option.get_help_record(shown, ctx)
        return record and (record[0].replace(" [=", "[="), record[1])


def shown_names(option: click.Option) -> tuple[list[str], list[str]]:
    """Return the names of any option that help shows, and those of its opposite."""
    more = option.spellings if isinstance(option, SpelledOption) else frozenset[str]()
    return [name for name in option.opts if name not in more], [name for name in option.secondary_opts if name not in more]
