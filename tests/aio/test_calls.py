"""Every call, against the embedded server and beside the blocking client: the same arguments, the same results and errors."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import nbdcore
from nbdcore import Client, Error, Phase, aio
from nbdcore.aio import AsyncClient
from nbdcore.clients.asyncio.many import Many
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk, Server
from nbdcore.streams.sockets import connected_pair
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.scripted import answer, drain, error, serve
from tests.aio.talking import CALLS, DISK, DONE, PATIENCE, everything, talk, until
from tests.clients.talking import OPTION_CALLS

SIZE = 1 << 20
SMALL_PIECES = BlockSizes(minimum=1, preferred=4096, maximum=1 << 16)


def contents() -> bytes:
    return bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def served(socket_path) -> Iterator[str]:
    """The URI of a server with a disk of known contents; requests for more than 64 KiB must be split."""
    disk = MemoryDisk(SIZE)
    disk.pwrite(contents(), 0)
    with Server({"": ExportSettings(disk, block_sizes=SMALL_PIECES), "other": MemoryDisk(SIZE)}) as server:
        yield server.listen("unix", path=str(socket_path)).address.uri()


# ---------------------------------------------------------------------------------------------- beside the blocking client


def public_calls(kind: type) -> dict[str, Any]:
    return {name: call for name, call in inspect.getmembers(kind, callable) if not name.startswith("_")}


def functions_of(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}


FUNCTIONS = sorted(name for name in functions_of(nbdcore) if name.startswith("connect") or name == "list_exports")


#: Calls that are for a loop: here an asynchronous one.
LOOPS = {name for name in public_calls(Client) if name.endswith("_many")} | {"extents"}


def test_there_is_every_call_of_the_blocking_client_and_no_other():
    assert public_calls(AsyncClient).keys() == public_calls(Client).keys()


def test_there_is_everything_that_is_known_of_a_blocking_client_and_nothing_else():
    def known(kind: type) -> set[str]:
        return {name for name, it in inspect.getmembers(kind) if isinstance(it, property)}

    assert known(AsyncClient) == known(Client)


def test_there_is_every_function_that_makes_a_blocking_client():
    assert {"connect", "connect_tcp", "list_exports"} < set(FUNCTIONS) <= functions_of(aio).keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_the_same_arguments(name):
    ours, theirs = (dict(inspect.signature(getattr(module, name)).parameters) for module in (aio, nbdcore))
    for parameters in (ours, theirs):
        parameters.pop("connections", None)  # several connections at a time are a pool's, which is no client
    assert ours == theirs


@pytest.mark.parametrize("name", public_calls(Client))
def test_a_call_takes_the_same_arguments(name):
    ours, theirs = inspect.signature(public_calls(AsyncClient)[name]), inspect.signature(public_calls(Client)[name])
    assert ours.parameters == theirs.parameters


@pytest.mark.parametrize("name", sorted(public_calls(Client).keys() - LOOPS))
def test_a_call_is_a_coroutine_with_the_same_result(name):
    ours, theirs = public_calls(AsyncClient)[name], public_calls(Client)[name]
    assert inspect.iscoroutinefunction(ours)
    assert inspect.signature(ours).return_annotation == inspect.signature(theirs).return_annotation


@pytest.mark.parametrize("name", sorted(LOOPS - {"extents"}))
def test_a_call_for_a_loop_yields_the_same_asynchronously(name):
    ours, theirs = inspect.signature(public_calls(AsyncClient)[name]), inspect.signature(public_calls(Client)[name])
    assert issubclass(Many, AsyncIterator)
    assert ours.return_annotation == theirs.return_annotation.replace("Iterator", "Many")


#: Everything that can be asked of a connected client without changing the disk's contents for the others.
ASKED: dict[str, Callable[[Any], Any]] = {
    "a read": lambda c: c.pread(100, 17),
    "a read of numbers like integers": lambda c: c.pread(Number(100), Number(17)),
    "a read in pieces": lambda c: c.pread(SIZE, 0),
    "a read in one piece": lambda c: c.pread(1 << 16, 0, df=True),
    "a read past the end": lambda c: c.pread(2, SIZE - 1),
    "a read of nothing": lambda c: c.pread(0, 0),
    "a negative read": lambda c: c.pread(-1, 0),
    "a read of True": lambda c: c.pread(1, True),
    "a read of text": lambda c: c.pread("1", 0),
    "a large read past the end": lambda c: c.pread(SIZE, 1),
    "a read larger than any disk": lambda c: c.pread(1 << 70, 0),
    "a read with a timeout": lambda c: c.pread(8, 0, timeout=PATIENCE),
    "a read with a wrong timeout": lambda c: c.pread(8, 0, timeout=-1),
    "a read in pieces with a wrong timeout": lambda c: c.pread(SIZE, 0, timeout="1"),
    "a read into a buffer": lambda c: c.pread_into(bytearray(300), 5),
    "a read into a buffer in pieces": lambda c: c.pread_into(bytearray(SIZE), 0),
    "a read into what cannot be written": lambda c: c.pread_into(b"read-only", 0),
    "a read into nothing": lambda c: c.pread_into(bytearray(), 0),
    "a read into no buffer": lambda c: c.pread_into(5, 0),
    "a write": lambda c: c.pwrite(contents()[:256], 512),
    "a write in pieces": lambda c: c.pwrite(contents(), 0, fua=True),
    "a write of text": lambda c: c.pwrite("text", 0),
    "a write past the end": lambda c: c.pwrite(b"12", SIZE - 1),
    "a flush": lambda c: c.flush(),
    "a trim": lambda c: c.trim(0, 0),
    "a trim past the end": lambda c: c.trim(2, SIZE - 1),
    "zeroes past the end": lambda c: c.zero(2, SIZE - 1),
    "a cache": lambda c: c.cache(SIZE, 0),
    "a cache of nothing": lambda c: c.cache(0, 0),
    "block status": lambda c: c.block_status(SIZE, 0),
    "block status of one context": lambda c: c.block_status(SIZE, 0, contexts=["base:allocation"], req_one=True),
    "block status of no context": lambda c: c.block_status(SIZE, 0, contexts=[]),
    "block status of an unknown context": lambda c: c.block_status(SIZE, 0, contexts=["a:b"]),
    "block status of text": lambda c: c.block_status(SIZE, 0, contexts="base:allocation"),
    "extents": lambda c: c.extents(),
    "extents of two contexts": lambda c: c.extents("base:allocation", "base:allocation"),
    "extents of a part": lambda c: c.extents(offset=5, count=100),
    "extents past the end": lambda c: c.extents(offset=1, count=SIZE),
    "extents of an unknown context": lambda c: c.extents("a:b"),
    "extents with a wrong timeout": lambda c: c.extents(timeout=-1),
    "exports": lambda c: c.list_exports(timeout=PATIENCE),
    "a second connect": lambda c: c.connect("nbd://localhost"),
    "a second connect over tcp": lambda c: c.connect_tcp(),
    **{f"{name}, outside opt mode": call for name, (call, _) in OPTION_CALLS.items()},
    "opt_abort, outside opt mode": lambda c: c.opt_abort(),
    **{
        name: operator.attrgetter(name)
        for name, it in inspect.getmembers(Client, inspect.isdatadescriptor)
        if isinstance(it, property)
    },
}


class Number:
    def __init__(self, value):
        self._value = value

    def __index__(self):
        return self._value


def outcome(call: Callable[[], Any]) -> Any:
    try:
        result = call()
        return list(result) if isinstance(result, Iterator) else result
    except Error as exc:
        return type(exc), exc.errno, str(exc)


async def outcome_of(call: Callable[[], Any]) -> Any:
    try:
        result = call()
        if isinstance(result, AsyncIterator):
            return await everything(result)
        return await result if inspect.isawaitable(result) else result
    except Error as exc:
        return type(exc), exc.errno, str(exc)


@pytest.mark.parametrize("what", ASKED)
def test_a_question_has_the_answer_that_the_blocking_client_gives(run, served, what):
    async def ask():
        async with aio.connect(served, timeout=PATIENCE) as disk:
            return await outcome_of(lambda: ASKED[what](disk)), disk.phase

    with nbdcore.connect(served, timeout=PATIENCE) as disk:
        assert run(ask()) == (outcome(lambda: ASKED[what](disk)), disk.phase)


#: Wrong on a client that is not connected.
UNCONNECTED = {
    **{name: call.make for name, call in CALLS.items() if name != "extents"},
    "extents": lambda c: c.extents(),
    "list_exports": lambda c: c.list_exports(),
    "size": lambda c: c.size,
    "a wrong URI": lambda c: c.connect("http://localhost"),
    "a URI that is none": lambda c: c.connect(5),
    "an unknown transport": lambda c: c.connect_transport("pigeon"),
    "a URI that runs programs": lambda c: c.connect("nbd+ssh://localhost"),
    "a wrong address": lambda c: c.connect_tcp("", 1),
    "no server": lambda c: c.connect_unix("/nowhere/to/be/found"),
    "no server in time": lambda c: c.connect_unix("/nowhere/to/be/found", wait=0.02),
    "a wrong timeout": lambda c: c.connect_unix("/nowhere/to/be/found", timeout=-1),
    "a wrong wait": lambda c: c.connect_unix("/nowhere/to/be/found", wait=-1),
    "no stream": lambda c: c.connect_stream(5),
    "no socket": lambda c: c.connect_socket("5"),
    "a program that is not there": lambda c: c.connect_command(["/nowhere/to/be/found"]),
    "disconnect": lambda c: c.disconnect(),
    "disconnect with a wrong timeout": lambda c: c.disconnect(timeout=-1),
    "close": lambda c: c.close(),
}


@pytest.mark.parametrize("what", UNCONNECTED)
def test_a_client_that_is_not_connected_says_what_the_blocking_one_says(run, what):
    async def ask():
        client = AsyncClient()
        return await outcome_of(lambda: UNCONNECTED[what](client)), client.phase, re.sub(r"aio\.Async", "", repr(client))

    client = Client()
    expected = outcome(lambda: UNCONNECTED[what](client)), client.phase, repr(client)
    assert run(ask()) == expected


def test_wrong_options_are_refused_before_anything_is_awaited():
    with pytest.raises(nbdcore.UsageError, match="unknown option"):
        aio.connect("nbd://localhost", exprot="x")
    with pytest.raises(nbdcore.UsageError):
        AsyncClient(contexts="one")


# ---------------------------------------------------------------------------------------------- what is written is read


def test_what_is_written_is_read_in_pieces_and_whole(run, served):
    async def main():
        async with aio.connect(served, timeout=PATIENCE) as disk:
            data = bytes(reversed(contents()))
            await disk.pwrite(data, 0)
            assert await disk.pread(SIZE, 0) == data
            buffer = bytearray(SIZE - 3)
            assert await disk.pread_into(buffer, 2) == SIZE - 3
            assert buffer == data[2:-1]
            await disk.zero(SIZE // 2, 100)
            await disk.trim(10, 0)
            await disk.flush()
            assert await disk.pread(SIZE // 2, 100) == bytes(SIZE // 2)
            assert await disk.pread(50, SIZE // 2 + 100) == data[SIZE // 2 + 100 :][:50]

    run(main())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", [{"structured": False}, {}, {"extended": True}], ids=["simple", "structured", "extended"])
def test_a_call_over_a_stream_that_is_as_awkward_as_allowed(run, name, form):
    reply = CALLS[name].simple if "structured" in form else CALLS[name].chunks
    if reply is None:
        form, reply = {}, CALLS[name].chunks  # no block status without structured replies

    async def main():
        over = lambda stream: ChoppyStream(stream, seed=len(name))  # noqa: E731
        async with talk(answer(reply), answer(reply), drain, over=over, **form) as (client, _):
            for _ in range(2):
                await CALLS[name].make(client, timeout=PATIENCE)
            assert client.phase is Phase.CONNECTED

    run(main())


# ---------------------------------------------------------------------------------------------- connecting and leaving


def test_connect_can_be_awaited_and_entered(run, served):
    async def main():
        disk = await aio.connect(served, timeout=PATIENCE)
        assert disk.phase is Phase.CONNECTED
        await disk.disconnect(timeout=PATIENCE)
        assert disk.phase is Phase.CLOSED
        async with aio.connect(served) as disk:
            assert len(await disk.pread(8, 0)) == 8
        assert disk.phase is Phase.CLOSED
        async with AsyncClient() as disk:
            assert await disk.connect(served) is disk
        assert disk.phase is Phase.CLOSED

    run(main())


def test_a_connect_that_nobody_awaits_does_nothing(served):
    aio.connect(served)


def test_leaving_by_an_exception_says_no_goodbye(run):
    async def main():
        with pytest.raises(KeyError):
            async with talk() as (client, connection), client:
                raise KeyError
        assert client.phase is Phase.CLOSED
        assert connection.requests == []

    run(main())


def test_every_function_connects(run, socket_path):
    async def main():
        with Server(MemoryDisk(SIZE)) as server:
            server.listen("unix", path=str(socket_path))
            port = server.listen("tcp", host="127.0.0.1", port=0).address.port
            near, far = connected_pair()
            near.close()
            far.close()
            for connecting in (
                aio.connect_unix(socket_path, timeout=PATIENCE),
                aio.connect_tcp("127.0.0.1", port, timeout=PATIENCE),
                aio.connect_tcp("localhost", port, keepalive=True, wait=PATIENCE),
                AsyncClient().connect_transport("tcp", host="127.0.0.1", port=port),
            ):
                disk = await connecting
                assert disk.size == SIZE
                assert [export.name for export in await disk.list_exports(timeout=PATIENCE)] == [""]
                await disk.disconnect(timeout=PATIENCE)
            uri = f"nbd://127.0.0.1:{port}"
            assert [export.name for export in await aio.list_exports(uri, timeout=PATIENCE)] == [""]

    run(main())


@pytest.mark.parametrize("name", [name for name in OPTION_CALLS if name != "opt_starttls"])  # it has tests of its own
def test_opt_mode(run, served, name):
    make = OPTION_CALLS[name][0]

    async def main():
        async with aio.connect(served, opt_mode=True, timeout=PATIENCE) as client:
            assert client.phase is Phase.NEGOTIATING
            with pytest.raises(nbdcore.NegotiationError):
                await client.opt_info("nobody's", timeout=PATIENCE)
            await make(client, timeout=PATIENCE)
            if client.phase is Phase.NEGOTIATING:
                await client.opt_go("other", timeout=PATIENCE)
            assert (client.phase, client.size) == (Phase.CONNECTED, SIZE)
        async with aio.connect(served, opt_mode=True, timeout=PATIENCE) as client:
            await client.opt_abort()
            assert client.phase is Phase.CLOSED

    run(main())


def test_requests_after_a_server_hung_up_between_replies_raise_disconnected(run):
    async def main():
        async with talk(answer(DONE)) as (client, _):
            await client.flush()
            await until(lambda: client.phase is Phase.CLOSED, "the end is seen")
            with pytest.raises(nbdcore.Disconnected, match="closed"):
                await client.pread(8, 0)
            assert client.size == DISK

    run(main())


def test_a_refused_command_leaves_no_reference_to_the_buffer(run):
    async def main():
        async with talk(serve(error(5, "disk on fire"))) as (client, _):
            buffer = bytearray(64)
            with pytest.raises(nbdcore.CommandError, match="disk on fire"):
                await client.pread_into(buffer, 0)
            buffer.append(0)
            large = bytearray(SIZE)
            with pytest.raises(nbdcore.CommandError, match="disk on fire"):
                await client.pwrite(large, 0)
            large.append(0)

    run(main())
