"""A fork copies a handle into a child: whatever the child does with its copy, it ends, and the parent's connection goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import nbdcore.libnbd as nbd
from nbdcore.streams import connecting
from nbdcore.testing.scripted import Negotiation, ScriptedServer, data, greeting, serve, wait_for
from tests import leaks
from tests.forks import SERVER, busy, needs_fork, status_of_child, stopped_in

pytestmark = needs_fork

PATIENCE = 20
CHILDREN = 10


def drop(handle):
    handle.__del__()


def close(handle):
    handle.close()
    with pytest.raises(nbd.ClosedHandle):
        handle.close()


def read(handle):
    return len(handle.pread(4096, 0))


@pytest.mark.parametrize("leave", [close, drop])
def test_child_that_leaves_its_copy_ends_while_the_parent_is_busy(leave, connected):
    with busy(lambda: read(connected)) as rounds:
        statuses = [status_of_child(lambda: leave(connected)) for _ in range(CHILDREN)]
    assert statuses == [0] * CHILDREN
    assert set(rounds) == {4096}
    assert len(connected.pread(512, 0)) == 512


@pytest.mark.parametrize("leave", [close, drop])
def test_child_that_leaves_its_copy_ends_while_the_parent_waits_for_ever(leave, handles, server):
    handle = handles()
    handle.set_opt_mode(True)
    handle.connect_tcp("127.0.0.1", server)
    taken, release = threading.Event(), threading.Event()

    def hold():
        with handle._lock:
            taken.set()
            release.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(PATIENCE)
    try:
        assert status_of_child(lambda: leave(handle)) == 0
    finally:
        release.set()
        thread.join(PATIENCE)
    handle.opt_go()  # no goodbye was said
    assert len(handle.pread(512, 0)) == 512


@pytest.mark.parametrize("leave", [close, drop])
def test_child_that_leaves_its_copy_completes_nothing(leave, connected):
    near, far = os.pipe()
    connected.aio_pread(nbd.Buffer(512), 0, lambda error: os.write(far, b"%d " % error.value))
    connected.add_close_callback(lambda: os.write(far, b"closing "))
    assert status_of_child(lambda: leave(connected)) == 0
    while connected.aio_in_flight():
        connected.poll(-1)
    os.close(far)
    with os.fdopen(near, "rb") as told:
        assert told.read() == b"0 "


@pytest.mark.parametrize("leave", [close, drop])
@pytest.mark.parametrize("to", ["a server", "a command"])
def test_child_that_leaves_its_copy_frees_the_descriptor(to, leave, handles, server):
    handle = handles()
    if to == "a command":
        handle.connect_command(SERVER)
    else:
        handle.connect_tcp("127.0.0.1", server)
    fd = handle.aio_get_fd()

    def child():
        leave(handle)
        with contextlib.suppress(OSError):
            os.fstat(fd)
            raise AssertionError("the copy's descriptor is still open")

    assert status_of_child(child) == 0


@pytest.mark.parametrize("leave", [close, drop])
def test_child_that_leaves_its_copy_neither_ends_nor_waits_for_the_parents_server(leave, handles):
    handle = handles()
    handle.connect_command(SERVER)
    with busy(lambda: read(handle)):
        assert status_of_child(lambda: leave(handle)) == 0
    os.kill(handle.get_subprocess_pid(), 0)
    assert len(handle.pread(512, 0)) == 512


def test_child_connects_a_handle_that_its_parent_has_made(handles, server):
    handle = handles()

    def child():
        handle.connect_tcp("127.0.0.1", server)
        assert len(handle.pread(512, 0)) == 512
        handle.close()

    assert status_of_child(child) == 0
    assert handle.aio_is_created()


CALLS = {
    "pread": (512, 0),
    "aio_pread": (nbd.Buffer(512), 0),
    "poll": (0,),
    "get_size": (),
    "set_debug": (True,),
    "shutdown": (),
}


@pytest.mark.parametrize("name", CALLS)
def test_child_that_calls_a_handle_busy_in_another_thread_of_its_parent_fails_at_once(name, handles):
    release = threading.Event()
    steps = [greeting(), Negotiation(size=1 << 20), wait_for(release), serve(data(bytes(512)))]
    with ScriptedServer(steps) as server, ThreadPoolExecutor(1) as pool:
        handle = handles()
        handle.connect_socket(server.socket().detach())
        answer = pool.submit(handle.pread, 512, 0)
        end = time.monotonic() + PATIENCE
        while not handle._client.engine.in_flight:
            assert time.monotonic() < end
            time.sleep(0.001)

        def child():
            for _ in range(2):
                with pytest.raises(nbd.Error, match=f"nbd_{name}: .*fork") as caught:
                    getattr(handle, name)(*CALLS[name])
                assert caught.value.errnum == errno.ENOTCONN
            close(handle)

        assert status_of_child(child) == 0
        release.set()
        assert answer.result(PATIENCE) == bytes(512)
        handle.close()


def test_child_uses_the_connection_in_place_of_its_parent(connected):
    assert status_of_child(lambda: connected.pread(512, 0)) == 0


# ---------------------------------------------------------------------------------------------- while another thread connects

LEAVES = {"close": close, "drop": drop, "exit": id}


@pytest.mark.parametrize("leave", LEAVES)
def test_child_that_leaves_a_handle_that_another_thread_connects_ends_and_the_parent_connects_on(leave, handles):
    handle = handles()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(handle.connect_tcp, *map(str, listener.getsockname()))
        accepted, _ = listener.accept()
        with accepted:
            assert [status_of_child(lambda: LEAVES[leave](handle)) for _ in range(CHILDREN)] == [0] * CHILDREN
            assert not outcome.done()
        with pytest.raises(nbd.Error):
            outcome.result(PATIENCE)


@pytest.mark.parametrize("leave", LEAVES)
def test_child_that_leaves_a_handle_in_the_middle_of_a_step_of_another_threads_connect_ends(leave, handles, server):
    handle = handles()
    with stopped_in(connecting.connect_socket, lambda: handle.connect_tcp("127.0.0.1", server)):
        assert status_of_child(lambda: LEAVES[leave](handle)) == 0
    assert len(handle.pread(512, 0)) == 512


@pytest.mark.parametrize("leave", [close, drop])
def test_child_that_leaves_a_handle_for_which_no_server_has_room_yet_frees_the_descriptor(leave, handles):
    handle = handles()
    with socket.socket() as listener, socket.socket() as before:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        before.connect(listener.getsockname())  # which has the only place
        known = leaks.open_descriptors().keys()
        handle.aio_connect_tcp(*map(str, listener.getsockname()))
        opened = leaks.open_descriptors().keys() - known
        assert opened

        def child():
            leave(handle)
            assert not leaks.open_descriptors().keys() & opened

        assert status_of_child(child) == 0
        assert handle.aio_is_connecting()
