"""The check that a session leaves nothing behind (tests/leaks.py) finds what is left, and names it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import leaks

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="leaks are looked for in Linux's /proc")

WAITS = "import sys; print(flush=True); sys.stdin.read()"
LEAVES_AN_ORPHAN = f"""
import subprocess, sys
orphan = subprocess.Popen([sys.executable, "-c", {WAITS!r}], stdout=subprocess.PIPE)
orphan.stdout.readline()
"""


@linux_only
def test_a_child_process_is_named():
    with subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert WAITS in leaks.children()[child.pid]
        child.stdin.close()


@linux_only
def test_an_orphan_is_named_until_it_ends(eventually):
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb"), os.fdopen(reading, "rb") as ends_when_closed:
        subprocess.run([sys.executable, "-W", "ignore", "-c", LEAVES_AN_ORPHAN], stdin=ends_when_closed, check=True, timeout=20)
        assert any(WAITS in line for line in leaks.children().values())
    eventually(lambda: not any(WAITS in line for line in leaks.children().values()), "the orphan ended, and was reaped")


@linux_only
def test_an_open_descriptor_is_named():
    before = leaks.open_descriptors()
    with Path(__file__).open("rb") as left_open:
        more = set(leaks.open_descriptors().items()) - set(before.items())
        assert [(number, __file__ in destination) for number, destination in more] == [(left_open.fileno(), True)]
    assert leaks.open_descriptors() == before


@linux_only
def test_a_listening_socket_is_named_and_a_dead_one_is_not(socket_path: Path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        assert leaks.listening_sockets([socket_path.parent]) == []
        listener.listen()
        assert leaks.listening_sockets([socket_path.parent]) == [socket_path]
    assert leaks.listening_sockets([socket_path.parent]) == []


def test_what_settles_in_time_is_no_leak():
    findings = iter([{1: "ending"}, {1: "ending"}, {}])
    assert leaks.settled(lambda: next(findings)) == {}


def test_what_does_not_settle_is_a_leak():
    assert leaks.settled(lambda: {1: "stays"}, seconds=0) == {1: "stays"}


@linux_only
def test_a_block_after_which_a_descriptor_is_open_fails():
    said = f"descriptors left open: .*{Path(__file__).name}"
    with contextlib.ExitStack() as later, pytest.raises(AssertionError, match=said), leaks.none_left_open(seconds=0):
        later.enter_context(Path(__file__).open("rb"))


def test_a_block_after_which_a_thread_runs_fails():
    event = threading.Event()
    thread = threading.Thread(target=event.wait, args=(10,), name="a thread that waits")
    with pytest.raises(AssertionError, match=r"threads left running: .*a thread that waits"), leaks.none_left_open(seconds=0):
        thread.start()
    event.set()
    thread.join()
    assert not thread.is_alive()


def test_a_block_after_which_all_is_as_before_passes():
    with leaks.none_left_open():
        thread = threading.Thread(target=Path(__file__).read_bytes)
        thread.start()
