"""Every call against a server that dies in the middle of it: one clear error, the right phase, no hang, nothing left open."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from nbdcore import CommandError, Disconnected, Error, Phase, ProtocolViolation, TransportError, aio
from nbdcore.aio import AsyncClient
from nbdcore.protocol import wire
from nbdcore.protocol.constants import EXTENDED_REPLY_MAGIC, Chunk
from nbdcore.testing.scripted import (
    Request,
    ScriptedServer,
    answer,
    chunk,
    data,
    drain,
    error,
    first,
    half_close,
    hang_up,
    reset,
)
from tests.aio.talking import CALLS, DISK, PATIENCE, everything, held, talk, until
from tests.clients.talking import HANDSHAKES, OPTION_CALLS, OPTION_MODE, ready_for_options, script

FORMS = {"simple": {"structured": False}, "structured": {}, "extended": {"extended": True}}
#: Without structured replies there is no block status.
CALLS_AND_FORMS = [(name, form) for name, call in CALLS.items() for form in FORMS if form != "simple" or call.simple]
OVER = (Phase.CLOSED, Phase.DEAD)


async def must_fail(client, call, expected: type[Error] = Disconnected) -> Error:
    """Make the call; it must end the connection, with this one error."""
    with pytest.raises(expected) as caught:
        await call(client, timeout=PATIENCE)
    assert client.phase in OVER
    with pytest.raises(Disconnected, match="it ended with"):
        await client.pread(1, 0)
    return caught.value


@pytest.mark.parametrize(("name", "form"), CALLS_AND_FORMS)
@pytest.mark.parametrize("how", ["hangs up", "resets"])
def test_server_that_goes_at_any_byte_of_a_reply_ends_the_call(run, name, form, how):
    reply = CALLS[name].simple if form == "simple" else CALLS[name].chunks
    whole = len(reply(Request(0, 0, 1, 0, 8, extended=form == "extended")))
    ends = (reset,) if how == "resets" else ()
    scripts = [script(answer(first(count, reply)), *ends, **FORMS[form]) for count in range(whole)]

    async def main():
        with ScriptedServer(*scripts, patience=PATIENCE) as server:
            port = server.listen_tcp()
            for count in range(whole):
                client = await aio.connect_tcp("127.0.0.1", port, timeout=PATIENCE)
                await must_fail(client, CALLS[name].make)
                assert client.phase is (Phase.CLOSED if not count and not ends else Phase.DEAD), count

    run(main())


@pytest.mark.parametrize("name", CALLS)
def test_server_that_dies_after_an_error_chunk_is_no_success(run, name):
    async def main():
        async with talk(answer(error(5, "disk on fire", done=False))) as (client, _):
            assert (await must_fail(client, CALLS[name].make, CommandError)).errno == errno.EIO

    run(main())


def test_server_that_dies_in_a_large_payload_ends_the_read(run):
    async def main():
        async with talk(answer(first(300_000, data(bytes(600_000)))), size=DISK) as (client, _):
            buffer = bytearray(600_000)
            exc = await must_fail(client, lambda c, **o: c.pread_into(buffer, 0, **o))
            assert "in the middle of a reply" in str(exc)
            assert not held(buffer)

    run(main())


def test_server_that_dies_while_it_should_receive_ends_the_write(run):
    async def main():
        async with talk(lambda connection: connection.receive(wire.REQUEST.size + 1000), size=64 << 20) as (client, _):
            await must_fail(client, lambda c, **o: c.pwrite(bytes(16 << 20), 0, **o))

    run(main())


@pytest.mark.parametrize("call", ["pread", "pwrite", "zero", "cache"])
def test_server_that_dies_between_the_pieces_of_a_split_call_ends_it(run, call):
    def one_piece(request: Request) -> bytes:
        return (chunk(Chunk.NONE) if request.kind else data(bytes(request.count)))(request)

    async def main():
        async with talk(answer(one_piece), answer(one_piece), block_size=(1, 4096, 1 << 16)) as (client, connection):
            what = bytes(DISK) if call == "pwrite" else DISK
            await must_fail(client, lambda c, **o: getattr(c, call)(what, 0, **o))
            assert [request.count for request in connection.requests] == [1 << 16] * 2

    run(main())


def test_server_that_dies_between_the_replies_of_a_walk_ends_it(run):
    async def main():
        async with talk(answer(CALLS["extents"].chunks)) as (client, _):
            await must_fail(client, lambda c, **o: everything(c.extents(**o)))

    run(main())


def test_server_that_talks_nonsense_ends_every_task_with_an_error_of_its_own(run):
    async def main():
        async with talk(answer(b"nonsense" * 4)) as (client, _):
            results = await asyncio.gather(*(client.pread(8, 8 * n) for n in range(8)), return_exceptions=True)
            assert {type(result) for result in results} == {ProtocolViolation}
            assert len({id(result) for result in results}) == 8
            assert client.phase is Phase.DEAD

    run(main())


def test_server_that_answers_with_extended_headers_unasked_kills_the_connection(run):
    reply = wire.EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, 1, 0, 1, 0, 0)

    async def main():
        async with talk(answer(reply)) as (client, _):
            await must_fail(client, CALLS["flush"].make, ProtocolViolation)

    run(main())


@pytest.mark.parametrize("how", ["hangs up", "resets"])
@pytest.mark.parametrize("name", CALLS)
def test_server_that_died_before_the_request_ends_the_call(run, name, how):
    async def main():
        with ScriptedServer(script(reset if how == "resets" else hang_up), patience=PATIENCE) as server:
            client = await aio.connect_tcp("127.0.0.1", server.listen_tcp(), timeout=PATIENCE)
        # The server is gone, and the loop had no turn in which it could have been noticed.
        await must_fail(client, CALLS[name].make)
        await client.close()

    run(main())


def test_server_that_dies_while_nobody_asks_anything_ends_the_next_call(run):
    async def main():
        async with talk(hang_up) as (client, _):
            await until(lambda: client.phase in OVER, "the loop notices")
            await must_fail(client, CALLS["pread"].make)

    run(main())


# ---------------------------------------------------------------------------------------------- the handshake


def test_nobody_listens(run):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(TransportError, match="nothing listens there"):
            await aio.connect_tcp("127.0.0.1", port, timeout=PATIENCE)

    run(main())


def test_a_server_that_is_no_nbd_server_is_told_apart(run):
    async def main():
        with ScriptedServer([b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", drain], patience=PATIENCE) as server:
            client = AsyncClient()
            with pytest.raises(ProtocolViolation, match="this is no NBD server"):
                await client.connect_stream(server.stream(), timeout=PATIENCE)
            assert client.phase is Phase.DEAD

    run(main())


@pytest.mark.parametrize("style", HANDSHAKES)
def test_the_handshake_as_a_whole_works(run, style):
    async def main():
        with ScriptedServer([HANDSHAKES[style], drain], patience=PATIENCE) as server:
            client = await aio.connect_stream(server.stream(), timeout=PATIENCE)
            assert client.size == DISK
            await client.close()

    run(main())


@pytest.mark.parametrize("style", HANDSHAKES)
def test_server_that_goes_at_any_byte_of_the_handshake_kills_the_connection(run, style):
    whole = HANDSHAKES[style]
    scripts = [[whole[:count], half_close, drain] for count in range(len(whole))]
    resets = [[whole[:count], reset] for count in range(0, len(whole), 7)]

    async def main():
        with ScriptedServer(*scripts, patience=PATIENCE) as server:
            for count in range(len(whole)):
                client = AsyncClient()
                with pytest.raises(Disconnected, match="the server closed the connection during the handshake"):
                    await client.connect_stream(server.stream(), timeout=PATIENCE)
                assert client.phase is Phase.DEAD, count
        with ScriptedServer(*resets, patience=PATIENCE) as server:
            port = server.listen_tcp()
            for _ in resets:
                client = AsyncClient()
                # The reset may overtake the end of connecting itself.
                with pytest.raises((Disconnected, TransportError)):
                    await client.connect_tcp("127.0.0.1", port, timeout=PATIENCE)
                assert client.phase is Phase.DEAD

    run(main())


@pytest.mark.parametrize("name", OPTION_CALLS)
def test_server_that_hangs_up_at_any_byte_of_an_option_reply_kills_the_connection(run, name):
    make, reply = OPTION_CALLS[name]
    scripts = [[ready_for_options, lambda c, n=n: (c.receive_option(), c.send(reply[:n]))] for n in range(len(reply))]

    async def main():
        with ScriptedServer(*scripts, patience=PATIENCE) as server:
            for count in range(len(reply)):
                options = {"start_tls": lambda stream: stream, **OPTION_MODE}
                client = await aio.connect_stream(server.stream(), timeout=PATIENCE, **options)
                with pytest.raises(Disconnected, match="the server closed the connection during the handshake"):
                    await make(client, timeout=PATIENCE)
                assert client.phase is Phase.DEAD, count

    run(main())


def test_a_server_that_hangs_up_while_nobody_asks_anything_in_opt_mode_is_noticed_by_the_next_call(run):
    async def main():
        with ScriptedServer([ready_for_options], patience=PATIENCE) as server:
            client = await aio.connect_stream(server.stream(), timeout=PATIENCE, **OPTION_MODE)
            await asyncio.sleep(0.05)  # the loop does not spin on a descriptor that it has no use for
            assert client.phase is Phase.NEGOTIATING
            with pytest.raises(Disconnected):
                await client.opt_list(timeout=PATIENCE)
            assert client.phase is Phase.DEAD

    run(main())
