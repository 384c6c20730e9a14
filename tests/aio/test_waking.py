"""Whom an answer wakes, and when: what tasks do that were answered together, to each other and to the connection."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections import deque
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from nbdcore import Disconnected, Phase
from nbdcore.clients.asyncio.waiter import Waiter
from nbdcore.testing.scripted import Connection, data, drain, serve
from tests.aio.talking import PATIENCE, late, talk, until


def eager(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    """Make a task that begins to run at once. asyncio's own factory does not take what uvloop passes before Python 3.13.3."""
    return asyncio.Task(coroutine, loop=loop, **{**options, "eager_start": True})


#: None makes the usual tasks. Eager ones, from Python 3.12 on, begin to run before the loop knows them.
TASK_FACTORIES = [None, eager][: 2 if sys.version_info >= (3, 12) else 1]

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name")


def together(count: int):
    """Answer so many reads with one send, each with its own offset over and over."""

    def step(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(count)]
        connection.send(b"".join(data(bytes([request.offset]) * request.count)(request) for request in requests))

    return step


def test_what_tasks_ask_that_were_answered_together_is_sent_together_and_at_once(run):
    turns = []

    async def main():
        async with talk(together(8), together(8), drain) as (client, _):

            async def two_reads(offset: int) -> None:
                await client.pread(4, offset)
                turns.append(client._shared.engine.pending)
                asyncio.get_running_loop().call_soon(lambda: turns.append(len(client._shared.engine.queue)))
                assert await client.pread(4, offset + 8) == bytes([offset + 8]) * 4

            await asyncio.gather(*(two_reads(offset) for offset in range(8)))

    run(main())
    assert turns == [*range(8), *[0] * 8]


def test_each_task_runs_in_its_own_context(run):
    async def main():
        async with talk(together(8), drain) as (client, _):
            seen = []

            async def read(offset: int) -> None:
                NAME.set(f"task {offset}")
                await client.pread(4, offset)
                seen.append((offset, NAME.get(), asyncio.current_task().get_name()))

            names = [f"number {offset}" for offset in range(8)]
            await asyncio.gather(*(asyncio.create_task(read(offset), name=name) for offset, name in enumerate(names)))
            assert seen == [(offset, f"task {offset}", name) for offset, name in enumerate(names)]
            assert NAME.get(None) is None

    run(main())


def test_a_task_may_cancel_another_that_was_answered_with_it(run):
    async def main():
        async with talk(together(2), serve(data(b"good"))) as (client, _):
            buffer = bytearray(4)

            async def first() -> None:
                await client.pread(4, 1)
                second.cancel("not needed")

            one = asyncio.create_task(first())
            second = asyncio.create_task(client.pread_into(buffer, 2))
            with pytest.raises(asyncio.CancelledError, match="not needed"):
                await second
            await one
            buffer.append(0)  # nobody has a view of it
            assert await client.pread(4, 0) == b"good"

    run(main())


def test_a_task_may_close_the_client_under_those_that_were_answered_with_it_and_those_that_were_not(run):
    async def main():
        async with talk(together(3), drain) as (client, _):

            async def closes() -> None:
                await client.pread(4, 0)
                await client.close()

            async def reads_again() -> bytes:
                got = await client.pread(4, 1)
                assert client.phase is Phase.CLOSED
                return got

            async def waits() -> None:
                with pytest.raises(Disconnected, match="closed by this program"):
                    await client.pread(4, 3)

            tasks = asyncio.gather(closes(), reads_again(), client.pread(4, 2), waits())
            assert await tasks == [None, b"\1\1\1\1", b"\2\2\2\2", None]

    run(main())


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_task_that_ends_the_program_keeps_no_other_from_its_answer(new_loop, end):
    got = []

    async def main():
        async with talk(together(4), serve(data(b"good"))) as (client, _):

            async def ends() -> None:
                await client.pread(4, 0)
                raise end

            async def reads(offset: int) -> None:
                got.append(await client.pread(4, offset))
                got.append(await client.pread(4, offset))

            loop = asyncio.get_running_loop()
            tasks = [loop.create_task(ends()), *(loop.create_task(reads(offset)) for offset in range(1, 4))]
            await asyncio.gather(*tasks, return_exceptions=True)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        loop = runner.get_loop()
        work = loop.create_task(main())
        with pytest.raises(end):
            loop.run_until_complete(work)
        loop.run_until_complete(asyncio.wait_for(asyncio.wait([work]), PATIENCE))
        assert work.result() is None
    assert sorted(got) == sorted([b"\1\1\1\1", b"\2\2\2\2", b"\3\3\3\3"] + [b"good"] * 3)


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_says_what_the_canceller_said(run, turns):
    event = threading.Event()

    async def main():
        async with talk(late(event, data(b"good")), serve(data(b"good"))) as (client, _):
            task = asyncio.create_task(client.pread(4, 0))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel("enough")
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert caught.value.args == ("enough",)
            assert task.cancelled()
            event.set()
            assert await client.pread(4, 0) == b"good"

    run(main())


def test_a_task_that_is_cancelled_twice_ends_once(run):
    async def main():
        async with talk(drain) as (client, _):
            task = asyncio.create_task(client.pread(4, 0))
            await asyncio.sleep(0)
            assert task.cancel()
            assert task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_a_task_that_survives_its_cancellation_reads_on(run):
    async def main():
        event = threading.Event()
        async with talk(late(event, data(b"late")), serve(data(b"good"))) as (client, connection):

            async def stubborn() -> bytes:
                try:
                    await client.pread(4, 0)
                except asyncio.CancelledError:
                    event.set()
                return await client.pread(4, 0)

            task = asyncio.create_task(stubborn())
            await until(lambda: connection.requests, "a request has come")
            task.cancel()
            assert await task == b"good"

    run(main())


@pytest.mark.parametrize("factory", TASK_FACTORIES)
def test_tasks_of_every_kind_are_woken(run, factory):
    async def main():
        asyncio.get_running_loop().set_task_factory(factory)
        async with talk(together(8), drain) as (client, _):
            got = await asyncio.gather(*(client.pread(4, offset) for offset in range(8)))
            assert got == [bytes([offset]) * 4 for offset in range(8)]

    run(main())


# ---------------------------------------------------------------------------------------------- the waiter by itself


def wake(waiter: Waiter) -> None:
    Waiter.wake_all(deque([SimpleNamespace(tag=waiter)]))


def test_a_waiter_is_what_asyncio_takes_for_a_future(run):
    async def main():
        assert asyncio.isfuture(Waiter(asyncio.get_running_loop()))

    run(main())


def test_a_waiter_that_was_woken_cannot_be_cancelled_and_is_woken_once(run):
    async def main():
        called = []
        waiter = Waiter(asyncio.get_running_loop())
        wake(waiter)  # before there is a task, nobody is to be called
        waiter.add_done_callback(called.append, context=contextvars.copy_context())
        wake(waiter)
        wake(waiter)
        assert not waiter.cancel()
        assert called == [waiter]
        waiter.result()

    run(main())


def test_a_waiter_that_was_cancelled_is_not_woken_as_well(run):
    async def main():
        called = []
        waiter = Waiter(asyncio.get_running_loop())
        waiter.add_done_callback(called.append, context=contextvars.copy_context())
        assert waiter.cancel()
        assert not waiter.cancel()
        wake(waiter)
        assert called == []
        await asyncio.sleep(0)
        assert called == [waiter]
        with pytest.raises(asyncio.CancelledError):
            waiter.result()

    run(main())
