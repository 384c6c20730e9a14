"""The servers that the cases run on: nbdkit each time, over a unix socket, with data that no compression makes smaller.

A server is started for a case and ends with it; cases on the same server that follow each other share it. It is outside of what
is measured: its processor time counts for nobody.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import nbdcore
from tests.bench.measured import measuring
from tests.certificates import CertificateAuthority
from tests.interop.servers import nbdkit

_PIECE = 1 << 20

#: One extent of the disk that has many of them, in bytes.
EXTENT = 64 << 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large things are, in bytes and in pieces."""

    disk: int
    extents: int
    connections: int


def _fill(uri: str) -> None:
    with nbdcore.connect(uri, allow_local_files=True, timeout=30) as disk:
        for offset in range(0, disk.size, _PIECE):
            disk.pwrite(measuring.contents(offset, _PIECE), offset)


@contextlib.contextmanager
def _memory(sizes: Sizes) -> Iterator[str]:
    with nbdkit("memory", str(sizes.disk)) as server:
        _fill(server.uri)
        yield server.uri


@contextlib.contextmanager
def _scratch(_: Sizes) -> Iterator[str]:
    """For writes: the data that others compare stay as they are."""
    with nbdkit("memory", str(measuring.AREA)) as server:
        _fill(server.uri)
        yield server.uri


@contextlib.contextmanager
def _slow(sizes: Sizes) -> Iterator[str]:
    """Each read takes 10 ms; the writes that fill it do not."""
    with nbdkit("memory", str(sizes.disk), "rdelay=10ms", filters=["delay"]) as server:
        _fill(server.uri)
        yield server.uri


@contextlib.contextmanager
def _encrypted(sizes: Sizes) -> Iterator[str]:
    authority = CertificateAuthority()
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        theirs = authority.write(Path(folder, "server"), server=authority.issue("server", "localhost", "127.0.0.1"))
        ours = authority.write(Path(folder, "client"))
        with nbdkit(f"--tls-certificates={theirs}", "memory", str(sizes.disk), tls="require") as server:
            uri = f"{server.uri}&tls-certificates={quote(str(ours))}"
            _fill(uri)
            yield uri


@contextlib.contextmanager
def _alternating(sizes: Sizes) -> Iterator[str]:
    """A disk of which every other piece is a hole. It has no data: nobody reads it."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        listed = Path(folder, "extents")
        # Holes could be left out, but nbdkit takes minutes to fill in half a million of them.
        kinds = ("", "hole,zero")
        listed.write_text("".join(f"{number * EXTENT} {EXTENT} {kinds[number % 2]}\n" for number in range(sizes.extents)))
        size = str(sizes.extents * EXTENT)
        with nbdkit("--readonly", "memory", size, f"extentlist={listed}", filters=["extentlist"]) as server:
            yield server.uri


@contextlib.contextmanager
def _many_clients(_: Sizes) -> Iterator[str]:
    """One thread a client: a thousand of them have nbdkit start 16,000 otherwise."""
    with nbdkit("--threads=1", "memory", str(measuring.PERIOD)) as server:
        yield server.uri


SERVERS: Mapping[str, Callable[[Sizes], contextlib.AbstractContextManager[str]]] = {
    "memory": _memory,
    "scratch": _scratch,
    "slow": _slow,
    "encrypted": _encrypted,
    "alternating": _alternating,
    "many clients": _many_clients,
}


class Running:
    """The one server that runs at a time."""

    def __init__(self, sizes: Sizes, given: str | None) -> None:
        self._sizes = sizes
        self._given = given
        self._name = ""
        self._uri = ""
        self._stack = contextlib.ExitStack()

    def uri_of(self, name: str) -> str:
        """Return the URI of a server of SERVERS; the one before it has ended. A given server stands for the plain ones."""
        if self._given is not None:
            return self._given
        if name != self._name:
            self._name = ""
            self._stack.close()
            self._uri = self._stack.enter_context(SERVERS[name](self._sizes))
            self._name = name
        return self._uri

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()
