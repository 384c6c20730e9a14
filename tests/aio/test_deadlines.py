"""Deadlines on every call that waits: a command is abandoned and the connection goes on; a handshake ends with its deadline."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from nbdcore import DeadlineExceeded, Phase, UsageError, aio
from nbdcore.aio import AsyncClient
from nbdcore.protocol.constants import CommandType
from nbdcore.testing.scripted import Connection, ScriptedServer, answer, data, drain, first, goodbye, serve, unless_gone, wait_for
from tests.aio.talking import CALLS, DISK, DONE, PATIENCE, SHORT, held, late, talk
from tests.clients.talking import HANDSHAKES, OPTION_CALLS, OPTION_MODE, in_two_parts, odd_ones_first, ready_for_options


@pytest.mark.parametrize("name", CALLS)
def test_a_silent_server_costs_the_call_and_not_the_connection(run, name):
    event = threading.Event()

    async def main():
        async with talk(late(event, CALLS[name].chunks), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
            with pytest.raises(DeadlineExceeded, match="no answer from the server in time") as caught:
                await CALLS[name].make(client, timeout=SHORT)
            assert isinstance(caught.value, TimeoutError)
            assert client.phase is Phase.CONNECTED
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())


def test_the_message_names_the_command(run):
    event = threading.Event()

    async def main():
        async with talk(late(event)) as (client, _):
            with pytest.raises(DeadlineExceeded, match=r"\(read of 8 bytes at offset 16\)"):
                await client.pread(8, 16, timeout=SHORT)
            event.set()

    run(main())


@pytest.mark.parametrize("part", [0, 10, 40, 100_020], ids=["nothing", "half a header", "some data", "most data"])
def test_a_late_reply_does_not_touch_the_buffer_of_an_abandoned_read(run, part):
    event = threading.Event()
    step = in_two_parts(data(b"x" * 200_000), part, event)

    async def main():
        async with talk(step, answer(data(b"y" * 8), kind=CommandType.READ)) as (client, _):
            buffer = bytearray(200_000)
            with pytest.raises(DeadlineExceeded):
                await client.pread_into(buffer, 0, timeout=SHORT)
            kept = bytes(buffer)
            assert not held(buffer)
            event.set()
            assert await client.pread(8, 0, timeout=PATIENCE) == b"y" * 8
            assert buffer == kept

    run(main())


def test_a_deadline_that_has_passed_waits_for_nothing(run):
    event = threading.Event()

    async def main():
        async with talk(late(event, DONE), serve(DONE)) as (client, connection):
            with pytest.raises(DeadlineExceeded):
                await client.flush(timeout=0)
            assert client.phase is Phase.CONNECTED
            event.set()
            await client.flush(timeout=PATIENCE)
            assert len(connection.requests) == 2, "the first one was sent all the same"

    run(main())


def test_a_split_call_has_one_deadline_for_all_of_it(run):
    event = threading.Event()

    def two_then_nothing(connection: Connection) -> None:
        for _ in range(2):
            connection.send(DONE(connection.receive_request()))
        requests = [connection.receive_request() for _ in range(4)]
        assert event.wait(PATIENCE)
        connection.send(b"".join(DONE(request) for request in requests))

    async def main():
        steps = (two_then_nothing, answer(DONE, kind=CommandType.FLUSH))
        async with talk(*steps, block_size=(1, 4096, 1 << 16)) as (client, connection):
            with pytest.raises(DeadlineExceeded, match="cache of 65536 bytes at offset"):
                await client.cache(DISK, 0, timeout=0.2)
            event.set()
            await client.flush(timeout=PATIENCE)
            assert len(connection.requests) == 7

    run(main())


def test_extents_wait_for_each_request_as_long_as_the_timeout_says(run):
    event = threading.Event()

    async def main():
        async with talk(answer(CALLS["extents"].chunks), late(event)) as (client, connection):
            walk = client.extents(timeout=SHORT)
            with pytest.raises(DeadlineExceeded):
                await anext(walk)  # the first extent is held back until the second reply shows whether it goes on
            assert len(connection.requests) == 2
            event.set()

    run(main())


def test_an_endless_deadline_is_one(run):
    async def main():
        async with talk(serve(DONE)) as (client, _):
            await asyncio.gather(*(client.flush(timeout=seconds) for seconds in (float("inf"), 10**9, None)))

    run(main())


def test_one_task_s_deadline_does_not_disturb_the_others(run):
    event = threading.Event()

    async def main():
        async with talk(odd_ones_first(event), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
            tasks = [
                asyncio.create_task(client.pread(1, offset, timeout=PATIENCE if offset % 2 else SHORT)) for offset in range(8)
            ]
            await asyncio.wait(tasks[::2])
            assert all(isinstance(task.exception(), DeadlineExceeded) for task in tasks[::2])
            assert not any(task.done() for task in tasks[1::2])
            event.set()
            assert [await task for task in tasks[1::2]] == [b"1", b"3", b"5", b"7"]
            await client.flush(timeout=PATIENCE)

    run(main())


# ---------------------------------------------------------------------------------------------- handshake, options, goodbye


@pytest.mark.parametrize("said", [b"", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\3"])
def test_a_handshake_that_takes_too_long_kills_the_connection(run, said):
    async def main():
        with ScriptedServer([said, drain]) as server:
            client = AsyncClient()
            with pytest.raises(DeadlineExceeded, match=r"in time \(the handshake\)"):
                await client.connect_stream(server.stream(), timeout=SHORT)
            assert client.phase is Phase.DEAD
            with pytest.raises(UsageError, match=r"it ended with: no answer from the server in time \(the handshake\)"):
                await client.pread(1, 0)

    run(main())


def test_a_server_that_drips_does_not_stretch_the_deadline(run):
    enough = threading.Event()

    def drip(connection: Connection) -> None:
        for byte in HANDSHAKES["newstyle"]:
            connection.send(bytes([byte]))
            if enough.wait(0.01):
                return

    async def main():
        with ScriptedServer([unless_gone(drip)]) as server:
            with pytest.raises(DeadlineExceeded):
                await aio.connect_stream(server.stream(), timeout=SHORT)
            enough.set()

    run(main())


def test_connecting_has_the_deadline_too(run, socket_path):
    async def main():
        # A backlog that is full makes connecting itself wait.
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first_in_line:
            listener.bind(str(socket_path))
            listener.listen(0)
            first_in_line.connect(str(socket_path))
            client = AsyncClient()
            with pytest.raises(DeadlineExceeded, match="took too long"):
                await client.connect_unix(socket_path, timeout=SHORT)
            assert client.phase is Phase.DEAD

    run(main())
    socket_path.unlink()


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
@pytest.mark.parametrize("name", OPTION_CALLS)
def test_an_option_that_takes_too_long_kills_the_connection(run, name, how):
    make, reply = OPTION_CALLS[name]

    async def main():
        most_of_it = unless_gone(lambda c: (c.receive_option(), c.send(reply[:-1])))  # a busy machine may be too late for it
        with ScriptedServer([ready_for_options, most_of_it, drain]) as server:
            connecting = aio.connect_stream(server.stream(), timeout=PATIENCE, start_tls=lambda stream: stream, **OPTION_MODE)
            async with connecting as client:
                if how == "deadline":
                    with pytest.raises(DeadlineExceeded, match=rf"in time \({name}\)"):
                        await make(client, timeout=SHORT)
                else:
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(make(client), SHORT)
                assert client.phase is Phase.DEAD

    run(main())


def test_a_server_that_does_not_hang_up_after_the_goodbye_is_left_at_the_deadline(run):
    event = threading.Event()

    async def main():
        async with talk(goodbye, wait_for(event)) as (client, connection):
            with pytest.raises(DeadlineExceeded, match="the server was to hang up"):
                await client.disconnect(timeout=SHORT)
            assert client.phase is Phase.CLOSED
            event.set()
            assert connection.requests[-1].kind == CommandType.DISC

    run(main())


def test_a_reply_that_stops_in_the_middle_ends_with_the_deadline_and_spoils_what_comes_after(run):
    """The rest of it may still come: the connection waits for it, and goes on when it is there."""
    event = threading.Event()
    cut = first(30, data(b"12345678"))

    def step(connection: Connection) -> None:
        request = connection.receive_request()
        connection.send(cut(request))
        wait_for(event)(connection)
        connection.send(data(b"12345678")(request)[30:])

    async def main():
        async with talk(step, answer(DONE), answer(DONE)) as (client, _):
            with pytest.raises(DeadlineExceeded):
                await client.pread(8, 0, timeout=SHORT)
            with pytest.raises(DeadlineExceeded):
                await client.flush(timeout=SHORT)
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())


def test_list_exports_has_one_deadline_for_connecting_and_asking(run):
    async def main():
        with ScriptedServer([drain]) as server:
            listed = aio.list_exports(f"nbd://127.0.0.1:{server.listen_tcp()}", timeout=10 * SHORT)
            with pytest.raises(DeadlineExceeded):
                await listed

    run(main())


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", b"5", [], object()])
def test_a_wrong_timeout_is_a_usage_error_everywhere(run, timeout: Any):
    async def main():
        async with talk(goodbye) as (client, _):
            for call in CALLS.values():
                with pytest.raises(UsageError, match="timeout"):
                    await call.make(client, timeout=timeout)
            with pytest.raises(UsageError, match="timeout"):
                await client.pread(DISK, 0, timeout=timeout)
            with pytest.raises(UsageError, match="timeout"):
                await client.disconnect(timeout=timeout)
            await client.disconnect(timeout=PATIENCE)

    run(main())
