"""A pool that many threads use: however they end, no thread, process or descriptor is left, and memory stays small."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import nbdcore
from tests.interop.servers import Server, nbdkit
from tests.leaks import none_left_open

PATIENCE = 30.0
CONNECTIONS = 4
MEBIBYTE = 1 << 20
SIZE = 64 * MEBIBYTE

Ending = Callable[[nbdcore.Pool, Server], None]


def leave(pool: nbdcore.Pool, server: Server) -> None:
    pass


def close(pool: nbdcore.Pool, server: Server) -> None:
    pool.close()


def kill(pool: nbdcore.Pool, server: Server) -> None:
    server.kill()


def read_for_ever(pool: nbdcore.Pool, begun: threading.Barrier, stop: threading.Event) -> None:
    """Loop over many reads, and leave the loop in its middle where nothing has ended it before."""
    begun.wait(PATIENCE)
    ranges = ((offset % SIZE, MEBIBYTE) for offset in range(0, 1 << 50, MEBIBYTE))
    for _ in pool.pread_many(ranges, depth=8, timeout=PATIENCE):
        if stop.is_set():
            return


def read_with_deadlines(pool: nbdcore.Pool, begun: threading.Barrier, stop: threading.Event) -> None:
    """Give up one read after the other."""
    begun.wait(PATIENCE)
    while not stop.is_set():
        with contextlib.suppress(nbdcore.DeadlineExceeded):
            pool.pread(MEBIBYTE, 0, timeout=0.0005)


@pytest.mark.parametrize("work", [read_for_ever, read_with_deadlines])
@pytest.mark.parametrize("end", [leave, close, kill])
def test_threads_that_are_ended_in_the_middle_of_their_reads_leave_nothing(end: Ending, work: Callable[..., None]):
    with nbdkit("memory", str(SIZE)) as server, none_left_open():
        begun, stop = threading.Barrier(CONNECTIONS + 1), threading.Event()
        with (
            ThreadPoolExecutor(CONNECTIONS) as threads,
            nbdcore.create_pool(server.uri, connections=CONNECTIONS, allow_local_files=True, timeout=PATIENCE) as pool,
        ):
            assert pool.connections == CONNECTIONS
            calls = [threads.submit(work, pool, begun, stop) for _ in range(CONNECTIONS)]
            begun.wait(PATIENCE)
            end(pool, server)
            if end is leave:
                stop.set()
            raised = {type(call.exception(PATIENCE)) for call in calls}
        expected = {leave: type(None), close: nbdcore.UsageError, kill: nbdcore.Disconnected}[end]
        assert raised <= {expected, nbdcore.Disconnected}
        assert end is not leave or raised == {type(None)}


INTERRUPTED = """
import signal, sys
import nbdcore
from tests.leaks import none_left_open

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
with none_left_open():
    try:
        with nbdcore.create_pool(sys.argv[1], connections=4, allow_local_files=True, timeout=30) as pool:
            ranges = ((offset % (64 << 20), 1 << 20) for offset in range(0, 1 << 50, 1 << 20))
            for number, _ in enumerate(pool.pread_many(ranges)):
                if number == 100:
                    print("reading", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_ctrl_c_in_a_loop_over_a_pool_leaves_nothing():
    with nbdkit("memory", str(SIZE)) as server:
        program = [sys.executable, "-c", INTERRUPTED, server.uri]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "reading\n"
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=PATIENCE) == ("interrupted\n", "")
            finally:
                process.kill()
        assert process.returncode == 0


PEAK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import nbdcore

def most():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10

before = most()
SHARE = 256 << 20
with nbdcore.create_pool(sys.argv[1], connections=4, allow_local_files=True, timeout=30) as pool:
    def read(begin):
        for offset, data in pool.pread_many((offset, 1 << 20) for offset in range(begin, begin + SHARE, 1 << 20)):
            assert len(data) == 1 << 20
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(0, 4 * SHARE, SHARE), timeout=60))
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory that a process had is told by Linux's /proc")
def test_four_threads_that_read_a_gibibyte_take_no_more_memory_than_their_requests():
    with nbdkit("memory", "1G") as server:
        done = subprocess.run([sys.executable, "-c", PEAK, server.uri], capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr == ""
    assert int(done.stdout) <= 64 * MEBIBYTE
