"""Several processes on one disk: every range once, in order or not, and nothing left behind however it ends."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import zlib
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

import nbdcore
from nbdcore.disk import WorkerLost, map_ranges
from nbdcore.errors import UsageError
from nbdcore.server import ExportSettings, MemoryDisk, Server
from tests.disk import functions
from tests.leaks import is_running, none_left_open, settled, workers_of

PATIENCE = 30.0
SIZE = 1 << 20
BLOCK = 4096
CONTENTS = random.Random(1).randbytes(SIZE)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the tests look into /dev/shm, and send signals")


def shared_memory():
    return set(Path("/dev/shm").glob("nbdcore-*"))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    gc.collect()
    memory = shared_memory()
    with none_left_open():
        yield
        # Tests that run beside these have some for a moment.
        settled(lambda: [*multiprocessing.active_children(), *(shared_memory() - memory)], seconds=PATIENCE)
        assert not multiprocessing.active_children()
        assert shared_memory() <= memory
        # Python's own process that outlives all workers: it would go at the program's end.
        resource_tracker._resource_tracker._stop()


@pytest.fixture
def uri(socket_path):
    disk = MemoryDisk(SIZE)
    disk.pwrite(CONTENTS, 0)
    with Server({"disk": ExportSettings(disk), "other": ExportSettings(MemoryDisk(BLOCK))}) as server:
        yield server.listen("unix", path=str(socket_path)).address.uri("disk")


def blocks():
    return [(offset, BLOCK) for offset in range(0, SIZE, BLOCK)]


def crc(offset, count):
    return zlib.crc32(CONTENTS[offset : offset + count])


@pytest.mark.parametrize("workers", [1, 3])
def test_outcomes_come_in_order(uri, workers):
    outcomes = list(map_ranges(uri, functions.checksum, blocks(), workers=workers, timeout=PATIENCE))
    assert [(one.offset, one.count, one.value) for one in outcomes] == [(*block, crc(*block)) for block in blocks()]


def test_outcomes_come_as_they_are_ready(uri):
    first, *_ = rest = list(map_ranges(uri, functions.waits_for_others, blocks(), workers=2, ordered=False, timeout=PATIENCE))
    assert first.offset != 0
    assert sorted(one.offset for one in rest) == [offset for offset, _ in blocks()]


def test_one_slow_range_does_not_hold_the_others_up(uri):
    outcomes = list(map_ranges(uri, functions.waits_for_others, blocks()[:20], workers=2, timeout=PATIENCE))
    assert [one.offset for one in outcomes] == [offset for offset, _ in blocks()[:20]]
    assert sum(one.value != outcomes[0].value for one in outcomes) >= 8


def test_the_whole_disk_is_the_default(uri):
    (only,) = map_ranges(uri, functions.checksum, workers=2, timeout=PATIENCE)
    assert (only.offset, only.count, only.value) == (0, SIZE, crc(0, SIZE))


def test_as_many_workers_as_processors_is_the_default(uri):
    processes = {one.value for one in map_ranges(uri, functions.process, blocks(), timeout=PATIENCE)}
    assert 1 <= len(processes) <= len(os.sched_getaffinity(0))
    assert os.getpid() not in processes


def test_payloads_come_back_in_shared_memory(uri):
    seen = 0
    for one in map_ranges(uri, functions.read_into, blocks(), workers=2, room=2 * BLOCK, timeout=PATIENCE):
        assert one.memory[: one.value] == CONTENTS[one.offset : one.offset + one.count]
        seen += one.count
    assert seen == SIZE


def test_view_that_is_kept_outlives_the_workers(uri):
    outcomes = map_ranges(uri, functions.read_into, blocks(), workers=1, room=BLOCK, timeout=PATIENCE)
    kept = memoryview(next(outcomes).memory)
    outcomes.close()
    assert len(bytes(kept)) == BLOCK


def test_each_process_may_have_several_connections(uri):
    (only,) = map_ranges(uri, functions.connections, blocks()[:1], workers=1, connections=3, timeout=PATIENCE)
    assert only.value == 3


def test_ranges_are_consumed_no_faster_than_they_are_worked_on(uri):
    taken = []
    endless = (taken.append(number) or (0, BLOCK) for number in itertools.count())
    outcomes = map_ranges(uri, functions.checksum, endless, workers=1, timeout=PATIENCE)
    for _ in range(10):
        next(outcomes)
    outcomes.close()
    assert len(taken) < 100


def test_what_the_function_raises_is_raised_here_with_its_traceback(uri):
    with pytest.raises(ValueError, match="not this one") as caught:
        list(map_ranges(uri, functions.fails_in_the_middle, blocks(), workers=2, timeout=PATIENCE))
    assert "fails_in_the_middle" in caught.value.__notes__[0]


def test_exception_that_cannot_be_sent_is_told_as_text(uri):
    with pytest.raises(WorkerLost, match="one and other"):
        list(map_ranges(uri, functions.raises_what_cannot_be_sent, blocks()[:2], workers=1, timeout=PATIENCE))


def test_result_that_cannot_be_sent_is_a_usage_error_that_names_its_range(uri):
    with pytest.raises(UsageError, match="returned for 4096 bytes at offset 0 must be picklable"):
        list(map_ranges(uri, functions.returns_what_cannot_be_sent, blocks()[:2], workers=1, timeout=PATIENCE))


def test_server_that_ends_in_the_middle_is_told_with_the_range(uri):
    with pytest.raises(
        nbdcore.Disconnected, match="closed the connection, in the middle of working on 4096 bytes at offset 4096 of"
    ):
        list(map_ranges(uri, functions.loses_the_connection, blocks()[1:2], workers=1, timeout=PATIENCE))


def test_worker_that_is_killed_is_an_error_that_names_its_range(uri):
    with pytest.raises(WorkerLost, match="4096 bytes at offset 4096 was killed by signal 9") as caught:
        list(map_ranges(uri, functions.is_killed_in_the_middle, blocks()[:20], workers=2, timeout=PATIENCE))
    assert (caught.value.offset, caught.value.count, caught.value.status) == (BLOCK, BLOCK, -signal.SIGKILL)


def test_leaving_the_loop_ends_workers_that_are_busy(uri):
    outcomes = map_ranges(uri, functions.waits_for_others, blocks(), workers=2, ordered=False, timeout=PATIENCE)
    next(outcomes)
    outcomes.close()


def test_disk_that_cannot_be_reached_is_the_clients_own_error(tmp_path):
    with pytest.raises(nbdcore.TransportError):
        list(map_ranges(f"nbd+unix:///?socket={tmp_path}/none", functions.checksum, blocks(), workers=2))


def test_ranges_that_raise_end_the_workers(uri):
    def broken():
        yield (0, BLOCK)
        raise KeyError("the program's own")

    with pytest.raises(KeyError, match="the program's own"):
        list(map_ranges(uri, functions.checksum, broken(), workers=2, timeout=PATIENCE))


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"connections": 0}, {"room": -1}])
def test_wrong_arguments_start_nothing(uri, wrong):
    with pytest.raises(nbdcore.UsageError):
        map_ranges(uri, functions.checksum, **wrong)


def test_function_that_no_other_process_can_have_is_told_at_once(uri):
    with pytest.raises(nbdcore.UsageError, match="picklable"):
        map_ranges(uri, lambda *_: None)


# Where the tests run in the background of a shell, all that they start ignores Ctrl-C, and Python leaves that as it is.
PROGRAM = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from nbdcore.disk import map_ranges
from tests.disk import functions
from tests.leaks import is_running, none_left_open, settled, workers_of
if __name__ == "__main__":
    threading.Timer(3, lambda: print("begun", flush=True)).start()
    list(map_ranges(sys.argv[1], functions.never_ends, [(0, 4096)] * 9, workers=2))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_program_that_is_interrupted_or_killed_takes_its_workers_along(uri, tmp_path, number):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(functions.__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "transports"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, program, uri],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        workers = workers_of(process.pid)
        assert len(workers) == 2
        os.kill(process.pid, number)
        process.communicate(timeout=PATIENCE)
    assert not settled(lambda: [pid for pid in workers if is_running(pid)], seconds=PATIENCE)
