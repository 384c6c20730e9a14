"""`nbdcore completion`: has a shell complete the words of this program's command lines.

The script that a shell reads is click's: at each Tab it runs the program with a variable that asks for the words that fit. What
the answer lacks is put right here: what is between brackets is another program's, further spellings of an option are not
offered, and where there is nothing else to offer, the names of files are.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class, get_completion_class

from nbdcore.cli.access import bracketed
from nbdcore.cli.output import say
from nbdcore.cli.spellings import SpelledOption

__all__ = ["completion", "register"]

# The variable by which click's scripts ask.
_VARIABLE = "_NBDCORE_COMPLETE"
_SHELLS = ("bash", "zsh", "fish")
# Servers that can be started between brackets, offered where they are installed.
_SERVERS = ("nbdkit", "qemu-nbd")


@click.command(short_help="Have a shell complete commands and options.")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, *, shell: str) -> None:
    """Print a script that has a shell complete the commands and options of this program, and the names of files.

    Put it where the shell looks for such scripts; it is read when the shell is started. For zsh, that is any folder of its fpath.

    \b
    nbdcore completion bash > ~/.local/share/bash-completion/completions/nbdcore
    nbdcore completion zsh > ~/.zfunc/_nbdcore
    nbdcore completion fish > ~/.config/fish/completions/nbdcore.fish
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    kind = get_completion_class(shell)
    assert kind is not None, "click knows the shells that can be chosen"
    say(kind(ctx.find_root().command, {}, "nbdcore", _VARIABLE).source().strip("\n"))


def register() -> None:
    """Have click answer shells as described above."""
    for shell in _SHELLS:
        kind: Any = get_completion_class(shell)
        add_completion_class(type(f"{kind.__name__}Here", (_Completing, kind), {}), shell)


class _Completing(ShellComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """Return what fits in place of the word that is incomplete."""
        try:
            words = bracketed(args)
        except click.UsageError:  # a bracket that is not closed yet
            return _between_brackets(args, incomplete)
        command = self._command(words)
        found = super().get_completions(words, incomplete)
        if command is None:
            return found
        unshown = {name for option in command.params if isinstance(option, SpelledOption) for name in option.spellings}
        found = [item for item in found if item.value not in unshown]
        return found if found or incomplete.startswith("-") else [_files(incomplete)]

    def _command(self, words: Sequence[str]) -> click.Command | None:
        """Return the command that is named already."""
        name = next((word for word in words if not word.startswith("-")), "")
        return self.cli.get_command(click.Context(self.cli), name) if isinstance(self.cli, click.Group) else None


def _between_brackets(args: Sequence[str], incomplete: str) -> list[CompletionItem]:
    servers = [name for name in _SERVERS if args[-1] == "[" and name.startswith(incomplete) and shutil.which(name)]
    return [CompletionItem(name) for name in servers] or [_files(incomplete)]


def _files(incomplete: str) -> CompletionItem:
    return CompletionItem(incomplete, type="file")
