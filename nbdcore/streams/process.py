"""A child process as a stream: a server that talks on its standard input and output, or one that takes a listening socket over.

Programs are started from a list of arguments, never through a shell that would read them, with no descriptor of ours but their
own. What they write to standard error goes where this program's goes, and its end is kept: it says best why a server died. A
child is reaped when its stream is closed, by a thread, so that closing does not wait for a program that takes its time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from typing import IO

from nbdcore.errors import Disconnected, TransportError, UsageError, printable
from nbdcore.streams.base import Want
from nbdcore.streams.connecting import connect_socket
from nbdcore.streams.sockets import SocketStream, transport_errors

__all__ = ["Child", "ProcessStream", "run_activated", "run_command"]

#: Bytes of standard error that are kept: a screenful, as the last words of a program are.
_LAST_WORDS = 4096
#: Seconds that the last words and the exit status of a server that hung up may take to arrive: both are on their way then.
_LAST_MOMENT = 0.25
#: Seconds that a child may take to end after its stream is closed, and again after SIGTERM, before the next harder measure.
_PATIENCE = 5.0
# systemd's protocol (sd_listen_fds(3)): the socket is descriptor 3, and the process that it is for must know itself by number,
# which only exists once it runs. The shell gets the program's arguments as its own: it does not read them.
_ACTIVATE = 'LISTEN_PID=$$; export LISTEN_PID; exec "$@" 3<&0 </dev/null'


class Child:
    """A process that serves one stream.

    Attributes:
        process: the process.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, ended_by: signal.Signals | None = None) -> None:
        self.process = process
        self._ended_by = ended_by
        self._tail = bytearray()
        self._listener = _thread(self._listen, process.stderr)
        self._reaper: threading.Thread | None = None

    def _listen(self, pipe: IO[bytes]) -> None:
        """Pass standard error on, and keep its end."""
        with pipe:
            while words := os.read(pipe.fileno(), _LAST_WORDS):
                self._tail = (self._tail + words)[-_LAST_WORDS:]
                if sys.stderr is not None:
                    # A program may have closed its own standard error, or replaced it by anything.
                    with contextlib.suppress(OSError, ValueError):
                        sys.stderr.write(words.decode("utf-8", "backslashreplace"))

    def failure(self) -> Disconnected | None:
        """Return why the process failed, None where it is still running, or ended well. Waits a moment for what is on its way."""
        try:
            status = self.process.wait(_LAST_MOMENT)
        except subprocess.TimeoutExpired:
            return None
        if not status:
            return None
        self._listener.join(_LAST_MOMENT)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return Disconnected(
            0, f"the command {_shown(self.process.args)} {how}", server_text=self._tail.decode("utf-8", "surrogateescape").strip()
        )

    def end(self) -> None:
        """Have the process end, and reap it, without waiting for it. Its stream is closed already."""
        if self._ended_by is not None:
            self.process.send_signal(self._ended_by)
        if self._reaper is None:
            self._reaper = _thread(self._reap)

    def _reap(self) -> None:
        for measure in (self.process.terminate, self.process.kill):
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                measure()
            else:
                break
        self.process.wait()
        self._listener.join(_LAST_MOMENT)

    def join(self) -> None:
        """Wait until the process has been reaped; `end` was called before."""
        if self._reaper is not None:
            self._reaper.join()


class ProcessStream(SocketStream):
    """A socket whose other end a child process has.

    Attributes:
        child: the process.
        path: of the unix socket that it took over; None where it talks on its standard input and output.
    """

    def __init__(
        self, sock: socket.socket, child: Child, *, path: str | None = None, tidy: Callable[[], None] | None = None
    ) -> None:
        super().__init__(sock, peer=f"the command {_shown(child.process.args)}")
        self.child = child
        self.path = path
        self._tidy = tidy

    def recv_into(self, room: memoryview) -> int | None:
        """Receive into `room`. Where the process has failed, raises Disconnected with its last words in place of a bare end."""
        count = super().recv_into(room)
        if count == 0 and (failure := self.child.failure()) is not None:
            raise failure
        return count

    def close(self) -> None:
        """Close the socket, and have the process end."""
        super().close()
        self.child.end()
        if self._tidy is not None:
            self._tidy()


def run_command(arguments: Sequence[str]) -> ProcessStream:
    """Start a server that talks on its standard input and output. Raises TransportError where it cannot be started."""
    _check(arguments)
    near, far = _pair()
    with far:
        try:
            child = _start(arguments, far)
        except BaseException:
            near.close()
            raise
    return ProcessStream(near, child)


def run_activated(arguments: Sequence[str], *, name: str = "unknown") -> Generator[tuple[int, Want], None, ProcessStream]:
    """Start a server that takes over a listening unix socket by systemd's socket activation, and connect to it.

    `name` is what the server is told that the socket is for. Raises TransportError where the server cannot be started.
    """
    _check(arguments)
    if not hasattr(socket, "AF_UNIX"):
        raise TransportError(errno.ENOTSUP, "socket activation needs unix sockets, and this platform has none")
    with transport_errors("make a folder for a socket"):
        folder = tempfile.mkdtemp(prefix="nbdcore")  # only this user may enter it
    child = None
    try:
        path = os.path.join(folder, "socket")  # noqa: PTH118 (as a socket takes it)
        with socket.socket(socket.AF_UNIX) as listener, transport_errors(f"listen on {path}"):
            listener.bind(path)
            listener.listen()
            environment = {key: value for key, value in os.environ.items() if not key.startswith("LISTEN_")}
            environment |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": name}
            line = ("/bin/sh", "-c", _ACTIVATE, "activate", *arguments)
            child = _start(line, listener, activated=environment)
        sock = yield from connect_socket(socket.socket(socket.AF_UNIX), path, f"the command {_shown(arguments)}")
        return ProcessStream(sock, child, path=path, tidy=lambda: shutil.rmtree(folder, ignore_errors=True))
    except BaseException:
        if child is not None:
            child.end()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check(arguments: Sequence[str]) -> None:
    if not arguments:
        raise UsageError(errno.EINVAL, "missing command name in argv list")


def _pair() -> tuple[socket.socket, socket.socket]:
    if not hasattr(socket, "AF_UNIX"):
        raise TransportError(errno.ENOTSUP, "a command needs a socket as standard input, and this platform has none")
    with transport_errors("make a socket for a command"):
        return socket.socketpair()


def _start(arguments: Sequence[str], sock: socket.socket, *, activated: dict[str, str] | None = None) -> Child:
    """Start a program with a socket as its standard input, and as its output too unless it is to be `activated`."""
    what = f"run {_shown(arguments)}"
    with transport_errors(what):
        process = subprocess.Popen(  # noqa: S603 (the program is the caller's own choice)
            list(arguments),
            stdin=sock.fileno(),
            stdout=None if activated is not None else sock.fileno(),
            stderr=subprocess.PIPE,
            env=activated,
        )
    return Child(process, ended_by=signal.SIGTERM if activated is not None else None)


def _thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name="nbdcore-command", daemon=True)
    thread.start()
    return thread


def _shown(arguments: object) -> str:
    """Return a command line for messages: its program, without what the shell is told."""
    line = [str(part) for part in arguments] if isinstance(arguments, list | tuple) else [str(arguments)]
    if line[:3] == ["/bin/sh", "-c", _ACTIVATE]:
        line = line[4:]
    return printable(line[0])
