"""The server's end of one connection, as the steps of a script see it: bytes, options and requests, each wait with a deadline."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import CommandFlag, CommandType
from nbdcore.streams.waiting import Deadline

__all__ = ["ClientGone", "Connection", "Reply", "Request", "ScriptFailed", "Step"]


class ScriptFailed(AssertionError):
    """The client did not do what the script expects, or not in time; or a step raised."""


class ClientGone(ScriptFailed):
    """The client hung up, or the connection broke, where it was expected to say or hear more.

    Attributes:
        received: how many bytes of what it was expected to say had come.
    """

    def __init__(self, message: str, *, received: int = 0) -> None:
        super().__init__(message)
        self.received = received


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the client sent it.

    Attributes:
        kind, flags, cookie, offset: as in the header; kind is a CommandType where it is a known one.
        count: the header's length, in bytes.
        payload: bytes behind the header.
        extended: the header is an extended one, so that chunks in answer to it have extended headers too.
    """

    kind: int
    flags: int
    cookie: int
    offset: int
    count: int
    payload: bytes = b""
    extended: bool = False


#: Makes the bytes that answer a request.
Reply = Callable[[Request], bytes]


class Connection:
    """The server's end of one connection, in the hands of a script's steps.

    Attributes:
        options: (option, data) of each option received so far.
        requests: each request received so far.
    """

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self._sock = sock
        self._patience = patience
        self.options: list[tuple[int, bytes]] = []
        self.requests: list[Request] = []

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self._sock.settimeout(self._patience)
        try:
            self._sock.sendall(data)
        except TimeoutError as exc:
            raise ScriptFailed(f"within {self._patience} s the client did not take all of {len(data)} bytes") from exc
        except OSError as exc:
            raise ClientGone(f"{len(data)} bytes could not be sent to the client: {exc}") from exc

    def receive(self, count: int) -> bytes:
        """Receive exactly `count` bytes."""
        received = bytearray()
        deadline = Deadline.after(self._patience)
        while len(received) < count:
            try:
                piece = self._receive_some(count - len(received), deadline)
            except TimeoutError as exc:
                raise ScriptFailed(f"within {self._patience} s the client sent only {len(received)} of {count} bytes") from exc
            except OSError as exc:
                raise ClientGone(f"the connection broke after {len(received)} of {count} bytes: {exc}") from exc
            if not piece:
                said = f"the client hung up after {len(received)} of {count} bytes: {bytes(received[-64:])!r}"
                raise ClientGone(said, received=len(received))
            received += piece
        return bytes(received)

    def expect(self, data: bytes) -> None:
        """Receive exactly these bytes."""
        received = self.receive(len(data))
        if received != data:
            raise ScriptFailed(f"the client sent {received!r}, and {data!r} was expected")

    def expect_end(self) -> None:
        """Receive the client's end, and not a byte before it."""
        if piece := self._until_end():
            raise ScriptFailed(f"the client sent {piece!r}, and its end was expected")

    def drain(self) -> None:
        """Receive whatever comes until the client's end."""
        while self._until_end():
            continue

    def receive_option(self) -> tuple[int, bytes]:
        """Receive one option request; returns option and data."""
        magic, option, length = self._unpack(wire.OPTION_REQUEST)
        if magic != constants.OPTION_MAGIC:
            raise ScriptFailed(f"the client sent {magic:#x} where an option request begins")
        self.options.append((option, self.receive(length)))
        return self.options[-1]

    def receive_request(self) -> Request:
        """Receive one request with its payload, compact or extended."""
        (magic,) = struct.unpack(">I", start := self.receive(4))
        if magic not in (constants.REQUEST_MAGIC, constants.EXTENDED_REQUEST_MAGIC):
            raise ScriptFailed(f"the client sent {magic:#x} where a request begins")
        extended = magic == constants.EXTENDED_REQUEST_MAGIC
        layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        _, flags, kind, cookie, offset, count = layout.unpack(start + self.receive(layout.size - 4))
        carries = flags & CommandFlag.PAYLOAD_LEN if extended else kind == CommandType.WRITE
        payload = self.receive(count) if carries else b""
        if kind in CommandType.__members__.values():
            kind = CommandType(kind)
        self.requests.append(Request(kind, flags, cookie, offset, count, payload, extended))
        return self.requests[-1]

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self._sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break the connection off, so that what was under way is lost (TCP RST). Other sockets know only `close`."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def interrupt(self) -> None:
        """Wake the thread that plays the script, from another one: whatever it waits for fails."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.receive(layout.size))

    def _until_end(self) -> bytes:
        """Receive something, or b"" at the client's end."""
        try:
            return self._receive_some(1 << 16, Deadline.after(self._patience))
        except TimeoutError as exc:
            raise ScriptFailed(f"within {self._patience} s the client did not hang up") from exc
        except OSError:
            return b""  # the client left something unread: an end as well

    def _receive_some(self, count: int, deadline: Deadline) -> bytes:
        self._sock.settimeout(max(deadline.remaining() or 0.0, 0.001))  # 0 would mean "do not wait", and is another error
        return self._sock.recv(min(count, 1 << 20))


#: Something that a server does: send these bytes, or be called with the Connection.
Step = bytes | Callable[[Connection], object]
