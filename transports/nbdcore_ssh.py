"""The ssh transport: `nbd+ssh://USER@HOST:SSHPORT/EXPORT`, to a server that only another machine reaches.

The program `ssh` logs in to that machine, and runs `nc` there to get to the server's unix socket or TCP port; NBD goes through
their standard input and output. How to log in is ssh's business: its configuration, its keys, its agent.

Hosts, users and sockets come from URIs, and end in command lines: ssh's own here, a shell's on the other machine, and perhaps a
ProxyCommand's between them. So nothing that any of these could take for more than a name is let through, `--` stands before the
host, and the remote command is quoted.
"""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from nbdcore.errors import Error, UsageError, printable
from nbdcore.plugins.spec import Connecting, Transport, hookimpl
from nbdcore.uri import DEFAULT_PORT, URI

_LAST_PORT = 65535
#: Names, IPv4 and IPv6 addresses (with a zone), and aliases of ssh's configuration. Nothing that a shell or getopt reads.
_HOST = r"[A-Za-z0-9_.:][A-Za-z0-9_.:%-]*"
#: What login names are made of in practice, "user@domain" included.
_USER = r"[A-Za-z0-9_.+][A-Za-z0-9_.+@-]*"

#: Lines of ssh, and of the shell on the other machine, that time alone does not change. ssh's exit status is 255 for these as it
#: is for a machine that is still starting; its words are the same in every locale.
_FINAL = r"""
      ^ (?: \S+ :\ )? Permission\ denied\ \(                                      # whom nobody lets in
    | ^ Host\ key\ verification\ failed                                          # another machine, or one not known yet
    | ^ ssh: \ Could\ not\ resolve\ hostname\ .*: (?! \ Temporary\ failure ) .   # a name that is not there
    | \b nc: \ (?: command\ )? not\ found $                                      # nothing there to go on with
    """


@dataclass(frozen=True, slots=True)
class SSHAddress:
    """Where a server is, as seen from another machine.

    Attributes:
        host: the machine to log in to: a name or address, or what ssh's configuration calls it.
        socket: path of the server's unix socket on that machine; None: it is reached by TCP.
        port: the server's TCP port on that machine.
        user: whom to log in as; None: as ssh's configuration says.
        ssh_port: where ssh listens; None: as ssh's configuration says.
        compress: whether ssh compresses what it carries; None: as ssh's configuration says.
    """

    host: str
    socket: str | None = None
    port: int | None = None
    user: str | None = None
    ssh_port: int | None = None
    compress: bool | None = None

    def __post_init__(self) -> None:
        _check_text("host", self.host, _HOST)
        if self.user is not None:
            _check_text("user", self.user, _USER)
        _check_port("TCP port", self.port)
        _check_port("port of ssh", self.ssh_port)
        if self.socket is not None:
            if self.port is not None:
                raise UsageError(errno.EINVAL, "a server listens on a unix socket or on a TCP port: give one of them")
            _check_socket(self.socket)

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line."""
        line = ["ssh", "-T"]  # no terminal, whatever the configuration says
        if self.compress is not None:
            line += ["-C"] if self.compress else ["-o", "Compression=no"]
        if self.ssh_port is not None:
            line += ["-p", str(self.ssh_port)]
        if self.user is not None:
            line += ["-l", self.user]
        remote = ["nc", "-U", self.socket] if self.socket is not None else ["nc", "localhost", str(self.port or DEFAULT_PORT)]
        return (*line, "--", self.host, shlex.join(remote))

    def __str__(self) -> str:
        where = f"port {self.port or DEFAULT_PORT}" if self.socket is None else f"unix socket {printable(self.socket)}"
        return f"{where} of {self.host}, by ssh"

    def uri(self, export: str = "") -> str:
        """Return `nbd+ssh://USER@HOST:SSHPORT/EXPORT`, with `?socket=PATH` or `?nbd-port=PORT` where one is named."""
        port = None if self.port is None else str(self.port)
        compress = None if self.compress is None else str(self.compress).lower()
        query = (("socket", self.socket), ("nbd-port", port), ("compress", compress))
        named = tuple((name, value) for name, value in query if value is not None)
        return str(URI("nbd+ssh", user=self.user, host=self.host, port=self.ssh_port, export=export, query=named))


class SSHTransport(Transport):
    """NBD through ssh."""

    name: ClassVar[str] = "ssh"
    schemes: ClassVar[tuple[str, ...]] = ("nbd+ssh",)
    parameters: ClassVar[tuple[str, ...]] = ("socket", "nbd-port", "compress")
    runs_programs: ClassVar[bool] = True

    def address(self, **parts: Any) -> SSHAddress:
        """Return the address of `host` and, each optional, `socket` or `port`, `user`, `ssh_port` and `compress`."""
        try:
            return SSHAddress(**parts)
        except TypeError as exc:
            raise UsageError(
                errno.EINVAL,
                "an ssh address needs host, and may have socket or port, user, ssh_port and compress; "
                f"given: {', '.join(parts) or 'nothing'}",
            ) from exc

    def parse(self, uri: URI) -> SSHAddress:
        """Return the address that the authority (ssh's own) and the parameters name."""
        if uri.host is None:
            raise UsageError(errno.EINVAL, f"{uri}: name the host to log in to, as in nbd+ssh://HOST/EXPORT")
        port = uri.parameter("nbd-port")
        if port is not None and not (port.isascii() and port.isdecimal() and len(port) <= len(str(_LAST_PORT))):
            raise UsageError(errno.EINVAL, f"nbd-port is a TCP port such as {DEFAULT_PORT}, not {printable(port)!r}")
        return SSHAddress(
            uri.host,
            socket=uri.parameter("socket"),
            port=None if port is None else int(port),
            user=uri.user,
            ssh_port=uri.port,
            compress=_truth(uri.parameter("compress")),
        )

    def connect(self, address: SSHAddress, *, timeout: float | None = None) -> Connecting:  # noqa: ARG002 (starting takes no time)
        """Start ssh. Whether it gets anywhere shows when the server is to greet: what ssh says then is in the error."""
        from nbdcore.streams.process import run_command  # plugins are loaded where no program is started

        yield from ()
        return run_command(address.argv)

    def is_retryable(self, error: Error) -> bool:
        """Tell whether it is worth logging in again: not where nobody lets this user in, or the name or the key is wrong."""
        said = error.server_text.replace("\r", "")  # ssh ends its lines as for a terminal
        return not re.search(_FINAL, said, re.VERBOSE | re.MULTILINE)


def _truth(word: str | None) -> bool | None:
    if word not in {None, "true", "false"}:
        raise UsageError(errno.EINVAL, f"compress is true or false, not {printable(str(word))!r}")
    return None if word is None else word == "true"


def _check_text(what: str, value: object, pattern: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        shown = printable(value) if isinstance(value, str) else value
        raise UsageError(errno.EINVAL, f"{shown!r} is no {what} that ssh may be given: a plain name, without '-' in front")


def _check_port(what: str, port: object) -> None:
    if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= _LAST_PORT):
        raise UsageError(errno.EINVAL, f"a {what} is a number from 1 to {_LAST_PORT}, not {port!r}")


def _check_socket(path: object) -> None:
    if not isinstance(path, str) or not path or path.startswith("-") or not path.isprintable():
        shown = printable(path) if isinstance(path, str) else path
        raise UsageError(errno.EINVAL, f"{shown!r} is no path of a socket on another machine: it would be an argument there")


@hookimpl
def nbdcore_transports() -> Iterable[Transport]:
    """Return the one transport of this plugin."""
    return (SSHTransport(),)
