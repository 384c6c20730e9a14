"""What a session does for streams that keep bytes to themselves, as encrypted ones do, each habit exaggerated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nbdcore import Client, Phase, TLSError
from nbdcore.protocol.constants import CommandType, Option
from nbdcore.streams.base import Stream, Want
from nbdcore.testing.scripted import (
    ScriptedServer,
    answer,
    data,
    expect_option,
    goodbye,
    greeting,
    option_reply,
    receive,
)
from tests.clients.talking import PATIENCE, script


class Over(Stream):
    """A stream over another one."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def recv_into(self, room: memoryview) -> int | None:
        return self.stream.recv_into(room)

    def send(self, parts: Sequence[memoryview]) -> int | None:
        return self.stream.send(parts) if parts else 0

    def fileno(self) -> int:
        return self.stream.fileno()

    def finish_sending(self) -> bool:
        return self.stream.finish_sending()

    def hang_up(self) -> None:
        self.stream.hang_up()

    def close(self) -> None:
        self.stream.close()


class Hoarding(Over):
    """Receives all there is, and gives it away byte by byte: the descriptor is quiet while bytes are waiting here."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.hoard = bytearray()
        self.ended = False

    def recv_into(self, room: memoryview) -> int | None:
        piece = memoryview(bytearray(1 << 16))
        while not self.ended and (count := self.stream.recv_into(piece)) is not None:
            self.hoard += piece[:count]
            self.ended = not count
        if not self.hoard:
            return 0 if self.ended else None
        room[:1] = self.hoard[:1]
        del self.hoard[:1]
        return 1

    def buffered(self) -> bool:
        return bool(self.hoard) or self.ended


class Owing(Over):
    """Takes everything, and sends it when it is called again."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.owed = b""

    def send(self, parts: Sequence[memoryview]) -> int | None:
        if self.owed:
            self.owed = self.owed[self.stream.send([memoryview(self.owed)]) or 0 :]
        if self.owed:
            return None
        self.owed = b"".join(parts)
        return len(self.owed)

    def wants(self) -> Want:
        return Want.WRITE if self.owed else Want.NOTHING

    def finish_sending(self) -> bool:
        self.send([])
        return not self.owed and self.stream.finish_sending()


class Reluctant(Over):
    """Finishes sending when it is asked for the third time."""

    asked = 0

    def finish_sending(self) -> bool:
        self.asked += 1
        return self.asked >= 3 and self.stream.finish_sending()


@pytest.mark.parametrize("habit", [Hoarding, Owing, Reluctant])
def test_a_stream_with_habits_is_a_stream(habit):
    content = bytes(range(250)) * 4
    steps = [answer(data(content), kind=CommandType.READ), answer(data(content[:3]), kind=CommandType.READ), goodbye]
    with ScriptedServer(script(*steps), patience=PATIENCE) as server:
        client = Client(habit(server.stream()), timeout=PATIENCE)
        assert client.pread(1000, 0, timeout=PATIENCE) == content
        assert client.pread(3, 0, timeout=PATIENCE) == content[:3]
        client.disconnect(timeout=PATIENCE)
        assert client.phase is Phase.CLOSED


class Shaking(Over):
    """Has a handshake of its own: says three times a byte, and hears it again."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.said = self.heard = 0

    def handshake(self) -> bool:
        room = memoryview(bytearray(1))
        while self.heard < 3:
            if self.said == self.heard:
                assert self.stream.send([memoryview(b"?")]) == 1
                self.said += 1
            if self.stream.recv_into(room) is None:
                return False
            if room != b"!":
                raise TLSError(0, "no handshake of mine")
            self.heard += 1
        return True

    def wants(self) -> Want:
        return Want.NOTHING if self.heard == 3 else Want.READ


def shaking(answered: bytes):
    def play(connection) -> None:
        for _ in range(3):
            connection.receive(1)
            connection.send(answered)

    return play


def test_nothing_is_said_before_the_handshake_of_the_new_stream_is_finished():
    begin = [greeting(), receive(4), expect_option(Option.STARTTLS), option_reply(Option.STARTTLS)]
    inside = [shaking(b"!"), expect_option(Option.STRUCTURED_REPLY), option_reply(Option.STRUCTURED_REPLY, 1 << 31 | 1)]

    with ScriptedServer([*begin, *inside, expect_option(Option.ABORT)]) as server:
        client = Client(server.stream(), tls=True, start_tls=Shaking, opt_mode=True, structured_replies=False, timeout=PATIENCE)
        assert client.tls
        assert client.opt_structured_reply(timeout=PATIENCE) is False
        client.close()


def test_a_handshake_of_the_new_stream_that_fails_ends_the_connection():
    begin = [greeting(), receive(4), expect_option(Option.STARTTLS), option_reply(Option.STARTTLS), receive(1), b"x"]
    with ScriptedServer(begin) as server, pytest.raises(TLSError, match="no handshake of mine"):
        Client(server.stream(), tls=True, start_tls=Shaking, timeout=PATIENCE)
