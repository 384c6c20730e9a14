"""A child process as a stream: a server that talks on its standard input and output, or one that takes a listening socket over.

Programs are started from a list of arguments, never through a shell that would read them, with no descriptor of ours but their
own. What they write to standard error goes where this program's goes, and its end is kept: it says best why a server died. A few
words of a server that has said nothing yet are held back: if it dies, they are in the error, and not said twice. A child is
reaped when its stream is closed, by a thread, so that closing does not wait for a program that takes its time. Streams still open
when this program exits are closed, and their children waited for, while there are still threads to do it.

A fork copies a stream. Closing the copy frees its descriptors and does nothing else: the program and its folder are the parent's.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import IO

from nbdcore.errors import Disconnected, TransportError, UsageError, printable
from nbdcore.processes import how_it_ended
from nbdcore.streams.base import Opening
from nbdcore.streams.connecting import connect_socket
from nbdcore.streams.sockets import SocketStream, transport_errors

__all__ = ["Child", "ProcessStream", "run_activated", "run_command"]

#: Bytes of standard error that are kept: a screenful, as the last words of a program are.
_LAST_WORDS = 4096
#: Bytes of standard error that an error shows in full, in its one line.
_FEW_WORDS = 500
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
        # What was not passed on yet, so little that an error shows it in full; None: all is, at once.
        self._held: bytes | None = b""
        self._passing = threading.Lock()
        # Held while the process is looked at, and reaped, and while it is signalled: a number is another's once it is reaped.
        self._looking = threading.Lock()
        self._listener = _thread(self._listen, process.stderr)
        self._reaper: threading.Thread | None = None

    def _listen(self, pipe: IO[bytes]) -> None:
        """Pass standard error on, and keep its end."""
        with pipe:
            while words := os.read(pipe.fileno(), _LAST_WORDS):
                self._tail = (self._tail + words)[-_LAST_WORDS:]
                with self._passing:
                    if self._held is None:
                        _write(words)
                    else:
                        self._held += words
                if len(self._held or b"") > _FEW_WORDS:
                    self.pass_on()

    def pass_on(self) -> None:
        """Pass what was held back on, and from here on everything at once: the server works, or nobody will say why not."""
        with self._passing:
            held, self._held = self._held, None
            if held:
                _write(held)

    def failure(self, number: int = 0) -> Disconnected | None:
        """Return why the process failed, None where it is still running, or ended well. Waits a moment for what is on its way.

        `number` is the errno of what showed that it did. There is one for a server that leaves its client behind: then it failed,
        whatever its exit status.
        """
        status = self._wait(_LAST_MOMENT)
        if status is None or not (status or number):
            return None
        self._listener.join(_LAST_MOMENT)
        with self._passing:
            self._held = None  # which the error says
        last_words = self._tail.decode("utf-8", "surrogateescape").strip()
        return Disconnected(number, f"the command {_shown(self.process.args)} {how_it_ended(status)}", server_text=last_words)

    def signal(self, number: int) -> None:
        """Send the process a signal; one that has ended gets none. Raises OSError where that is not allowed."""
        with self._looking:
            self.process.send_signal(number)

    def end(self) -> None:
        """Have the process end, and reap it, without waiting for it. Its stream is closed already. Never raises."""
        self.pass_on()
        if self._ended_by is not None:
            self._hint(self._ended_by)
        if self._reaper is None:
            # A program that is ending may start no threads (CPython 3.12): `join` does it then, or the system.
            with contextlib.suppress(RuntimeError):
                self._reaper = _thread(self._reap)

    def forget(self) -> None:
        """Free the descriptor of the copy that a fork made, and leave the process to the parent. May be called twice."""
        if self.process.stderr is not None:
            self.process.stderr.close()

    def join(self) -> None:
        """Wait until the process has been reaped; `end` was called before."""
        if sys.is_finalizing():
            # No other thread runs any more: the reaper neither.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
        elif self._reaper is not None:
            self._reaper.join()
        else:
            self._reap()

    def _reap(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._wait(_PATIENCE) is not None:
                break
            self._hint(number)
        while self._wait(_PATIENCE) is None:  # a process that was killed ends some time, if the kernel lets it
            continue
        self._listener.join(_LAST_MOMENT)

    def _wait(self, seconds: float) -> int | None:
        """Return the exit status, and reap the process; None where it still runs after `seconds`."""
        until = time.monotonic() + seconds
        pause = 0.001
        while True:
            with self._looking:
                status = self.process.poll()
            left = until - time.monotonic()
            if status is not None or left <= 0:
                return status
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.05)  # soon seen, and little work while it takes long

    def _hint(self, number: int) -> None:
        with contextlib.suppress(PermissionError):  # it has become another user's, and ends when it will
            self.signal(number)


class ProcessStream(SocketStream):
    """A socket whose other end a child process has.

    Attributes:
        child: the process.
        path: of the unix socket that it took over; None where it talks on its standard input and output.
        explains_end: tells whether the end of a process that failed is an error now, which says how, or the stream's bare end.
    """

    def __init__(
        self, sock: socket.socket, child: Child, *, path: str | None = None, tidy: Callable[[], None] | None = None
    ) -> None:
        super().__init__(sock, peer=f"the command {_shown(child.process.args)}")
        self._can_fill = self._can_wait and type(self) is ProcessStream  # its `recv_into` only has more to say of the end
        self.child = child
        self.path = path
        self.explains_end: Callable[[], bool] = lambda: True
        self._tidy = tidy
        self._heard = False
        _open_streams.add(self)

    def recv_into(self, room: memoryview) -> int | None:
        """Receive into `room`. Where the process has failed, raises Disconnected with its last words in place of a bare end."""
        try:
            count = super().recv_into(room)
        except Disconnected as exc:
            self._explain(exc)
            raise
        if count == 0 and self.explains_end() and (failure := self.child.failure()) is not None:
            raise failure
        if count and not self._heard:
            self._heard = True
            self.child.pass_on()
        return count

    def send(self, parts: Sequence[memoryview]) -> int | None:
        """Send from the front of `parts`. Raises Disconnected as `recv_into` does."""
        try:
            return super().send(parts)
        except Disconnected as exc:
            self._explain(exc)
            raise

    def _explain(self, exc: Disconnected) -> None:
        """Raise what the process has to say of a connection that broke; one that this program closed needs no words."""
        if exc.errno != errno.ENOTCONN and (failure := self.child.failure(exc.errno or 0)) is not None:
            raise failure from exc

    def close(self) -> None:
        """Close the socket, and have the process end."""
        if self._process != os.getpid():
            super().close()
            self.child.forget()
            return
        if self not in _open_streams:
            return
        _open_streams.discard(self)
        super().close()
        self.child.end()
        if self._tidy is not None:
            self._tidy()


_open_streams: weakref.WeakSet[ProcessStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the children of this program, which exits. A thread started any later would never run, nor what waits for it end."""
    streams = list(_open_streams)
    for stream in streams:
        stream.close()
    for stream in streams:
        stream.child.join()


if hasattr(os, "register_at_fork"):
    # The streams that a fork inherits, and their children, are its parent's.
    os.register_at_fork(after_in_child=_open_streams.clear)


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


def run_activated(arguments: Sequence[str], *, name: str = "unknown") -> Opening[ProcessStream]:
    """Start a server that takes over a listening unix socket by systemd's socket activation, and connect to it.

    `name` is what the server is told that the socket is for. Raises TransportError where the server cannot be started.
    """
    _check(arguments)
    if not hasattr(socket, "AF_UNIX"):
        raise TransportError(errno.ENOTSUP, "socket activation needs unix sockets, and this platform has none")
    with transport_errors("make a folder for a socket"):
        folder = tempfile.mkdtemp(prefix="nbdcore")  # only this user may enter it
    child, parent = None, os.getpid()
    try:
        path = os.path.join(folder, "socket")  # noqa: PTH118 (as a socket takes it)
        with transport_errors(f"listen on {path}"), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            environment = {key: value for key, value in os.environ.items() if not key.startswith("LISTEN_")}
            environment |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": name}
            line = ("/bin/sh", "-c", _ACTIVATE, "activate", *arguments)
            child = _start(line, listener, activated=environment)
        try:
            with transport_errors(f"connect to the command {_shown(arguments)}"):
                sock = socket.socket(socket.AF_UNIX)
            yield from connect_socket(sock, path, f"the command {_shown(arguments)}")
        except TransportError as exc:
            if (failure := child.failure(exc.errno or 0)) is not None:
                raise failure from exc
            raise
        return ProcessStream(sock, child, path=path, tidy=lambda: _remove(folder))
    except BaseException:
        own = parent == os.getpid()  # else a fork's child drops its copy of this generator
        if child is not None:
            (child.end if own else child.forget)()
        if own:
            _remove(folder)
        raise


def _remove(folder: str) -> None:
    """Remove a folder with a socket in it. It takes no descriptor, of which there may be no more."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, "socket"))  # noqa: PTH108, PTH118 (as the path was made)
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106 (likewise)


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
    sock.setblocking(True)  # as programs expect their input; where this one has a default timeout for sockets, it is not
    with transport_errors(what):
        process = subprocess.Popen(  # noqa: S603 (the program is the caller's own choice)
            list(arguments),
            stdin=sock.fileno(),
            stdout=None if activated is not None else sock.fileno(),
            stderr=subprocess.PIPE,
            bufsize=0,  # no buffer has a lock, which a fork could copy while it is taken
            env=activated,
        )
    try:
        return Child(process, ended_by=signal.SIGTERM if activated is not None else None)
    except BaseException as exc:
        # No more threads, or Ctrl-C. It has hardly begun, and nobody else will look after it.
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        if isinstance(exc, RuntimeError):
            raise TransportError(errno.EAGAIN, f"cannot {what}: {exc}") from exc
        raise


def _write(words: bytes) -> None:
    """Write to standard error, if there is one."""
    if sys.stderr is not None and words:
        # A program may have closed its own standard error, or replaced it by anything.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(words.decode("utf-8", "backslashreplace"))


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
