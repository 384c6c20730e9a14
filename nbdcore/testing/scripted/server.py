"""The scripted server: connections, one script and one thread for each, and what went wrong in them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from nbdcore.streams.sockets import SocketStream, connected_pair
from nbdcore.testing.scripted.connection import Connection, ScriptFailed, Step

__all__ = ["ScriptedServer"]

Socket = socket.socket  # the server has a method of that name


class ScriptedServer:
    """Plays one script for each connection, in the order in which they come, each in a thread of its own.

    Clients come through `stream` or `socket` (one end of a socket pair), `listen_tcp` or `listen_unix`. Leaving the context waits
    until the scripts are over, and raises ScriptFailed for the first that failed, or that nobody connected to play.

    Args:
        scripts: each a list of steps for one connection.
        patience: seconds that each wait of a step may take.
    """

    def __init__(self, *scripts: Iterable[Step], patience: float = 10.0) -> None:
        self._scripts = [list(script) for script in scripts]
        self._patience = patience
        self._lock = threading.Lock()
        self._played = 0
        self._threads: list[threading.Thread] = []
        self._listeners: list[socket.socket] = []
        self._stopping = False
        self._failures: list[BaseException] = []
        self.connections: list[Connection] = []  #: one a connection, in the order of the scripts; they outlive the context

    def stream(self) -> SocketStream:
        """Return a stream connected to the server, for the next script. It belongs to the caller."""
        return SocketStream(self.socket(), peer="a scripted server")

    def socket(self) -> Socket:
        """Return a socket connected to the server, for the next script. It belongs to the caller."""
        near, far = connected_pair()
        try:
            self._play(far)
        except BaseException:
            near.close()
            raise
        return near

    def listen_tcp(self) -> int:
        """Take clients on a port of 127.0.0.1 that the kernel chooses; returns it."""
        listener = socket.create_server(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        self._listen(listener)
        return port

    def listen_unix(self, path: str | Path) -> None:
        """Take clients on a unix socket at `path`, whose file is the caller's to remove."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(path))
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._listen(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stop_listening()
        if exc is not None:
            for connection in self.connections:
                connection.interrupt()
        for thread in self._threads:
            thread.join()  # each of its waits has a deadline
        if exc is not None:
            for failure in self._failures:
                exc.add_note(f"the scripted server: {failure}")
            return
        if self._failures:
            raise self._failures[0]
        if self._played < len(self._scripts):
            raise ScriptFailed(f"{len(self._scripts) - self._played} of {len(self._scripts)} scripts: nobody connected")

    # ------------------------------------------------------------------------------------------ threads

    def _listen(self, listener: Socket) -> None:
        listener.settimeout(self._patience)
        with self._lock:
            self._listeners.append(listener)
        self._start(lambda: self._accept(listener))

    def _stop_listening(self) -> None:
        self._stopping = True
        for listener in self._listeners:
            # Some systems do not wake accept for a shutdown: a caller does, everywhere.
            with contextlib.suppress(OSError), socket.socket(listener.family) as caller:
                caller.connect(listener.getsockname())

    def _accept(self, listener: Socket) -> None:
        """Take clients as long as there are scripts; then nobody listens any more."""
        with listener:
            while self._played < len(self._scripts):
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    return  # __exit__ says which scripts nobody connected for
                if self._stopping:
                    sock.close()
                    return
                self._play(sock)

    def _play(self, sock: Socket) -> None:
        with self._lock:
            if self._played == len(self._scripts):
                sock.close()
                raise ScriptFailed(f"there are scripts for {self._played} connections, and here is one more")
            steps = self._scripts[self._played]
            self._played += 1
            connection = Connection(sock, self._patience)
            self.connections.append(connection)
        self._start(lambda: self._run(connection, steps))

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="nbdcore-scripted", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, connection: Connection, steps: Sequence[Step]) -> None:
        number = 0
        try:
            for step in steps:
                number += 1
                if isinstance(step, bytes):
                    connection.send(step)
                else:
                    step(connection)
        except BaseException as exc:  # noqa: BLE001 (carried to the thread that runs the test, whatever it is)
            what = str(exc) if isinstance(exc, ScriptFailed) else repr(exc)
            failure = ScriptFailed(f"step {number} of {len(steps)}: {what}")
            failure.__cause__ = exc
            self._failures.append(failure)
        finally:
            connection.close()
