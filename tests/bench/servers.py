"""The servers that the cases run on, over a unix socket, with data that no compression makes smaller.

It is nbdkit where clients are compared, and ours beside it where servers are. A server is started for a case and ends with it;
cases on the same server that follow each other share it. Its processor time counts for nobody.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import nbdcore
from tests.bench.measured import measuring
from tests.certificates import CertificateAuthority
from tests.interop.programs import DIES_WITH_US, REPOSITORY
from tests.interop.servers import nbdkit

_PIECE = 1 << 20
# Seconds that a server of ours may take to start, and to end.
_START = 30
# A disk that is a Python object: a plugin of nbdkit's, and a program that serves the same with nbdcore.
_PLUGIN, _PROGRAM = (Path(__file__).with_name("measured") / name for name in ("python_object.py", "served_object.py"))

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


@contextlib.contextmanager
def _served(*arguments: str, line: Sequence[str] = (sys.executable, "-m", "nbdcore", "serve")) -> Iterator[str]:
    """Run a server of ours, given where it is to listen as its last arguments."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        path = Path(folder, "socket")
        server = subprocess.Popen(
            [*DIES_WITH_US, *line, *arguments, "--unix", str(path)], cwd=REPOSITORY, stdout=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + _START
            while not path.exists():
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("the server did not start")
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={quote(str(path))}"
        finally:
            server.terminate()
            server.wait(_START)


@contextlib.contextmanager
def _our_memory(*arguments: str) -> Iterator[str]:
    with _served("--memory", str(measuring.AREA), *arguments) as uri:
        _fill(uri)
        yield uri


@contextlib.contextmanager
def _file(size: int = measuring.AREA) -> Iterator[str]:
    """A file in memory, filled: what is measured is the server, not a disk."""
    with tempfile.TemporaryDirectory(prefix="nbd-", dir="/dev/shm") as folder:
        file = Path(folder, "disk")
        with file.open("wb") as out:
            for offset in range(0, size, _PIECE):
                out.write(measuring.contents(offset, _PIECE))
        yield str(file)


@contextlib.contextmanager
def _their_file() -> Iterator[str]:
    with _file() as file, nbdkit("file", file) as server:
        yield server.uri


@contextlib.contextmanager
def _our_file() -> Iterator[str]:
    with _file() as file, _served(file) as uri:
        yield uri


@contextlib.contextmanager
def _their_object() -> Iterator[str]:
    with nbdkit("python", str(_PLUGIN), f"size={measuring.AREA}") as server:
        _fill(server.uri)
        yield server.uri


@contextlib.contextmanager
def _our_object() -> Iterator[str]:
    with _served(str(measuring.AREA), line=(sys.executable, str(_PROGRAM))) as uri:
        _fill(uri)
        yield uri


@contextlib.contextmanager
def _place_for_a_file() -> Iterator[str]:
    """The path of a file that is not there yet, in memory."""
    with tempfile.TemporaryDirectory(prefix="nbd-", dir="/dev/shm") as folder:
        yield str(Path(folder, "copy"))


@contextlib.contextmanager
def _empty(size: int) -> Iterator[str]:
    with nbdkit("memory", str(size)) as server:
        yield server.uri


@contextlib.contextmanager
def _islands(sizes: Sizes) -> Iterator[str]:
    """A disk of 8 TiB with few data, far apart."""
    count, size = 10_000, 8 << 40
    island = sizes.disk // count >> 12 << 12
    with nbdkit("memory", str(size)) as server:
        with nbdcore.connect(server.uri, timeout=30) as disk:
            for number in range(count):
                disk.pwrite(measuring.contents(0, island), number * (size // count) >> 12 << 12)
        yield server.uri


@contextlib.contextmanager
def _both(first: contextlib.AbstractContextManager[str], second: contextlib.AbstractContextManager[str]) -> Iterator[str]:
    """Two ends of a copy."""
    with first as one, second as other:
        yield f"{one} {other}"


SERVERS: Mapping[str, Callable[[Sizes], contextlib.AbstractContextManager[str]]] = {
    "memory": _memory,
    "scratch": _scratch,
    "slow": _slow,
    "encrypted": _encrypted,
    "alternating": _alternating,
    "many clients": _many_clients,
    "nbdkit file": lambda _: _their_file(),
    "nbdkit python": lambda _: _their_object(),
    "nbdcore memory": lambda _: _our_memory(),
    "nbdcore memory, one process": lambda _: _our_memory("--workers", "1"),
    "nbdcore file": lambda _: _our_file(),
    "nbdcore object": lambda _: _our_object(),
    "memory and a file": lambda sizes: _both(_memory(sizes), _place_for_a_file()),
    "small and a file": lambda _: _both(_empty(1 << 20), _place_for_a_file()),
    "two disks": lambda sizes: _both(_memory(sizes), _empty(sizes.disk)),
    "a file and memory": lambda sizes: _both(_file(sizes.disk), _empty(sizes.disk)),
    "islands": lambda sizes: _both(_islands(sizes), _place_for_a_file()),
}


class Running:
    """The servers that run: those of one case at a time."""

    def __init__(self, sizes: Sizes, given: str | None) -> None:
        self._sizes = sizes
        self._given = given
        self._running: dict[str, tuple[str, contextlib.ExitStack]] = {}

    def uris_of(self, names: Collection[str]) -> dict[str, str]:
        """Return the URIs of servers of SERVERS; all others have ended. A given server stands for the plain ones."""
        if self._given is not None:
            return dict.fromkeys(names, self._given)
        for name in self._running.keys() - names:
            self._end(name)
        for name in names:
            if name not in self._running:
                with contextlib.ExitStack() as stack:
                    uri = stack.enter_context(SERVERS[name](self._sizes))
                    self._running[name] = uri, stack.pop_all()
        return {name: self._running[name][0] for name in names}

    def _end(self, name: str) -> None:
        _, stack = self._running.pop(name)
        stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        for name in list(self._running):
            self._end(name)
