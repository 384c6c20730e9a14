"""Which disk a command is about, and how to get to it: what all commands that connect to a server have in common.

A disk is said as an NBD URI, or as `[ COMMAND ARGS ... ]`: a server that the command starts for itself, by systemd's socket
activation, and that ends with it. The brackets are words of their own, as libnbd's tools have them. What is between them is the
server's business, so it is taken out before the command's own options are looked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbdcore import TLS, Client, ClientOptions, is_uri
from nbdcore.cli.output import Failure
from nbdcore.clients.connect.options import CONNECTIONS, MOST_CONNECTIONS
from nbdcore.plugins.registry import registry

if TYPE_CHECKING:
    from nbdcore import Pool

__all__ = ["Access", "Bracketed", "DiskCommand", "DiskType", "Place", "bracketed", "connections_option", "with_access"]

#: What a command takes as its function.
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Bracketed(str):
    """The words between brackets, as one word of the command line; shown as they were typed.

    Attributes:
        argv: the server's command line.
    """

    __slots__ = ("argv",)

    argv: tuple[str, ...]

    @classmethod
    def of(cls, argv: Sequence[str]) -> Bracketed:
        """Return it for a server's command line."""
        word = cls(" ".join(["[", *argv, "]"]))
        word.argv = tuple(argv)
        return word


class DiskCommand(click.Command):
    """A command whose arguments may be `[ COMMAND ARGS ... ]`.

    Wrong usage has the exit status that libnbd's tools have, 1, since 2 says something else of a disk.
    """

    #: the exit status of wrong usage
    usage_status = 1

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, with what is between brackets as one argument."""
        with self._usage_errors():
            return super().parse_args(ctx, bracketed(args))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it finds wrong with its usage has the same exit status."""
        with self._usage_errors():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _usage_errors(self) -> Iterator[None]:
        try:
            yield
        except click.UsageError as error:
            error.exit_code = self.usage_status  # type: ignore[misc] # click reads it of the error itself
            raise


def bracketed(words: Sequence[str]) -> list[str]:
    """Return the words with each `[ ... ]` as one. Raises click.UsageError where a bracket is not closed, or nothing is in it."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word != "[":
            found.append(word)
            continue
        if "]" not in rest:
            raise click.UsageError('"[" begins the command line of a server, and no "]" ends it; both are words of their own.')
        end = rest.index("]")
        if not end:
            raise click.UsageError('between "[" and "]" belongs the command line of a server, such as nbdkit memory 1G.')
        found.append(Bracketed.of(rest[:end]))
        del rest[: end + 1]
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a disk is: a URI, or the command line of a server to start."""

    uri: str = ""
    argv: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.uri or Bracketed.of(self.argv)


# Generic for type checkers only.
if TYPE_CHECKING:
    _PlaceType = click.ParamType[Place]
else:
    _PlaceType = click.ParamType


class DiskType(_PlaceType):
    """A disk, as a click argument's type: a `Place`."""

    name = "disk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:  # noqa: ARG002 (click's)
        """Return the place that a word names."""
        if isinstance(value, Place):
            return value
        if isinstance(value, Bracketed):
            return Place(argv=value.argv)
        if not is_uri(value):
            raise Failure(
                f"{value!r} is no disk: write an NBD URI, such as nbd://localhost/ or nbd+unix:///?socket=PATH, or "
                "[ COMMAND ARGS ... ], a server to start"
            )
        return Place(value)


@dataclass(frozen=True, slots=True)
class Access:
    """How the commands get to a disk: what their common options say.

    Attributes:
        timeout: seconds for the connection, and for each answer.
        tls: None where nothing was said of it; then the URI decides.
    """

    timeout: float
    tls: TLS | None

    def options(self, **more: Any) -> ClientOptions:
        """Return a client's options, and `more` of them. Whoever types a URI means what it says, files and programs included."""
        options: ClientOptions = {
            "tls": self.tls,
            "command_timeout": self.timeout,
            "allow_transports": [status.name for status in registry.statuses()],
            "allow_local_files": True,
            "allow_unverified": True,
            "allow_priority": True,
        }
        return {**options, **more}  # type: ignore[typeddict-item] # a wrong name is refused by the client

    def client(self, place: Place, **more: Any) -> Client:
        """Return a client that is connected; in opt mode where `more` says so."""
        client = Client(**self.options(**more))
        if place.uri:
            return client.connect(place.uri, timeout=self.timeout)
        return client.connect_socket_activation(place.argv, timeout=self.timeout)

    def pool(self, place: Place, connections: int, **more: Any) -> Pool:
        """Return a pool of connections to a URI. A server that is started for the command has one connection: `client`."""
        from nbdcore import create_pool

        return create_pool(place.uri, connections=connections, timeout=self.timeout, **self.options(**more))


def connections_option(help_text: str) -> Callable[[_Function], _Function]:
    """Return the option --connections of a command that may open several to a server."""
    return click.option(
        "-C",
        "--connections",
        type=click.IntRange(1, MOST_CONNECTIONS),
        default=CONNECTIONS,
        show_default=True,
        metavar="N",
        help=help_text,
    )


def with_access(function: _Function) -> _Function:
    """Give a command the options --timeout and --tls-..., and its function one argument for them: `access`."""

    @functools.wraps(function)
    def wrapper(
        *arguments: Any,
        timeout: float,
        tls_certificates: str | None,
        tls_psk: str | None,
        tls_hostname: str | None,
        **others: Any,
    ) -> Any:
        encrypted = any(word is not None for word in (tls_certificates, tls_psk, tls_hostname))
        tls = TLS(certificates=tls_certificates, psk_file=tls_psk, hostname=tls_hostname) if encrypted else None
        return function(*arguments, access=Access(timeout, tls), **others)

    decorated: Any = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    typed: _Function = decorated
    return typed


_OPTIONS = (
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for the connection, and for each answer.",
    ),
    click.option(
        "--tls-certificates",
        metavar="DIR",
        help="Encrypt with TLS, and trust the authority (CA) in DIR, which is ca-cert.pem. Where there are client-cert.pem and "
        "client-key.pem too, the server gets to see that certificate.",
    ),
    click.option("--tls-psk", metavar="FILE", help="Encrypt with TLS, by a key that the server has too: lines of USER:HEXKEY."),
    click.option("--tls-hostname", metavar="NAME", help="The name that the server's certificate must be for."),
)
