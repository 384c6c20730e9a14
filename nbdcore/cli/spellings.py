"""Options with more names than their help shows: libnbd's tools understand several spellings of a word, and scripts use them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import click

__all__ = ["SpelledOption", "shown_names", "shown_names_suggested"]


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

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return what a message about wrong usage calls it."""
        shown = copy(self)
        shown.opts, _ = shown_names(self)
        return click.Option.get_error_hint(shown, ctx)


def shown_names(option: click.Option) -> tuple[list[str], list[str]]:
    """Return the names of any option that help shows, and those of its opposite."""
    more = option.spellings if isinstance(option, SpelledOption) else frozenset[str]()
    return [name for name in option.opts if name not in more], [name for name in option.secondary_opts if name not in more]


@contextlib.contextmanager
def shown_names_suggested() -> Iterator[None]:
    """Where there is no such option: have the message suggest names that help shows, and no others."""
    try:
        yield
    except click.NoSuchOption as error:
        if error.ctx is not None and error.possibilities:
            error.possibilities = _resembling(error.option_name, error.ctx)  # type: ignore[misc] # or it would be another error
        raise


def _resembling(word: str, ctx: click.Context) -> list[str]:
    from difflib import get_close_matches

    options = [option for option in ctx.command.get_params(ctx) if isinstance(option, click.Option) and not option.hidden]
    return get_close_matches(word, [name for option in options for names in shown_names(option) for name in names])
