"""One event, the same outcome, whatever the front end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import socket
import sys
import time

import pytest

import nbdcore
from nbdcore import aio, libnbd
from nbdcore.server import MemoryDisk, Server
from nbdcore.testing.scripted import ScriptedServer, answer, data, drain, error, hang_up, serve
from tests.clients.talking import PATIENCE, script

COUNT = 512
RANGES = [(index * COUNT, COUNT) for index in range(200)]
FRONT_ENDS = ["Client", "Pool", "AsyncClient", "AsyncPool"]
DROP_IN = "nbdcore.libnbd"
every_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


async def collect(loop, results):
    """Keep what comes before an error, too, with a turn of the event loop after each."""
    async for result in loop:
        results.append(result)
        await asyncio.sleep(0)


@pytest.fixture
def uri():
    with Server(MemoryDisk(1 << 20)) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri()


def connected(front_end, uri):
    """Return a connected client; of an asyncio one what is to be awaited for it."""
    library = aio if front_end.startswith("Async") else nbdcore
    return (library.create_pool if front_end.endswith("Pool") else library.connect)(uri, timeout=PATIENCE)


def iterator_alone(front_end, uri, name, *arguments):
    """Return what a loop runs over, with nobody left who knows the client."""
    client = connected(front_end, uri)
    return getattr(client, name)(*arguments)


async def async_iterator_alone(front_end, uri, name, *arguments):
    client = await connected(front_end, uri)
    return getattr(client, name)(*arguments)


@every_front_end
@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("pread_many", RANGES),
        ("pread_into_many", [(offset, bytearray(count)) for offset, count in RANGES]),
        ("pwrite_many", [(offset, bytes(count)) for offset, count in RANGES]),
        ("zero_many", RANGES),
        ("trim_many", RANGES),
    ],
)
def test_loop_goes_on_when_nothing_but_the_loop_holds_the_client(uri, front_end, name, items):
    results = []

    async def loop():
        iterator = await async_iterator_alone(front_end, uri, name, items)
        gc.collect()
        await collect(iterator, results)

    if front_end.startswith("Async"):
        asyncio.run(asyncio.wait_for(loop(), PATIENCE))
    else:
        iterator = iterator_alone(front_end, uri, name, items)
        gc.collect()
        results.extend(iterator)
    assert len(results) == len(RANGES)


@every_front_end
def test_extents_go_on_when_nothing_but_the_loop_holds_the_client(uri, front_end):
    results = []

    async def loop():
        iterator = await async_iterator_alone(front_end, uri, "extents")
        gc.collect()
        await collect(iterator, results)

    if front_end.startswith("Async"):
        asyncio.run(asyncio.wait_for(loop(), PATIENCE))
    else:
        iterator = iterator_alone(front_end, uri, "extents")
        gc.collect()
        results.extend(iterator)
    assert sum(extent.length for extent in results) == 1 << 20


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("front_end", ["Client", "AsyncClient"])
def test_server_that_hangs_up_between_bursts_is_a_lost_connection(front_end, depth):
    results = []

    async def loop(server):
        client = await aio.connect_stream(server.stream(), timeout=PATIENCE)
        iterator = client.pread_many(RANGES, depth=depth)
        try:
            async for result in iterator:
                results.append(result)
                await asyncio.sleep(0.02)  # long enough for the loop to hear that the server is gone
        finally:
            await client.close()

    with ScriptedServer(script(*[answer(data(bytes(COUNT))) for _ in range(4)], hang_up), patience=PATIENCE) as server:
        if front_end == "AsyncClient":
            with pytest.raises(nbdcore.Disconnected):
                asyncio.run(asyncio.wait_for(loop(server), PATIENCE))
        else:
            client = nbdcore.Client(server.stream(), timeout=PATIENCE)
            with pytest.raises(nbdcore.Disconnected):
                results.extend(client.pread_many(RANGES, depth=depth))
            client.close()
    assert len(results) <= 4


# ---------------------------------------------------------------------------------------------- connecting


@pytest.fixture
def silent_first(monkeypatch):
    """A host "two.test" with two addresses, of which the first is silent; yields its port."""
    real = socket.getaddrinfo

    def look_up(host, *arguments, **options):
        if host not in ("two.test", b"two.test"):
            return real(host, *arguments, **options)
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        return real("127.0.0.2", *arguments, **options) + real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with Server(MemoryDisk(1 << 20)) as server, contextlib.ExitStack() as stack:
        port = server.listen("tcp", host="127.0.0.1", port=0).address.port
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.2", port))
        silent.listen(0)
        for _ in range(4):  # they fill its backlog: the kernel drops what else comes
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.2", port))
        yield port


async def size_by_asyncio(front_end, uri):
    async with connected(front_end, uri) as client:
        return client.size


def size_by_drop_in(port):
    handle = libnbd.NBD()
    handle.connect_tcp("two.test", str(port))
    try:
        return handle.get_size()
    finally:
        handle.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog is silent on Linux, where 127.0.0.2 is loopback too")
@pytest.mark.parametrize("front_end", [*FRONT_ENDS, DROP_IN])
def test_host_whose_first_address_is_silent_is_reached_by_its_second(silent_first, front_end):
    uri = f"nbd://two.test:{silent_first}"
    began = time.monotonic()
    if front_end == DROP_IN:
        size = size_by_drop_in(silent_first)
    elif front_end.startswith("Async"):
        size = asyncio.run(size_by_asyncio(front_end, uri))
    else:
        with connected(front_end, uri) as client:
            size = client.size
    assert size == 1 << 20
    assert time.monotonic() - began < PATIENCE


# ---------------------------------------------------------------------------------------------- calls


def outcomes(front_end, uri, calls, **options):
    """Make the calls one after the other on a connected client, and return their results; of loops, lists."""

    async def by_asyncio():
        async with (aio.create_pool if front_end == "AsyncPool" else aio.connect)(uri, timeout=PATIENCE, **options) as client:
            found = []
            for call in calls:
                result = call(client)
                found.append([item async for item in result] if hasattr(result, "__aiter__") else await result)
            return found

    if front_end.startswith("Async"):
        return asyncio.run(asyncio.wait_for(by_asyncio(), 3 * PATIENCE))
    with (nbdcore.create_pool if front_end == "Pool" else nbdcore.connect)(uri, timeout=PATIENCE, **options) as client:
        results = [call(client) for call in calls]
        return [list(result) if hasattr(result, "__next__") else result for result in results]


@every_front_end
def test_requests_for_no_bytes_do_nothing_as_those_of_os_do(uri, front_end):
    calls = [
        lambda client: client.pread(0, 5),
        lambda client: client.pread(0, 1 << 20),  # at the end
        lambda client: client.pread_into(bytearray(), 0),
        lambda client: client.pwrite(b"", 0),
        lambda client: client.zero(0, 0),
        lambda client: client.trim(0, 0),
        lambda client: client.pread_many([(0, 512), (7, 0), (512, 512)]),
        lambda client: client.pwrite_many([(3, b"")]),
        lambda client: client.pread_into_many([(3, bytearray())]),
        lambda client: client.zero_many([(3, 0)]),
    ]
    found = outcomes(front_end, uri, calls)
    assert found[:6] == [b"", b"", 0, None, None, None]
    assert sorted(found[6]) == [(0, bytes(512)), (7, b""), (512, bytes(512))]
    assert found[7:] == [[3], [3], [3]]


@every_front_end
@pytest.mark.parametrize("call", [lambda client: client.pread(0, (1 << 20) + 1), lambda client: client.pwrite(b"", -1)])
def test_requests_for_no_bytes_are_checked_like_others(uri, front_end, call):
    with pytest.raises(nbdcore.UsageError):
        outcomes(front_end, uri, [call])


SILENT = {
    "pread": lambda client, timing: client.pread(512, 0, **timing),
    "pwrite": lambda client, timing: client.pwrite(bytes(512), 0, **timing),
    "flush": lambda client, timing: client.flush(**timing),
    "pread_many": lambda client, timing: client.pread_many([(0, 512)], **timing),
    "extents": lambda client, timing: client.extents(**timing),
    "extent_columns": lambda client, timing: client.extent_columns(**timing),
}


@every_front_end
@pytest.mark.parametrize("name", SILENT)
def test_call_without_a_timeout_of_its_own_has_the_clients(front_end, name):
    with ScriptedServer(script(drain), patience=PATIENCE) as server:
        uri = f"nbd://127.0.0.1:{server.listen_tcp()}"
        with pytest.raises(nbdcore.DeadlineExceeded):
            outcomes(front_end, uri, [lambda client: SILENT[name](client, {})], command_timeout=0.05)


@every_front_end
def test_timeout_of_a_call_goes_before_the_clients(uri, front_end):
    calls = [lambda client: client.pread(512, 0, timeout=PATIENCE), lambda client: client.pread(512, 0, timeout=math.inf)]
    assert outcomes(front_end, uri, calls, command_timeout=0) == [bytes(512)] * 2


@every_front_end
def test_wrong_command_timeout_shows_when_the_client_is_made(front_end):
    kind = getattr(aio if front_end.startswith("Async") else nbdcore, front_end)
    with pytest.raises(nbdcore.UsageError, match="a timeout is a number of seconds"):
        kind(command_timeout="soon")


@every_front_end
def test_client_tells_where_it_is_connected_and_whether_it_still_is(uri, front_end):
    kind = getattr(aio if front_end.startswith("Async") else nbdcore, front_end)
    client = kind()
    assert (client.uri, client.closed) == (None, False)

    async def by_asyncio():
        await client.connect(uri, timeout=PATIENCE)
        connected = client.uri, client.closed, repr(client)
        await client.disconnect(timeout=PATIENCE)
        return connected

    if front_end.startswith("Async"):
        connected = asyncio.run(by_asyncio())
    else:
        client.connect(uri, timeout=PATIENCE)
        connected = client.uri, client.closed, repr(client)
        client.disconnect(timeout=PATIENCE)
    assert connected[:2] == (uri, False)
    assert "export '', 1048576 bytes" in connected[2]
    assert (client.uri, client.closed) == (uri, True)


@every_front_end
def test_split_request_of_which_a_piece_failed_is_not_yielded_when_the_others_succeed(front_end):
    """The first of two pieces fails; both are under way at once."""

    def fails_first(request):
        return error(5, "broken")(request) if request.offset == 0 else data(bytes(request.count))(request)

    settings = {"block_size": (1, 4096, 4096)}
    with ScriptedServer(script(serve(fails_first), **settings), patience=PATIENCE) as server:
        uri = f"nbd://127.0.0.1:{server.listen_tcp()}"
        found = []

        async def by_asyncio():
            async with connected(front_end, uri) as client:
                async for item in client.pread_many([(0, 8192), (8192, 8)]):
                    found.append(item)  # noqa: PERF401 (kept though the loop ends with an error)

        def by_blocking():
            with connected(front_end, uri) as client:
                found.extend(client.pread_many([(0, 8192), (8192, 8)]))

        with pytest.raises(nbdcore.CommandError, match="broken"):
            asyncio.run(by_asyncio()) if front_end.startswith("Async") else by_blocking()
        assert [offset for offset, _ in found] == [8192]
