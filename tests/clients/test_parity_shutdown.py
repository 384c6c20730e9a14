"""A server that shuts down is left in the same way by every front end: with a goodbye, when all is answered."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time

import pytest

import nbdcore
from nbdcore import aio
from nbdcore.clients.polled import PolledClient
from nbdcore.libnbd import NBD
from nbdcore.libnbd import Error as HandleError
from nbdcore.protocol.constants import CommandType, ErrorNumber, Option, OptionReply
from nbdcore.protocol.handshake.agreement import Settings
from nbdcore.protocol.transmission import commands
from nbdcore.testing.scripted import (
    ScriptedServer,
    answer,
    data,
    error,
    expect_option,
    goodbye,
    greeting,
    option_reply,
    serve,
    wait_for,
)
from tests.clients.talking import PATIENCE, in_background, script
from tests.clients.test_parity import COUNT, FRONT_ENDS, RANGES, collect, connected, every_front_end

SHUTDOWN = error(ErrorNumber.ESHUTDOWN, "back at noon")
every_kind = pytest.mark.parametrize("front_end", [*FRONT_ENDS, "PolledClient", "NBD"])


def polled_pread(client, offset):
    command = commands.read(client.engine.limits, COUNT, offset)
    client.submit(command)
    client.wait_for(command)
    if command.error is not None:
        raise command.error
    return command.result()


@contextlib.contextmanager
def reader(front_end, uri):
    """Connect, and give what reads COUNT bytes at an offset, whatever the front end."""
    if front_end == "NBD":
        handle = NBD()
        handle.connect_uri(uri)
        yield lambda offset: handle.pread(COUNT, offset)
        handle.close()
    elif front_end == "PolledClient":
        polled = PolledClient(Settings())
        polled.connect(uri)
        while polled.phase is nbdcore.Phase.CONNECTING:
            polled.poll(PATIENCE)
        yield lambda offset: polled_pread(polled, offset)
        polled.close()
    elif front_end.startswith("Async"):
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            client = loop.run_until_complete(asyncio.wait_for(_connected(front_end, uri), PATIENCE))
            yield lambda offset: loop.run_until_complete(client.pread(COUNT, offset))
            loop.run_until_complete(client.close())
    else:
        with connected(front_end, uri) as client:
            yield lambda offset: client.pread(COUNT, offset)


async def _connected(front_end, uri):
    return await connected(front_end, uri)


@contextlib.contextmanager
def played(*steps):
    """Play a script to one client, and give its URI."""
    with ScriptedServer(steps, patience=PATIENCE) as server:
        yield f"nbd://127.0.0.1:{server.listen_tcp()}"


@every_kind
def test_server_that_shuts_down_is_told_goodbye_and_asked_no_more(front_end):
    one = script(answer(data(bytes(COUNT))), answer(SHUTDOWN), goodbye, flags=1)  # one connection, of a pool too
    with played(*one) as uri, reader(front_end, uri) as pread:
        assert pread(0) == bytes(COUNT)
        with pytest.raises((nbdcore.CommandError, HandleError)) as refused:
            pread(COUNT)
        with pytest.raises((nbdcore.Disconnected, HandleError)) as over:
            pread(COUNT)
    if front_end == "NBD":
        assert refused.value.errnum == errno.ESHUTDOWN
    else:
        assert refused.value.errno == errno.ESHUTDOWN
        assert refused.value.server_text == "back at noon"
        assert "the server is shutting down" in str(over.value)


@every_front_end
def test_what_is_under_way_at_a_shutdown_still_has_its_outcome(front_end):
    """The second request is answered when the first one's caller knows of the shutdown; a third finds the connection closing."""
    known = threading.Event()
    outcomes = []

    def both(connection):
        first, second = connection.receive_request(), connection.receive_request()
        connection.send(SHUTDOWN(first))
        wait_for(known)(connection)
        connection.send(data(bytes(COUNT))(second))

    def blocking(client):
        second = threading.Thread(target=lambda: outcomes.append(client.pread(COUNT, 1)), daemon=True)

        def pread_first():
            try:
                client.pread(COUNT, 0)
            except nbdcore.CommandError as exc:
                outcomes.append(exc.errno)

        first = threading.Thread(target=pread_first, daemon=True)
        first.start()
        second.start()
        first.join(PATIENCE)
        with pytest.raises(nbdcore.Disconnected, match="the server is shutting down"):
            client.pread(COUNT, 2)
        known.set()
        second.join(PATIENCE)

    async def waiting(client):
        first, second = (asyncio.ensure_future(client.pread(COUNT, offset)) for offset in range(2))
        with pytest.raises(nbdcore.CommandError) as refused:
            await first
        outcomes.append(refused.value.errno)
        with pytest.raises(nbdcore.Disconnected, match="the server is shutting down"):
            await client.pread(COUNT, 2)
        known.set()
        outcomes.append(await second)
        await client.close()

    async def run(uri):
        await asyncio.wait_for(waiting(await connected(front_end, uri)), PATIENCE)

    with played(*script(both, goodbye, flags=1)) as uri:
        if front_end.startswith("Async"):
            asyncio.run(run(uri))
        else:
            with connected(front_end, uri) as client:
                blocking(client)
    # Of two threads either may be the first.
    assert sorted(outcomes, key=str) == sorted([errno.ESHUTDOWN, bytes(COUNT)], key=str)


@every_front_end
def test_loop_over_many_ends_with_the_shutdown(front_end):
    results = []

    async def loop(uri):
        client = await connected(front_end, uri)
        try:
            await collect(client.pread_many(RANGES, depth=4), results)
        finally:
            await client.close()

    steps = [answer(data(bytes(COUNT))) for _ in range(6)]

    def refuse_the_rest(connection):
        while (request := connection.receive_request()).kind != CommandType.DISC:
            connection.send(SHUTDOWN(request))
        connection.expect_end()

    def run(uri):
        if front_end.startswith("Async"):
            asyncio.run(asyncio.wait_for(loop(uri), PATIENCE))
            return
        with connected(front_end, uri) as client:
            results.extend(client.pread_many(RANGES, depth=4))

    with played(*script(*steps, refuse_the_rest, flags=1)) as uri, pytest.raises(nbdcore.CommandError) as refused:
        run(uri)
    assert refused.value.errno == errno.ESHUTDOWN
    assert len(results) == 6


def test_pool_goes_on_with_the_connections_that_are_left():
    """The first connection, which is closing, waits for one answer. It has the fewest requests, and gets none of the new ones.

    Tasks alone, since threads would begin in any order; both pools choose connections in the same way.
    """
    release = threading.Event()
    offer = {"flags": 1 | nbdcore.TransmissionFlag.CAN_MULTI_CONN}

    def closing(connection):
        first, second = connection.receive_request(), connection.receive_request()
        connection.send(SHUTDOWN(first))
        wait_for(release)(connection)
        connection.send(data(bytes(COUNT))(second))

    async def run(uri):
        async with await aio.create_pool(uri, connections=2, timeout=PATIENCE) as pool:
            early = [asyncio.ensure_future(pool.pread(COUNT, 0)) for _ in range(4)]
            with pytest.raises(nbdcore.CommandError):
                await early[0]
            late = await asyncio.gather(*(pool.pread(COUNT, offset) for offset in range(8)))
            release.set()
            return [*await asyncio.gather(*early[1:]), *late]

    two = [script(closing, goodbye, **offer), script(serve(data(bytes(COUNT))), **offer)]
    with ScriptedServer(*two, patience=PATIENCE) as server:
        uri = f"nbd://127.0.0.1:{server.listen_tcp()}"
        assert asyncio.run(asyncio.wait_for(run(uri), PATIENCE)) == [bytes(COUNT)] * 11


def test_call_that_chose_a_connection_just_before_its_server_shut_down_goes_to_another():
    """The call has chosen the connection and waits for its lock, whose holder takes in that the server shuts down."""
    release = threading.Event()
    offer = {"flags": 1 | nbdcore.TransmissionFlag.CAN_MULTI_CONN}

    def closing(connection):
        first, second = connection.receive_request(), connection.receive_request()
        connection.send(SHUTDOWN(first))
        wait_for(release)(connection)
        connection.send(data(bytes(COUNT))(second))

    two = [script(closing, goodbye, **offer), script(serve(data(bytes(COUNT))), **offer)]
    with ScriptedServer(*two, patience=PATIENCE) as server:
        uri = f"nbd://127.0.0.1:{server.listen_tcp()}"
        with nbdcore.create_pool(uri, connections=2, timeout=PATIENCE) as pool:
            first = pool._shared._connections[0]
            engine = first.engine
            two_reads = [commands.read(engine.limits, COUNT, 0) for _ in range(2)]
            pool._shared._looked = (
                time.monotonic() + PATIENCE
            )  # the call need not look at unwatched connections, for which it waits
            first._lock.acquire()  # before the call begins
            with in_background(lambda: pool.pread(COUNT, 0)) as outcome:
                while not first.assigned:
                    time.sleep(0.001)
                engine.submit_all(two_reads)
                while not engine.shutting_down:
                    first._session.advance()
                first._lock.release()
            release.set()
            assert outcome == [bytes(COUNT)]


@every_kind
def test_handshake_with_a_server_that_shuts_down_ends_with_a_goodbye(front_end):
    refusing = option_reply(Option.EXTENDED_HEADERS, OptionReply.ERR_SHUTDOWN, b"back at noon")
    steps = [greeting(), lambda connection: connection.receive(4), expect_option(Option.EXTENDED_HEADERS), refusing]
    failures = (nbdcore.NegotiationError, HandleError)

    def run(uri):
        with reader(front_end, uri) as pread:
            pread(0)

    with played(*steps, expect_option(Option.ABORT)) as uri, pytest.raises(failures, match="back at noon") as refused:
        run(uri)
    if front_end == "NBD":
        assert refused.value.errnum == errno.ESHUTDOWN
    else:
        assert refused.value.reply == OptionReply.ERR_SHUTDOWN
