"""Streams and listeners over the operating system's sockets; the one place where an OSError of a socket becomes an error of ours.

It knows sockets of any family, and neither NBD nor any family's addresses: whoever opens a socket says how messages name the
other end. A socket handed over belongs to the stream or listener from then on. No call but `wait`, `fill` and `send_all` waits:
each says so by a flag, or, where the system has none to rely on, the socket is non-blocking. A program that passes a duplicate of
a socket elsewhere must know that the mode is shared by both.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nbdcore.errors import Disconnected, Error, TransportError, UsageError, printable
from nbdcore.streams.base import Address, Listener, Stream, from_signal_handler

__all__ = ["SocketListener", "SocketStream", "connected_pair", "transport_errors"]

#: Buffers in one sendmsg: the smallest IOV_MAX of today's systems (Linux, the BSDs, macOS). More are refused with EMSGSIZE.
_MOST_PARTS = 1024
#: Where every call can be told not to wait, streams' sockets are in blocking mode, so that `wait` can wait in a receive: single
#: reads of 4 KiB took a client of nbdkit 35 us each so, and 50 us with poll (unix socket, the server on another processor). Other
#: systems have the flag and do not always heed it: macOS waits all the same in sending to a unix socket.
_DONT_WAIT = socket.MSG_DONTWAIT if sys.platform == "linux" else 0
#: A peer that hangs up must not kill a program that has SIGPIPE at its default, as command-line tools do.
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_SEND_FLAGS = _NO_SIGNAL | _DONT_WAIT
#: Seconds that a receive waits where a deadline is to be kept. Python begins a receive that a signal interrupts anew, with all of
#: its time: a timer that fires more often than this would put the deadline off for ever. Profilers' timers fire every 10 ms.
_SHORT = 0.005
_TIMEVAL = struct.Struct("@ll")  # struct timeval: seconds and microseconds, and both 0 are for ever
_FOR_EVER, _FOR_SHORT = _TIMEVAL.pack(0, 0), _TIMEVAL.pack(0, round(_SHORT * 1e6))
#: What a receive answers where there is no peeking (vsock under Hyper-V).
_NO_SUCH_WAIT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
_WHOLE = getattr(socket, "MSG_WAITALL", 0)
_HAS_SENDMSG = hasattr(socket.socket, "sendmsg")

#: What accept reports about the one connection that failed before it was taken (accept(2), "Error handling"): the next is fine.
_PASSING = frozenset(
    getattr(errno, name)
    for name in ("ENETDOWN", "EPROTO", "ENOPROTOOPT", "EHOSTDOWN", "ENONET", "EHOSTUNREACH", "EOPNOTSUPP", "ENETUNREACH")
    if hasattr(errno, name)
)

_NO_HINTS: Mapping[int, str] = MappingProxyType({})


@contextlib.contextmanager
def transport_errors(doing: str, hints: Mapping[int, str] = _NO_HINTS) -> Iterator[None]:
    """Turn an OSError of the block into a TransportError "cannot {doing}: ...", with its errno, and itself as the cause.

    `hints` says for an errno what it means here, in place of the system's words. Errors of nbdcore pass unchanged.
    """
    try:
        yield
    except Error:
        raise
    except OSError as exc:
        if from_signal_handler(exc):
            raise
        # A failed name look-up has a number of its own kind.
        number = 0 if isinstance(exc, socket.gaierror) else exc.errno or 0
        raise TransportError(number, f"cannot {doing}: {hints.get(number) or exc.strerror or exc}") from exc


class SocketStream(Stream):
    """A connected stream socket of any family as a Stream.

    Args:
        sock: connected, of type SOCK_STREAM. Closed with the stream, which chooses whether it is in blocking mode.
        peer: how messages name the other end; left out, the socket is asked, which also proves that it is connected.

    Raises UsageError for any other socket, which is left as it was and remains the caller's.
    """

    def __init__(self, sock: socket.socket, *, peer: str | None = None) -> None:
        try:
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            self._peer = _peer_name(sock.getpeername()) if peer is None else peer
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            raise UsageError(exc.errno or 0, f"an open and connected socket is needed, not {sock}: {exc.strerror}") from exc
        if kind != socket.SOCK_STREAM:
            raise UsageError(errno.EPROTOTYPE, f"a stream socket is needed (SOCK_STREAM), not {sock}")
        sock.setblocking(_DONT_WAIT != 0)
        self._sock = sock
        self._first = bytearray(1)
        self._can_wait = _DONT_WAIT != 0
        # Whoever receives in a way of their own must be asked for every byte.
        self._can_fill = self._can_wait and type(self).recv_into is SocketStream.recv_into
        self._can_send_all = self._can_wait and _HAS_SENDMSG and type(self).send is SocketStream.send
        self._limit = _FOR_EVER  # how long a receive waits now
        self._sends_are_limited = False  # those that wait
        self._can_limit = True
        self._failed: OSError | None = None  # what `wait` met, which the system tells once only
        self._send_failed: OSError | None = None  # likewise, what `send_all` met
        self._closed = False
        self._process = os.getpid()

    def __str__(self) -> str:
        return self._peer

    def recv_into(self, room: memoryview) -> int | None:
        """Receive into `room`. Raises Disconnected when the connection broke, or was closed by this program."""
        try:
            if self._failed is not None:
                raise self._failed
            count = self._sock.recv_into(room, 0, _DONT_WAIT)
        except BlockingIOError:
            return None
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            if isinstance(exc, InterruptedError):
                return None
            raise self._broken("receiving", exc) from exc
        if not count and self._closed:
            # What `close` in another thread looks like while it is at work.
            raise self._broken("receiving", None)
        return count

    def wait(self, seconds: float | None = None) -> bool:
        """Wait in a receive that leaves everything where it is: for ever, or, where there is a deadline, a few milliseconds."""
        if not self._can_wait or (seconds is not None and seconds < _SHORT):
            return False
        if not self._limit_receives(_FOR_EVER if seconds is None else _FOR_SHORT):
            return False
        try:
            self._sock.recv_into(self._first, 1, socket.MSG_PEEK)
        except BlockingIOError:
            # Nothing has come. Or the mode, which is shared with a duplicate, was changed by that one's owner.
            return False
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            if exc.errno in _NO_SUCH_WAIT:
                self._can_wait = False
                return False
            self._failed = exc
        return True

    def fill(self, room: memoryview, taken: list[int], seconds: float | None = None, *, whole: bool = False) -> bool:
        """Receive into `room` with one system call, which waits: for ever, or, where there is a deadline, a few milliseconds."""
        if not self._can_fill or (seconds is not None and seconds < _SHORT):
            return False
        limit = _FOR_EVER if seconds is None else _FOR_SHORT
        if limit is not self._limit and not self._limit_receives(limit):
            return False
        try:
            # In C from the receive to the list, so that no signal handler runs in between.
            taken.extend(map(self._sock.recv_into, (room,), (0,), (_WHOLE if whole else 0,)))
        except BlockingIOError:
            return False  # as in `wait`
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            self._failed = exc
        return True

    def send_all(self, parts: Sequence[memoryview], sent: list[int], seconds: float | None = None) -> bool:
        """Send with one system call, which waits: a few milliseconds for room, since there may be something to receive."""
        if not self._can_send_all or (seconds is not None and seconds < _SHORT):
            return False
        if not self._sends_are_limited:
            if not self._set_limit(socket.SO_SNDTIMEO, _FOR_SHORT):
                return False
            self._sends_are_limited = True
        try:
            # As in `fill`: no signal handler runs between the call and the list.
            sent.extend(map(self._sock.sendmsg, (parts,), ((),), (_NO_SIGNAL,)))
        except BlockingIOError:
            return False
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            self._send_failed = exc
        return True

    def _limit_receives(self, limit: bytes) -> bool:
        """Have receives wait so long. Returns False where that cannot be."""
        if limit is not self._limit:
            if not self._set_limit(socket.SO_RCVTIMEO, limit):
                return False
            self._limit = limit
        return True

    def _set_limit(self, option: int, limit: bytes) -> bool:
        if not self._can_limit:
            return False
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)
        except (OSError, TypeError) as exc:  # TypeError: Python sets no option of a vsock socket but to a whole number
            if from_signal_handler(exc):
                raise
            self._can_limit = False
            return False
        return True

    def send(self, parts: Sequence[memoryview]) -> int | None:
        """Send from the front of `parts` with one system call. Raises Disconnected as `recv_into` does."""
        try:
            if self._send_failed is not None:
                raise self._send_failed
            if _HAS_SENDMSG:
                return self._sock.sendmsg(parts if len(parts) <= _MOST_PARTS else parts[:_MOST_PARTS], (), _SEND_FLAGS)
            return self._sock.send(next(filter(len, parts), b""), _SEND_FLAGS)
        except BlockingIOError:
            return None
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            if isinstance(exc, InterruptedError):
                return None
            raise self._broken("sending", exc) from exc

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    def finish_sending(self) -> bool:
        """Shut the sending half down; the kernel still delivers what was sent."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            raise self._broken("finishing", exc) from exc
        return True

    def hang_up(self) -> None:
        """Shut the socket down in both directions."""
        self._closed = True
        if self._process != os.getpid():
            return  # the copy that a fork made: the connection is the parent's
        # It fails when the peer is gone.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; the kernel still delivers what was sent, unless the peer's own bytes were left unread."""
        # Closing a descriptor does not wake a thread that polls it; shutting it down does.
        self.hang_up()
        # The descriptor is freed even where close reports an error, and nobody could act on one.
        with contextlib.suppress(OSError):
            self._sock.close()

    def detach(self) -> int:
        """Give the connection up, as it is, and return its descriptor, which is the caller's; the stream is closed."""
        self._closed = True
        return self._sock.detach()

    def _broken(self, doing: str, exc: OSError | None) -> Disconnected:
        if self._closed or exc is None:
            return Disconnected(errno.ENOTCONN, f"the connection to {self._peer} was closed by this program")
        return Disconnected(exc.errno or 0, f"the connection to {self._peer} broke while {doing}: {exc.strerror or exc}")


class SocketListener(Listener):
    """A listening stream socket of any family as a Listener; a base for the transports', which override `stream`.

    Args:
        sock: listening. Put into non-blocking mode; closed with the listener.
        address: the address in effect.
    """

    def __init__(self, sock: socket.socket, address: Address) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._address = address

    @property
    def address(self) -> Address:
        """The address in effect."""
        return self._address

    def accept(self) -> Stream | None:
        """Return the next client's stream, or None when there is none to take just now. Raises TransportError."""
        try:
            sock, name = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            if exc.errno in _PASSING or isinstance(exc, InterruptedError):
                return None
            raise TransportError(exc.errno or 0, f"cannot accept clients on {self._address}: {exc.strerror or exc}") from exc
        try:
            return self.stream(sock, name)
        except BaseException as exc:
            sock.close()
            if not isinstance(exc, OSError) or from_signal_handler(exc):
                raise
            # Gone again already: some systems then refuse to set options. It is that client's trouble only.
            return None

    def stream(self, sock: socket.socket, name: Any) -> Stream:
        """Return the stream of an accepted socket, whose far end the operating system calls `name`."""
        return SocketStream(sock, peer=f"a client of {self._address} ({_peer_name(name)})")

    def fileno(self) -> int:
        """Return the listening descriptor, -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop listening. Clients that were not accepted yet are turned away."""
        # As for a stream: the descriptor is freed all the same.
        with contextlib.suppress(OSError):
            self._sock.close()


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets connected to each other inside this process, on any platform. The caller closes them."""
    if os.name == "nt" or hasattr(socket, "AF_UNIX"):
        return socket.socketpair()
    near = socket.socket()
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        near.connect(server.getsockname())
        far, name = server.accept()
        while name != near.getsockname():  # a stranger on this machine was faster
            far.close()
            far, name = server.accept()
    return near, far


def _peer_name(name: Any) -> str:
    """Put a socket name of any family into words: internet and vsock ones begin with host and port, unix ones are one string."""
    if isinstance(name, tuple) and len(name) > 1:
        return f"{name[0]} port {name[1]}"
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return f"unix socket {printable(text)}" if text else "an unnamed unix socket"
