"""The polled client: event loops, bursts, callbacks, and an end that completes everything."""

from __future__ import annotations

import contextlib
import errno
import select

import pytest

from nbdcore.clients.polled import PolledClient
from nbdcore.errors import Error, ProtocolViolation, UsageError
from nbdcore.plugins.registry import registry
from nbdcore.protocol.constants import CommandType
from nbdcore.protocol.handshake import negotiation
from nbdcore.protocol.handshake.agreement import Settings
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.base import Want
from nbdcore.streams.sockets import SocketStream
from nbdcore.testing.scripted import ScriptedServer, answer, data, drain, goodbye, hang_up, receive, unless_gone
from tests.clients.talking import PATIENCE, SHORT, script


def connected(server: ScriptedServer) -> PolledClient:
    client = PolledClient(Settings())
    client.connect_stream(server.stream())
    while client.phase is Phase.CONNECTING:
        client.poll(PATIENCE)
    return client


def until_the_end(client: PolledClient, timeout: float | None) -> None:
    while client.phase is Phase.CONNECTED:
        client.poll(timeout)


def read(client: PolledClient, count: int = 8) -> Command:
    return commands.read(client.engine.limits, count, 0)


def test_loop_of_a_stranger_drives_connect_handshake_and_commands():
    steps = script(answer(data(b"12345678"), kind=CommandType.READ))
    with ScriptedServer(steps, patience=PATIENCE) as server:
        client = PolledClient(Settings())
        client.connect_transport("tcp", host="127.0.0.1", port=server.listen_tcp())
        command: Command | None = None
        while command is None or not command.done:
            if client.phase is Phase.CONNECTED and command is None:
                command = read(client)
                assert client.submit(command) == 1
            poll, want = select.poll(), client.direction()
            poll.register(
                client.fileno(), (select.POLLIN if want & Want.READ else 0) | (select.POLLOUT if want & Want.WRITE else 0)
            )
            ((_, events),) = poll.poll(PATIENCE * 1000)
            (client.notify_read if events & (select.POLLIN | select.POLLHUP) else client.notify_write)()
        assert command.result() == b"12345678"
        client.close()


def test_transport_that_cannot_connect_kills_the_client_with_its_reason():
    client = PolledClient(Settings())
    client.connect_transport("unix", path="/nonexistent")
    assert client.phase is Phase.DEAD
    assert client.error.errno == errno.ENOENT
    assert (client.fileno(), client.direction()) == (-1, Want.NOTHING)


def test_client_connects_once():
    with ScriptedServer(script(goodbye), patience=PATIENCE) as server:
        client = connected(server)
        with pytest.raises(UsageError):
            client.connect_transport("unix", path="/nonexistent")
        client.disconnect()
        while client.phase is Phase.CONNECTED:
            client.poll(PATIENCE)
        assert client.phase is Phase.CLOSED


def test_nothing_to_wait_for_is_an_error():
    client = PolledClient(Settings())
    for call in (client.poll, client.notify_read, client.notify_write):
        with pytest.raises(UsageError):
            call()
    client.close()
    assert client.phase is Phase.CLOSED


def test_commands_behind_one_under_way_go_out_together_when_they_are_told_to():
    replies = [answer(data(b"12345678"), kind=CommandType.READ)] * 4
    with ScriptedServer(script(*replies), patience=PATIENCE) as server:
        client = connected(server)
        batch = [read(client) for _ in range(4)]
        for command in batch:
            client.submit(command)
        assert len(client.engine.in_flight) == 1
        assert client.direction() == Want.READ | Want.WRITE
        client.send()
        assert len(client.engine.in_flight) == 4
        assert client.direction() == Want.READ
        for command in batch:
            client.wait_for(command)
        assert [command.result() for command in batch] == [b"12345678"] * 4
        client.close()


def test_completion_may_submit_but_neither_wait_nor_move_bytes():
    replies = [answer(data(b"12345678"), kind=CommandType.READ)] * 2
    with ScriptedServer(script(*replies), patience=PATIENCE) as server:
        client = connected(server)
        first, second = read(client), read(client)
        refused = []

        def completion(_command: Command) -> None:
            client.submit(second)
            for call in (client.poll, client.advance, client.check_may_wait):
                with pytest.raises(UsageError) as caught:
                    call()
                refused.append(caught.value.errno)

        first.completion = completion
        client.submit(first)
        client.wait_for(first)
        client.wait_for(second)
        assert refused == [errno.EDEADLK] * 3
        assert second.result() == b"12345678"
        client.close()


def test_server_that_hangs_up_between_replies_completes_what_is_under_way_without_an_exception():
    with ScriptedServer(script(receive(3 * 28), hang_up), patience=PATIENCE) as server:
        client = connected(server)
        told = []
        for _ in range(3):
            command = read(client)
            command.completion = told.append
            client.submit(command)
        while client.phase is Phase.CONNECTED:
            client.poll(PATIENCE)
        assert client.phase is Phase.CLOSED
        assert [isinstance(command.error, Error) for command in told] == [True] * 3


@pytest.mark.parametrize("timeout", [PATIENCE, None])
@pytest.mark.parametrize("count", [1, 3])
def test_server_that_talks_nonsense_raises_once_and_leaves_nothing_to_wait_for(count, timeout):
    with ScriptedServer(script(receive(28 * count), bytes(64)), patience=PATIENCE) as server:
        client = connected(server)
        for _ in range(count):
            client.submit(read(client))
        with pytest.raises(ProtocolViolation):
            until_the_end(client, timeout)
        assert client.phase is Phase.DEAD
        assert isinstance(client.error, ProtocolViolation)
        with pytest.raises(UsageError, match="nothing to wait for"):
            client.poll(0)


def test_wait_ends_when_the_time_is_up():
    with ScriptedServer(script(goodbye), patience=PATIENCE) as server:
        client = connected(server)
        assert client.poll(0) is False
        client.disconnect()
        client.poll(PATIENCE)
        client.close()


@pytest.mark.parametrize("timeout", [0, SHORT])
def test_wait_ends_when_the_time_is_up_though_commands_are_under_way(timeout):
    with ScriptedServer(script(receive(28 * 3), goodbye), patience=PATIENCE) as server:
        client = connected(server)
        for _ in range(3):
            client.submit(read(client))
        assert client.poll(timeout) is False
        assert client.poll(timeout) is False
        assert len(client.engine.in_flight) == 3
        client.disconnect()
        until_the_end(client, PATIENCE)


def test_answers_that_come_late_and_early_are_all_waited_for_without_an_end():
    late = answer(data(b"12345678"), kind=CommandType.READ)
    with ScriptedServer(script(late, late, receive(28), late, late), patience=PATIENCE) as server:
        client = connected(server)
        batch = [read(client) for _ in range(5)]
        for command in batch[:2]:
            client.submit(command)
        while not batch[1].done:
            assert client.poll() is True
        for command in batch[2:]:
            client.submit(command)
        while not batch[4].done:
            assert client.poll() is True
        assert [command.done for command in batch] == [True, True, False, True, True]
        client.close()


def test_closing_while_connecting_frees_what_was_opened():
    client = PolledClient(Settings())
    transport = registry.get("tcp")
    client.connect_steps(transport.connect(transport.address(host="localhost", port=1)))
    client.close()
    assert client.phase in (Phase.CLOSED, Phase.DEAD)
    client.close()


def test_option_outside_opt_mode_is_refused():
    with ScriptedServer(script(drain), patience=PATIENCE) as server:
        client = connected(server)
        with pytest.raises(UsageError):
            client.exchange(negotiation.list_exports(client.engine.agreement, client.engine.settings))
        client.close()


@pytest.mark.parametrize("mine", [ValueError("mine"), FileNotFoundError(errno.ENOENT, "mine"), TimeoutError("mine")])
def test_what_a_completion_raises_reaches_the_caller_and_harms_no_other_command(mine):
    steps = script(answer(data(b"12345678"), kind=CommandType.READ), answer(data(b"abcdefgh"), kind=CommandType.READ))
    with ScriptedServer(steps, patience=PATIENCE) as server:
        client = connected(server)
        first, second = read(client), read(client)

        def completion(_: Command) -> None:
            raise mine

        first.completion = completion
        client.submit(first)
        client.submit(second)
        raised: list[BaseException] = []
        while not second.done:
            try:
                client.poll(PATIENCE)
            except type(mine) as exc:
                raised.append(exc)
        assert raised == [mine]
        assert (client.phase, second.result()) == (Phase.CONNECTED, b"abcdefgh")
        client.close()


class InterruptedOnce(SocketStream):
    """A stream where a signal handler raises once, right after something was sent."""

    armed = False

    def send(self, parts):
        count = super().send(parts)
        if self.armed and count:
            self.armed = False
            raise KeyboardInterrupt
        return count


def test_poll_that_is_interrupted_in_the_middle_of_sending_ends_the_connection():
    """Nobody knows how much was sent: to go on would send requests twice."""
    seen = []

    def see(connection):
        while True:
            seen.append(connection.receive_request().offset)

    with ScriptedServer(script(unless_gone(see)), patience=PATIENCE) as server:
        stream = InterruptedOnce(server.socket())
        client = PolledClient(Settings())
        client.connect_stream(stream)
        while client.phase is Phase.CONNECTING:
            client.poll(PATIENCE)
        for offset in (0, 512):  # the second one waits for company
            client.submit(commands.read(client.engine.limits, 8, offset))
        stream.armed = True
        with pytest.raises(KeyboardInterrupt):
            client.poll(PATIENCE)
        assert client.phase is Phase.DEAD
        client.close()
    assert seen == [0, 512]


def test_callback_may_not_wait_while_sending_meets_a_server_that_has_hung_up():
    """What the server answered before is received then, in the middle of sending."""
    refused = []

    def answer_and_go(connection):
        connection.send(data(bytes(8))(connection.receive_request()))
        hang_up(connection)

    def callback(*_):
        with pytest.raises(UsageError) as caught:
            client.check_may_wait()
        refused.append(caught.value.errno)

    with ScriptedServer(script(answer_and_go), patience=PATIENCE) as server:
        client = connected(server)
        first = read(client)
        first.on_chunk = callback
        client.submit(first)
        while not client.engine.error:  # it takes a moment until sending fails
            with contextlib.suppress(Error):
                client.submit(commands.write(client.engine.limits, bytes(40_000), 0))
        assert refused == [errno.EDEADLK]
        assert first.error is None
        client.close()


def test_connecting_that_is_interrupted_in_its_first_step_leaves_a_dead_client():
    def steps():
        raise KeyboardInterrupt
        yield

    client = PolledClient(Settings())
    with pytest.raises(KeyboardInterrupt):
        client.connect_steps(steps())
    assert client.phase is Phase.DEAD
