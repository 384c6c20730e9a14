"""The manual pages, made from what the commands say with --help: `python -m nbdcore.cli.manual man` writes them into man/.

They are kept with the sources, and a test holds them against the commands: what builds the package needs none of what the
commands import, and ships them as they are. One page is the program's, nbdcore.1, and one each command's, nbdcore-info.1.

A page is roff: a line that begins with a dot is a request. Text must not be taken for one, and a hyphen that is typed must stay
one that can be copied.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from nbdcore.cli import originals
from nbdcore.cli.app import program
from nbdcore.cli.spellings import SpelledOption, shown_names

__all__ = ["pages", "write"]

# Of every command that does not say something else, in a paragraph of its help that begins like this.
_OWN_STATUS = "The exit status is"
_INTERRUPTED = ("130", "Ctrl-C ended it.")
_READER_GONE = ("141", 'Whoever read its output went away, as "head -1" behind a pipe does.')
# Characters of a line of text, before what roff needs: so that a change is seen in few lines.
_WIDTH = 79


def pages() -> dict[str, str]:
    """Return the pages: the name of each file, and its text."""
    outer = click.Context(program, info_name="nbdcore", **program.context_settings)
    commands = {f"nbdcore-{name}": program.get_command(outer, name) for name in program.list_commands(outer)}
    found = {"nbdcore.1": _page("nbdcore", program, outer, commands)}
    for name, command in commands.items():
        assert command is not None, f"{name} is listed"
        inner = click.Context(command, info_name=command.name, parent=outer)
        found[f"{name}.1"] = _page(name, command, inner, {"nbdcore": program, **commands})
    return found


def write(folder: Path) -> None:
    """Write the pages into a folder, and take away those of commands that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("nbdcore*.1"):
        old.unlink()
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def _page(name: str, command: click.Command, ctx: click.Context, others: dict[str, click.Command | None]) -> str:
    paragraphs, examples = _parts(command)
    own_status = [text for text in paragraphs if text.startswith(_OWN_STATUS)]
    brief = (command.short_help or "").rstrip(".")
    lines = [f'.TH {_literal(name.upper())} 1 "" nbdcore "User commands"']
    lines += [".SH NAME", f"{_literal(name)} \\- {_text(brief[:1].lower() + brief[1:])}"]
    lines += [".SH SYNOPSIS", *_synopsis(command, ctx)]
    lines += [".SH DESCRIPTION", *_paragraphs(text for text in paragraphs if text not in own_status)]
    if isinstance(command, click.Group):
        lines += [".SH COMMANDS", *_commands(others)]
    lines += [".SH OPTIONS", *_options(command, ctx)]
    lines += [".SH EXIT STATUS", *_paragraphs(own_status), *_statuses(command, own=bool(own_status))]
    if examples:
        lines += [".SH EXAMPLES", ".nf", *map(_literal, examples), ".fi"]
    return "\n".join([*lines, ".SH SEE ALSO", *_see_also(name, command, others), ""])


def _parts(command: click.Command) -> tuple[list[str], list[str]]:
    """Return what the help says, as paragraphs, and its examples, line for line."""
    paragraphs: list[str] = []
    examples: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        if block.startswith("\b"):
            examples += [line.strip() for line in block.splitlines()[1:]]
        else:
            paragraphs.append(" ".join(block.split()))
    return paragraphs, examples


# ---------------------------------------------------------------------------------------------- sections


def _synopsis(command: click.Command, ctx: click.Context) -> Iterator[str]:
    words = [f"\\fB{_literal(ctx.command_path)}\\fR", "[\\fIOPTIONS\\fR]"]
    if isinstance(command, click.Group):
        words += ["\\fICOMMAND\\fR", "[\\fIARGUMENTS\\fR]"]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            word = f"\\fI{_literal(_value(parameter))}\\fR" + (" ..." if parameter.nargs == -1 else "")
            words.append(word if parameter.required else f"[{word}]")
    yield " ".join(words)


def _commands(commands: dict[str, click.Command | None]) -> Iterator[str]:
    for name, command in commands.items():
        yield from (".TP", f"\\fB{_literal(name)}\\fR(1)", _text(command.short_help or "") if command else "")


def _options(command: click.Command, ctx: click.Context) -> Iterator[str]:
    for option in command.get_params(ctx):
        if isinstance(option, click.Option) and not option.hidden:
            names, opposites = shown_names(option)
            value = "" if option.is_flag or option.count else f" \\fI{_literal(_value(option))}\\fR".replace(" \\fI[=", "\\fI[=")
            yield ".TP"
            yield ", ".join(f"\\fB{_literal(name)}\\fR{value}" for name in [*names, *opposites])
            yield from _sentences(_help_of(option))


def _help_of(option: click.Option) -> str:
    text = (option.help or "").strip()
    if option.show_default and option.default is not None:
        text += f" [default: {option.default}]"
    if isinstance(option, SpelledOption) and option.spellings:
        text += f" Also: {', '.join(sorted(option.spellings))}."
    return text


def _statuses(command: click.Command, *, own: bool) -> Iterator[str]:
    wrong_usage = str(getattr(command, "usage_status", 2))
    failed = "Something failed: one line on standard error says what."
    rows = [("0", "All was done.")]
    if wrong_usage == "1":
        rows += [("1", f"{failed} So it is when the command line is wrong.")]
    else:
        rows += [("1", failed), (wrong_usage, "The command line is wrong.")]
    for status, meaning in [*([] if own else rows), _INTERRUPTED, _READER_GONE]:
        yield from (".TP", f"\\fB{status}\\fR", *_sentences(meaning))


def _see_also(name: str, command: click.Command, others: dict[str, click.Command | None]) -> Iterator[str]:
    original = next((original for original, ours in originals.COMMANDS.items() if ours == command.name), None)
    names = [*(other for other in others if other != name), *([original] if original else [])]
    yield ",\n".join(f"\\fB{_literal(other)}\\fR(1)" for other in names)


def _value(parameter: click.Parameter) -> str:
    """Return the word that stands for a parameter's value."""
    if parameter.metavar:
        return parameter.metavar
    if isinstance(parameter.type, click.Choice):
        return "|".join(map(str, parameter.type.choices))
    return (parameter.name or "" if isinstance(parameter, click.Argument) else parameter.type.name).upper()


# ---------------------------------------------------------------------------------------------- roff


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield ".PP"
        yield from _sentences(text)


def _sentences(text: str) -> Iterator[str]:
    """Yield a text in lines, with a new one for each sentence, by which the space between them is known."""
    for sentence in re.split(r'(?<=[.:\]]) (?=[A-Z"\[])', text):
        yield from map(_text, textwrap.wrap(sentence, _WIDTH, break_long_words=False, break_on_hyphens=False))


def _text(text: str) -> str:
    """Return a line of text: options in it can be copied, and no request is made of it."""
    return _guarded(re.sub(r"(?<![\w-])--?\w[\w-]*", lambda option: option[0].replace("-", "\\-"), text.replace("\\", "\\e")))


def _literal(text: str) -> str:
    """Return a line of what is typed as it stands."""
    return _guarded(re.sub(r"['^`~-]", lambda char: _TYPED[char[0]], text.replace("\\", "\\e")))


# Characters that a typesetter would make prettier.
_TYPED = {"'": "\\(aq", "^": "\\(ha", "`": "\\(ga", "~": "\\(ti", "-": "\\-"}


def _guarded(line: str) -> str:
    return f"\\&{line}" if line.startswith((".", "'")) else line


if __name__ == "__main__":
    write(Path(sys.argv[1]))
