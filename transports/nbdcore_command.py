"""The command transport: a server that this program runs itself, and talks to as long as it lives.

A server of one client talks on its standard input and output (`nbdkit -s`, an ssh of your own); one that listens is handed a
listening socket, by systemd's socket activation. Which program runs is for the caller alone to say, so there are no URIs. The
program is started from a list of arguments, and ends when its connection is closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from nbdcore.errors import UsageError, printable
from nbdcore.plugins.spec import Connecting, Transport, hookimpl
from nbdcore.uri import URI

#: The longest name of a socket that systemd takes (sd_pid_notify_with_fds(3), FDNAME=).
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class CommandAddress:
    """Which server to run.

    Attributes:
        argv: the program and its arguments, as it gets them: no shell reads them.
        activation: the name of the listening socket that it takes over; None: it talks on its standard input and output.
    """

    argv: tuple[str, ...]
    activation: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "argv", _arguments(self.argv))
        if self.activation is not None:
            _check_name(self.activation)

    def __str__(self) -> str:
        return f"the command {printable(self.argv[0])}"

    def uri(self, export: str = "") -> NoReturn:  # noqa: ARG002 (it has none, whatever the export)
        """Raise UsageError: a URI must not name a program to run."""
        raise UsageError(errno.EINVAL, f"{self} has no URI: a URI that runs a program would be anybody's to abuse")


class CommandTransport(Transport):
    """NBD with a child process."""

    name: ClassVar[str] = "command"
    schemes: ClassVar[tuple[str, ...]] = ()
    runs_programs: ClassVar[bool] = True
    starts_servers: ClassVar[bool] = True

    def address(self, **parts: Any) -> CommandAddress:
        """Return the address of `argv` (the program and its arguments) and, for a server that listens, `activation`."""
        try:
            return CommandAddress(**parts)
        except TypeError as exc:
            raise UsageError(
                errno.EINVAL,
                "a command needs argv (the program and its arguments), and may have activation; "
                f"given: {', '.join(parts) or 'nothing'}",
            ) from exc

    def parse(self, uri: URI) -> CommandAddress:
        """Raise UsageError: there are no such URIs."""
        raise UsageError(errno.EINVAL, f"{uri.scheme} URIs name no command")

    def connect(self, address: CommandAddress, *, timeout: float | None = None) -> Connecting:  # noqa: ARG002 (starting takes no time)
        """Start the program, and connect to it."""
        from nbdcore.streams.process import run_activated, run_command  # plugins are loaded where no program is started

        if address.activation is not None:
            return (yield from run_activated(address.argv, name=address.activation))
        return run_command(address.argv)


def _arguments(argv: object) -> tuple[str, ...]:
    """Return a command line as text, with paths among it written out."""
    if isinstance(argv, str | bytes) or not isinstance(argv, Iterable):
        raise UsageError(errno.EINVAL, f"a command is a list of a program and its arguments, not {argv!r:.60}")
    arguments = tuple(os.fspath(part) if isinstance(part, os.PathLike) else part for part in argv)
    if not arguments or not arguments[0]:
        raise UsageError(errno.EINVAL, "a command begins with a program, and there is none")
    for part in arguments:
        if not isinstance(part, str) or "\0" in part:
            raise UsageError(errno.EINVAL, f"each part of a command is a string without NUL, not {part!r:.60}")
    return arguments


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise UsageError(errno.EINVAL, f"the name of an activated socket is a string, not {name!r:.60}")
    # They come as one list, with ":" between them.
    if not name or not name.isascii() or not name.isprintable() or ":" in name or len(name) > _LONGEST_NAME:
        raise UsageError(
            errno.EINVAL,
            f"the name of an activated socket is 1 to {_LONGEST_NAME} ASCII characters without ':', not {printable(name)!r}",
        )


@hookimpl
def nbdcore_transports() -> Iterable[Transport]:
    """Return the one transport of this plugin."""
    return (CommandTransport(),)
