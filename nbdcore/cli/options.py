"""Options as libnbd's tools have them: with a value that may be left out, and with colours.

A command of a script that was written for those tools must mean the same here. `--map` there takes no value from the next word,
as GNU's getopt has it, while click would take the disk for one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from nbdcore.cli.access import DiskCommand
from nbdcore.cli.spellings import SpelledOption

__all__ = ["GetoptCommand", "in_color", "painted", "with_color"]

# Where a command keeps whether it prints in colour.
_COLORED = f"{__name__}.colored"


class GetoptCommand(DiskCommand):
    """A command with options whose value may be left out: it is written with `=`, and never the next word."""

    def make_parser(self, ctx: click.Context) -> Any:
        """Return click's parser, which finds a value for each such option."""
        parser = super().make_parser(ctx)
        defaults = {
            name: option.flag_value
            for option in self.params
            if isinstance(option, click.Option) and not option.is_flag and isinstance(option.flag_value, str)
            for name in option.opts
        }
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            end = args.index("--") if "--" in args else len(args)
            words = [f"{word}={defaults[word]}" if word in defaults else word for word in args[:end]]
            return parse(words + args[end:])

        parser.parse_args = parse_args  # type: ignore[method-assign] # click offers no other place between brackets and options
        return parser


def _choose(ctx: click.Context, _: click.Parameter, wanted: bool | None) -> None:
    if wanted is None:
        wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    ctx.meta[_COLORED] = wanted
    ctx.color = True  # what is printed has colours where they are wanted, and needs nothing taken out of it


def in_color() -> bool:
    """Tell whether the command prints in colour."""
    return bool(click.get_current_context().meta[_COLORED])


def painted(text: str, **style: Any) -> str:
    """Return a text in a style of click's, where the command prints in colour."""
    return click.style(text, **style) if in_color() else text


def with_color(function: Any) -> Any:
    """Give a command --color and --no-color. What it prints says itself what is coloured: see `painted`."""
    return click.option(
        "--color/--no-color",
        "color",
        cls=SpelledOption,
        spellings=["--colour/--no-colour", "--colors/--no-colors", "--colours/--no-colours"],
        default=None,
        callback=_choose,
        expose_value=False,
        help="Print in colour, or never do. Otherwise it is done on a terminal, unless the environment has NO_COLOR.",
    )(function)
