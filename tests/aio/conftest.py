"""Each test of the asyncio client runs on the stock loop and on uvloop, leaves nothing, and has nothing to complain about."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import zlib
from asyncio import constants
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from nbdcore.plugins.registry import registry
from tests import leaks
from tests.aio.talking import PATIENCE

LOOPS = ["asyncio"] if sys.platform == "win32" else ["asyncio", "uvloop"]


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.SelectorEventLoop


# Debug mode notes where each callback was made, ten frames deep, which takes longer than most tests. One frame names the place.
constants.DEBUG_STACK_DEPTH = 1

# libuv opens a pipe with its first loop that stays as long as the process: before any test counts descriptors.
for each in LOOPS:
    loop_factory(each)().close()


@pytest.fixture(params=LOOPS)
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """Makes an event loop of one kind."""
    return loop_factory(request.param)


# Debug mode takes as long as all else, and what it finds does not depend on the parameters. A quarter of the sets run in it,
# chosen by name: of every test with a few of them some do.
_IN_DEBUG_MODE = 4


@pytest.fixture
def run(new_loop, request) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine in a loop of its own, with a deadline; what the loop has to complain about fails the test."""
    debug = zlib.crc32(request.node.nodeid.encode()) % _IN_DEBUG_MODE == 0

    def start(main: Coroutine[Any, Any, Any]) -> Any:
        complaints: list[Any] = []

        async def watched() -> Any:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            async with asyncio.timeout(4 * PATIENCE):
                result = await main
            gc.collect()  # a future that nobody asked for its error complains when it goes
            return result

        with asyncio.Runner(debug=debug, loop_factory=new_loop) as runner:
            result = runner.run(watched())
        assert complaints == []
        return result

    return start


@pytest.fixture(autouse=True)
def _nothing_left_open(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    registry.statuses()  # the scan happens once a process, and is no test's own
    with leaks.none_left_open():
        yield
    # A step of the loop that took long is a busy machine's, and is told as a warning.
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
