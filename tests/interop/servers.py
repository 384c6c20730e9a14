"""Real NBD servers for a test: nbdkit, qemu-nbd and nbd-server, each a context manager that yields a running Server.

    with nbdkit("memory", "1M", "rdelay=1", filters=["delay"]) as server, nbdcore.connect(server.uri) as disk:
        ...

Nothing is slept for, and no port is guessed: nbdkit and qemu-nbd get a listening socket from us by systemd's socket activation
(descriptor 3, LISTEN_FDS and LISTEN_PID), on a port or path that is ours before they start. nbd-server knows no such thing: it
gets a unix socket, or a port that was free a moment before. A server is ready when it has sent its greeting. It dies with the
context, and with this process. What it wrote to its standard error (nbd-server: before it became a daemon) is in
`Server.messages()`, and is added to the exception that ends the context.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests.interop.programs import command, path_of

#: How long a server may take to send its greeting, and to end, in seconds. Generous: the machine may be busy.
DEADLINE = 20

# Moves our listening socket from standard input to descriptor 3, where socket activation has it, and names the process it is for.
ACTIVATE = ("sh", "-c", 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&0 </dev/null', "activate")

# nbd-server is always a daemon: its keeper makes a foreground process of it, and has signals of its own.
FOREGROUND = Path(__file__).with_name("foreground.py")

GREETING_MAGIC = b"NBDMAGIC"
FIXED_NEWSTYLE = b"IHAVEOPT"


@dataclass
class Server:
    """A running server: where it is, and how to end it before its context does."""

    process: subprocess.Popen
    folder: Path
    scheme: str = "nbd"
    path: Path | None = None
    port: int | None = None
    export: str = ""
    kill_signal: signal.Signals = signal.SIGKILL
    stderr: Path = field(init=False)

    def __post_init__(self) -> None:
        self.stderr = self.folder / "stderr"

    @property
    def uri(self) -> str:
        """The URI of the server's own export."""
        return self.uri_of(self.export)

    def uri_of(self, export: str) -> str:
        """Return the URI of another of the server's exports."""
        name = quote(export, safe="")
        if self.path is not None:
            return f"{self.scheme}+unix:///{name}?socket={quote(str(self.path), safe='/')}"
        return f"{self.scheme}://127.0.0.1:{self.port}/{name}"

    def connect(self) -> socket.socket:
        """Open a plain socket to the server."""
        if self.path is None:
            return socket.create_connection(("127.0.0.1", self.port), DEADLINE)
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(DEADLINE)
            connection.connect(str(self.path))
            undo.pop_all()
            return connection

    def messages(self) -> str:
        """Return what the server wrote to its standard error so far."""
        return self.stderr.read_text(errors="replace")

    def kill(self) -> None:
        """End the server at once, and whatever it started, as a crash would."""
        self._signal(self.kill_signal)
        self.process.wait(DEADLINE)

    def stop(self) -> None:
        """End the server as an administrator would; one that does not heed that is killed."""
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.process.args} did not end within {DEADLINE} s of SIGTERM") from None
        self._signal(signal.SIGKILL)  # the children that a server left behind

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)  # each server leads a process group of its own


@contextlib.contextmanager
def nbdkit(
    *arguments: str | Path,
    filters: Sequence[str] = (),
    tcp: bool = False,
    tls: str = "off",
    export: str = "",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run nbdkit with a plugin and its arguments, in the order of its own command line.

    `tls` is nbdkit's own option: off, on or require; "require" makes the URI an nbds one. Further options of nbdkit's, such as
    `--tls-psk=FILE` or `--mask-handshake=0`, stand before the plugin's name in `arguments`.
    """
    options = ["--foreground", "--exit-with-parent", f"--tls={tls}", *(f"--filter={name}" for name in filters)]
    scheme = "nbds" if tls == "require" else "nbd"
    line = command("nbdkit", *options, *arguments, launcher=ACTIVATE)
    with _activated(line, tcp=tcp, scheme=scheme, export=export, environment=environment) as server:
        _wait_for_greeting(server)
        yield server


@contextlib.contextmanager
def qemu_nbd(
    image: Path,
    *arguments: str | Path,
    format: str = "raw",  # noqa: A002 (qemu-nbd's own word)
    binary: str = "qemu-nbd",
    tcp: bool = False,
    bitmap: str | None = None,
    export: str = "",
    persistent: bool = True,
    shared: int = 8,
    read_only: bool = False,
) -> Iterator[Server]:
    """Run qemu-nbd on an image; `binary` is "qemu-nbd", the system's, or programs.QEMU_NBD_10.

    Without `persistent` it ends with its first client: so it is not asked for a greeting beforehand, and a failure to start shows
    at the first connection, and in what the exception of the context says.
    """
    options = [f"--format={format}", f"--export-name={export}", f"--shared={shared}"]
    options += [f"--bitmap={bitmap}"] if bitmap is not None else []
    options += ["--persistent"] if persistent else []
    options += ["--read-only"] if read_only else []
    line = command(binary, *options, *arguments, image, launcher=ACTIVATE)
    with _activated(line, tcp=tcp, export=export) as server:
        if persistent:
            _wait_for_greeting(server)
        yield server


@contextlib.contextmanager
def nbd_server(
    exports: Mapping[str, Path],
    *,
    tcp: bool = False,
    options: Mapping[str, str] | None = None,
    general: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run nbd-server with these named exports; `options` go to each export's section, `general` to the generic one.

    nbd-server knows no default export: `Server.uri` is the first one's.
    """
    with _folder() as folder:
        path = None if tcp else folder / "socket"
        port = _free_port() if tcp else None
        where = {"listenaddr": "127.0.0.1", "port": str(port)} if tcp else {"unixsock": str(path)}
        sections = {"generic": {"allowlist": "true", **where, **(general or {})}}
        sections |= {name: {"exportname": str(image), **(options or {})} for name, image in exports.items()}
        configuration = folder / "configuration"
        configuration.write_text("".join(_section(name, values) for name, values in sections.items()))
        line = [
            sys.executable,
            "-I",
            "-S",
            str(FOREGROUND),
            path_of("nbd-server"),
            "-C",
            str(configuration),
            "-p",
            str(folder / "pid"),
        ]
        process = _start(line, folder, stdin=subprocess.DEVNULL)
        address = {"path": path, "port": port, "export": next(iter(exports))}
        with _running(Server(process, folder, kill_signal=signal.SIGUSR1, **address)) as server:
            _wait_for_greeting(server)
            yield server


def _section(name: str, values: Mapping[str, str]) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder with a path so short that a unix socket in it has room in its 108 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="nbd-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _activated(
    arguments: Sequence[str], *, tcp: bool, scheme: str = "nbd", export: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server, its command line launched by ACTIVATE, that takes over a socket on which this process listens already."""
    with _folder() as folder:
        path = None if tcp else folder / "socket"
        with socket.socket(socket.AF_INET if path is None else socket.AF_UNIX) as listener:
            listener.bind(("127.0.0.1", 0) if path is None else str(path))
            listener.listen(64)
            port = listener.getsockname()[1] if path is None else None
            process = _start(arguments, folder, stdin=listener.fileno(), environment=environment)
        with _running(Server(process, folder, scheme=scheme, path=path, port=port, export=export)) as server:
            yield server


def _start(
    arguments: Sequence[str], folder: Path, *, stdin: int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    with (folder / "stderr").open("wb") as messages:
        return subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=messages,
            stderr=messages,
            process_group=0,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
        )


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    """Stop the server at the end, and say with any failure what it had to say."""
    try:
        yield server
    except BaseException as error:
        error.add_note(f"{' '.join(map(str, server.process.args))}\nwrote:\n{server.messages()}")
        raise
    finally:
        server.stop()


def _wait_for_greeting(server: Server) -> None:
    """Connect until the server sends its greeting, then leave it as politely as the greeting allows."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            with server.connect() as connection:
                _greet(connection)
                return
        except OSError as error:
            if server.process.poll() is not None:
                raise AssertionError(f"the server ended with {server.process.returncode} at its start") from error
            if time.monotonic() > end:
                raise AssertionError(f"no greeting from the server within {DEADLINE} s") from error
            time.sleep(0.01)


def _greet(connection: socket.socket) -> None:
    greeting = b""
    while len(greeting) < 18:
        more = connection.recv(18 - len(greeting))
        if not more:
            raise ConnectionResetError("the server closed the connection without a greeting")
        greeting += more
    if greeting[:8] != GREETING_MAGIC:
        raise AssertionError(f"not an NBD server's greeting: {greeting!r}")
    if greeting[8:16] == FIXED_NEWSTYLE and greeting[17] & 1:
        flags = (greeting[17] & 3).to_bytes(4, "big")
        abort = FIXED_NEWSTYLE + (2).to_bytes(4, "big") + bytes(4)
        with contextlib.suppress(ConnectionError):  # nbd-server does not acknowledge, it hangs up
            connection.sendall(flags + abort)
            connection.recv(64)
