"""Memory for data that are read becomes bytes without a copy, unless somebody could still change it."""

from __future__ import annotations

import errno
import gc
import sys
import tracemalloc

import pytest

from nbdcore.errors import DeadlineExceeded, Disconnected
from nbdcore.protocol.constants import ErrorNumber
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.decoder import LARGE
from nbdcore.protocol.transmission.memory import IS_COPIED, new_memory
from tests.protocol.harness import MODES, broken_off, connected, error_chunk, feed, hole_chunk, success

SIZE = 32 << 20


#: what the most memory is that a read may take, as a multiple of its size
MOST = 2.1 if IS_COPIED else 1.1


def peak_of(call):
    """Return the most bytes of memory that a call had at a time, over what there was."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 2, 4096, LARGE])
def test_what_is_written_is_what_is_taken(count):
    memory = new_memory(count)
    assert len(memory.view()) == count
    memory.view()[-1:] = b"x"
    assert memory.take() == bytes(count - 1) + b"x"


@pytest.mark.skipif(IS_COPIED, reason="CPython 3.12.0 and 3.12.1 crash on what it takes")
def test_it_is_taken_without_a_copy():
    def fill():
        memory = new_memory(SIZE)
        memory.view()[:] = memoryview(contents)
        return memory.take()

    contents = b"x" * SIZE
    peak, data = peak_of(fill)
    assert data == contents
    assert peak < MOST * SIZE


def test_it_is_copied_where_somebody_can_still_write():
    memory = new_memory(8)
    view = memory.view()
    part = view[2:4]
    view.release()
    data = memory.take()
    part[:] = b"xx"
    assert data == bytes(8)


def test_memory_ends_without_python_code_in_which_a_ctrl_c_would_be_lost():
    entered = []
    memory = new_memory(LARGE)
    memory.view()[:1] = b"x"
    sys.setprofile(lambda frame, event, _: entered.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del memory
    finally:
        sys.setprofile(None)
    assert not entered


def test_memory_that_is_collected_with_a_view_of_it_goes_without_a_word(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    for _ in range(10):
        memory = new_memory(LARGE)
        view = memory.view()
        circle = [memory, view, view[1:]]
        circle.append(circle)
        del memory, view, circle
        gc.collect()
    assert not said


@pytest.mark.parametrize("mode", MODES)
def test_large_read_takes_no_more_memory_than_its_data(mode):
    client = connected(mode, size=SIZE)
    command = commands.read(client.engine.limits, SIZE, 0)
    client.submit(command)
    answer = memoryview(success(mode, command, b"x" * SIZE))

    def read():
        feed(client.engine, answer)
        return command.result()

    peak, data = peak_of(read)
    assert data == b"x" * SIZE
    assert command.result() is data
    assert peak < MOST * SIZE + (1 << 20)


def test_hole_that_is_the_whole_of_a_read_is_zeroes():
    client = connected(size=SIZE)
    command = commands.read(client.engine.limits, LARGE, 0)
    client.submit(command).hear(hole_chunk("structured", command, 0, LARGE, done=True))
    assert command.result() == bytes(LARGE)


def fails_with_the_connection(client, _):
    client.engine.fail(Disconnected(0, "gone"))


def is_given_up(client, command):
    client.engine.abandon(command, DeadlineExceeded(errno.ETIMEDOUT, "late"))


def is_refused(client, command):
    client.hear(broken_off("structured", command, ErrorNumber.EIO))


@pytest.mark.parametrize("happens", [fails_with_the_connection, is_given_up, is_refused])
def test_read_that_fails_keeps_no_memory(happens):
    client = connected(size=SIZE)
    command = commands.read(client.engine.limits, SIZE, 0)
    client.submit(command)
    half = success("structured", command, bytes(SIZE))[: SIZE // 2]
    if happens is is_refused:
        client.hear(hole_chunk("structured", command, 0, SIZE // 2), error_chunk("structured", command, ErrorNumber.EIO))
    else:
        feed(client.engine, half)
    assert command.memory is not None
    happens(client, command)
    assert command.done
    assert command.memory is None
    assert command.target is None
