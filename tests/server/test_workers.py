"""Several processes as one server: where clients go, what they see of each other, and what is left when it ends."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

import nbdcore
from nbdcore.protocol.constants import CommandType
from nbdcore.server import ExportSettings, FileDisk, MemoryDisk, Server, SharedMemoryDisk
from nbdcore.server.worker import _sigterm
from tests.leaks import is_running, none_left_open, open_descriptors, workers_of
from tests.server.raw import RawClient

PATIENCE = 30.0
MEBIBYTE = 1 << 20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(socket, "AF_UNIX"), reason="other systems have no files in memory, or no unix sockets"
)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    with none_left_open():
        yield
        assert not children()
        resource_tracker._resource_tracker._stop()  # Python's own, which ends with the program


def children():
    """Return the processes that serve for this one."""
    return workers_of(os.getpid())


@contextlib.contextmanager
def serving(disk, socket_path, **options):
    with Server(disk, **options) as server:
        yield server, server.listen("unix", path=str(socket_path)).address.uri()


@contextlib.contextmanager
def connected(uri, count):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(nbdcore.connect(uri, timeout=PATIENCE)) for _ in range(count)]


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def test_one_client_is_served_without_a_further_process(socket_path):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=4) as (_, uri), connected(uri, 1) as (client,):
        client.pwrite(b"hello", 0)
        assert client.pread(5, 0) == b"hello"
        assert not children()


def test_each_of_several_clients_has_a_process_as_long_as_there_are_some(socket_path):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=3) as (_, uri), connected(uri, 6) as clients:
        assert len(children()) == 2
        for number, client in enumerate(clients):
            client.pwrite(bytes([number]) * 4096, number * 4096)
        for client in clients:
            assert client.pread(6 * 4096, 0) == b"".join(bytes([number]) * 4096 for number in range(6))


def test_clients_are_handed_over_by_a_socket_that_waits_whatever_the_program_s_default_timeout(socket_path):
    """A worker that is told of a client before its descriptor has come must wait for that, or mistakes it for the next one's."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(1)
    try:
        with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (server, uri), connected(uri, 2) as clients:
            assert [client.pread(1, 0) for client in clients] == [b"\0"] * 2
            assert [os.get_blocking(worker._clients.fileno()) for worker in server._workers._workers] == [True]
    finally:
        socket.setdefaulttimeout(before)


def test_sigterm_ends_a_process_that_was_told_to_stop_and_is_not_ready():
    """The wait for a busy client may be long. Whoever tells it to end then, as a program's end does, has waited enough."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _sigterm():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_flush_on_one_connection_covers_the_writes_of_all(socket_path, tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(MEBIBYTE))
    with serving(FileDisk(path), socket_path, workers=3) as (_, uri):
        with connected(uri, 3):
            assert len(children()) == 2  # they are there when the pool comes, which waits for two seconds only
        with nbdcore.create_pool(uri, connections=3) as pool:
            assert (pool.connections, pool.can_multi_conn) == (3, True)
            assert len(children()) == 2
            contents = random.Random(3).randbytes(MEBIBYTE)
            for _ in pool.pwrite_many([(at, contents[at : at + 4096]) for at in range(0, MEBIBYTE, 4096)]):
                pass
            pool.flush()
            assert path.read_bytes() == contents


def test_holes_are_seen_by_all(socket_path):
    with (
        serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (_, uri),
        nbdcore.connect(uri, contexts=["base:allocation"]) as one,
        nbdcore.connect(uri, contexts=["base:allocation"]) as other,
    ):
        one.pwrite(bytes([1]) * 65536, 65536)
        assert [(extent.offset, extent.length, extent.flags) for extent in other.extents()] == [
            (0, 65536, 3),
            (65536, 65536, 0),
            (131072, MEBIBYTE - 131072, 3),
        ]
        other.trim(65536, 65536)
        assert [(extent.length, extent.flags) for extent in one.extents()] == [(MEBIBYTE, 3)]


class Partition(FileDisk):
    """The rest of a file from some offset on: more attributes than those of the file, and another size."""

    def __init__(self, path, start):
        super().__init__(path)
        self.start = start
        self.size -= start

    def pread(self, count, offset):
        return super().pread(count, offset + self.start)


def test_subclass_of_a_file_disk_is_the_same_disk_in_every_process(socket_path, tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 4096 + b"b" * MEBIBYTE)
    with serving(Partition(path, 4096), socket_path, workers=2) as (_, uri), connected(uri, 2) as clients:
        assert len(children()) == 1
        assert [client.size for client in clients] == [MEBIBYTE] * 2
        assert [client.pread(512, MEBIBYTE - 512) for client in clients] == [b"b" * 512] * 2


def test_disk_with_an_attribute_that_cannot_be_pickled_is_served_by_the_first_process_alone(socket_path, tmp_path, caplog):
    path = tmp_path / "disk"
    path.write_bytes(bytes(MEBIBYTE))
    disk = FileDisk(path)
    disk.guard = threading.Lock()
    with serving(disk, socket_path, workers=2) as (_, uri), connected(uri, 3) as clients:
        assert [client.pread(4, 0) for client in clients] == [bytes(4)] * 3
        assert not children()
    assert "no further process could be started" in caplog.text
    assert "pickle '_thread.lock' object" in caplog.text


@pytest.mark.parametrize("size", [MEBIBYTE // 2, 2 * MEBIBYTE])
def test_size_of_a_disk_is_the_first_process_s_though_the_file_has_another_by_now(socket_path, tmp_path, size):
    path = tmp_path / "disk"
    path.write_bytes(bytes(MEBIBYTE))
    with serving(FileDisk(path), socket_path, workers=2) as (_, uri):
        os.truncate(path, size)
        with connected(uri, 2) as clients:
            assert len(children()) == 1
            assert [client.size for client in clients] == [MEBIBYTE] * 2


def positions(pid, path):
    """Return where the descriptions stand by which a process has a file open."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that read the folder
            if fd.readlink() == path:
                found.append(int(Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text().split()[1]))
    return found


def test_every_process_has_a_file_description_of_its_own_and_so_hears_of_lost_data(socket_path, tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(MEBIBYTE))
    disk = FileDisk(path)
    with serving(disk, socket_path, workers=2) as (_, uri), connected(uri, 2):
        (process,) = children()
        os.lseek(disk._fd, 4321, os.SEEK_SET)
        assert positions(os.getpid(), path) == [4321]
        assert positions(process, path) == [MEBIBYTE]


def test_disk_whose_file_has_no_name_any_more_is_served_by_every_process(socket_path, tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(MEBIBYTE))
    disk = FileDisk(path)
    path.unlink()
    with serving(disk, socket_path, workers=2) as (_, uri), connected(uri, 2) as (one, other):
        assert len(children()) == 1
        one.pwrite(b"hello", 0)
        assert other.pread(5, 0) == b"hello"


def test_process_that_dies_takes_its_own_clients_along_and_is_replaced(socket_path, caplog):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (_, uri), nbdcore.connect(uri) as stays:
        lost = nbdcore.connect(uri, timeout=PATIENCE)
        lost.pwrite(b"kept", 0)
        (process,) = children()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(nbdcore.Disconnected):
            lost.pread(4, 0)
        until(lambda: "was killed by signal 9, and its 1 clients with it" in caplog.text)
        assert stays.pread(4, 0) == b"kept"
        with nbdcore.connect(uri, timeout=PATIENCE) as another:
            assert another.pread(4, 0) == b"kept"
            assert len(children() - {process}) == 1


def no_more_threads(monkeypatch):
    start = threading.Thread.start

    def fails_for_workers(thread):
        if thread.name == "nbdcore-worker":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails_for_workers)


def no_more_processes(monkeypatch):
    def fails(_):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "_Popen", staticmethod(fails))


@pytest.mark.parametrize("lack", [no_more_threads, no_more_processes])
def test_where_no_further_process_can_be_had_the_first_serves_all_and_says_so(socket_path, caplog, monkeypatch, lack):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=3) as (_, uri):
        lack(monkeypatch)
        with connected(uri, 3) as clients:
            assert [client.pread(4, 0) for client in clients] == [bytes(4)] * 3
            assert not children()
        assert "no further process could be started" in caplog.text


def test_process_that_may_have_no_children_serves_all_clients_itself_and_says_so_once(socket_path, caplog, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "daemon", True)
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=3) as (_, uri), connected(uri, 4) as clients:
        assert [client.pread(4, 0) for client in clients] == [bytes(4)] * 4
        assert not children()
    assert caplog.text.count("no further process can be started") == 1


@contextlib.contextmanager
def only_one_descriptor_more():
    """Let this process have one descriptor beside those that it has."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = open_descriptors()
    free = [number for number in range(3, 4096) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_client_is_handed_over_with_the_last_descriptor(socket_path):
    with (
        serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (_, uri),
        connected(uri, 3),  # so that the process has fewer
        socket.socket(socket.AF_UNIX) as sock,
    ):
        with only_one_descriptor_more():
            sock.connect(str(socket_path))
            client = RawClient(sock)
            client.greet()
            client.go()
        (process,) = children()
        os.kill(process, signal.SIGKILL)
        assert client.hung_up()


def test_process_to_which_a_client_cannot_be_handed_keeps_those_that_it_has_until_the_server_stops(socket_path):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (server, uri), connected(uri, 3) as clients:
        (worker,) = server._workers._workers
        worker._clients.close()  # as the kernel may refuse to take more descriptors on their way
        with connected(uri, 2) as more:
            assert [client.pread(4, 0) for client in clients + more] == [bytes(4)] * 5
            assert len(children()) == 1
            server.stop()
            assert not children()
            for client in clients + more:
                with pytest.raises(nbdcore.Error):
                    client.pread(1, 0)


def test_process_to_which_a_client_could_not_be_handed_is_replaced_when_those_that_it_has_have_left(socket_path, caplog):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (server, uri), connected(uri, 1):
        with connected(uri, 2):
            (process,) = children()
            (worker,) = server._workers._workers
            worker._clients.close()  # as above
            with connected(uri, 1):
                assert children() == {process}
        until(lambda: not worker.alive)
        with connected(uri, 1) as (client,):
            (another,) = children()
            assert another != process
            assert client.pread(4, 0) == bytes(4)
        assert not caplog.records


def test_process_without_descriptors_loses_the_client_for_which_it_has_none_and_no_other(socket_path, caplog):
    resource = pytest.importorskip("resource")
    with (
        serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (_, uri),
        connected(uri, 5) as clients,  # the next one is handed over
        contextlib.ExitStack() as stack,
    ):
        (process,) = children()
        before = resource.prlimit(process, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        stack.callback(resource.prlimit, process, resource.RLIMIT_NOFILE, before)
        with pytest.raises(nbdcore.Error):
            nbdcore.connect(uri, timeout=PATIENCE)
        until(lambda: "was disconnected: its descriptor could not be received" in caplog.text)
        more = stack.enter_context(connected(uri, 3))  # which that process is spared
        assert [client.pread(4, 0) for client in clients + more] == [bytes(4)] * 8
        assert children() == {process}
        resource.prlimit(process, resource.RLIMIT_NOFILE, before)
        clients[1].close()  # the first that was handed over
        until(lambda: serves_another(process, uri, stack))


def serves_another(process, uri, stack):
    """Connect one client more, and return whether it went to that process."""
    had = sockets_of(process)
    stack.enter_context(nbdcore.connect(uri, timeout=PATIENCE))
    return sockets_of(process) > had


def sockets_of(process):
    """Return how many sockets a process has open."""
    return sum(entry.is_socket() for entry in Path(f"/proc/{process}/fd").iterdir())


def test_stopping_answers_what_was_begun_and_leaves_no_process(socket_path):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=3) as (server, uri), connected(uri, 6) as clients:
        assert len(children()) == 2
        server.stop()
        assert not children()
        for client in clients:
            with pytest.raises(nbdcore.Error):
                client.pread(1, 0)


def test_processes_that_do_not_stop_are_all_killed_and_named(socket_path, caplog):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=3) as (server, uri), connected(uri, 3):
        stuck = children()
        assert len(stuck) == 2
        for process in stuck:
            os.kill(process, signal.SIGSTOP)
        server.stop(0.1)
        assert not children()
        for process in stuck:
            assert f"process {process} did not stop in time, and was killed" in caplog.text


def test_limit_of_clients_holds_for_all_processes_together(socket_path):
    with (
        serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2, max_clients=4) as (_, uri),
        connected(uri, 4),
        pytest.raises(nbdcore.Error),
    ):
        nbdcore.connect(uri, timeout=PATIENCE)


def test_clients_that_left_are_counted_no_more(socket_path):
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2, max_clients=2) as (_, uri), nbdcore.connect(uri):
        for _ in range(10):
            until(lambda: reachable(uri))


def reachable(uri):
    try:
        with nbdcore.connect(uri, timeout=PATIENCE) as client:
            return client.size == MEBIBYTE
    except nbdcore.Error:
        return False


def test_log_of_every_process_is_the_servers(socket_path, caplog):
    with (
        serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2) as (_, uri),
        nbdcore.connect(uri),
        socket.socket(socket.AF_UNIX) as stranger,
    ):
        stranger.connect(str(socket_path))
        stranger.sendall(b"\xff\xff\xff\xff" + bytes(64))
        until(lambda: "unknown client flags" in caplog.text)


def test_every_process_encrypts(socket_path, tls, pki):
    trusted = nbdcore.TLS(ca=pki / "ca-cert.pem", hostname="localhost")
    with serving(SharedMemoryDisk(MEBIBYTE), socket_path, workers=2, tls=tls) as (_, uri), contextlib.ExitStack() as stack:
        one, other = [stack.enter_context(nbdcore.connect(uri, tls=trusted, timeout=PATIENCE)) for _ in range(2)]
        assert len(children()) == 1
        one.pwrite(b"secret", 0)
        assert other.pread(6, 0) == b"secret"
        with pytest.raises(nbdcore.Error):
            nbdcore.connect(uri, tls=False, timeout=PATIENCE)


def test_objects_that_other_processes_cannot_have_are_refused():
    with pytest.raises(nbdcore.UsageError, match="MemoryDisk, which only one process can have") as caught:
        Server({"disk": ExportSettings(MemoryDisk(MEBIBYTE))}, workers=2)
    assert caught.value.errno == errno.ENOTSUP
    with pytest.raises(nbdcore.UsageError, match="at least 1"):
        Server(MemoryDisk(MEBIBYTE), workers=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_command_that_ends_takes_its_processes_along(socket_path, number):
    command = [sys.executable, "-m", "nbdcore", "serve", "--memory", "1M", "--unix", str(socket_path), "--workers", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline()
        until(socket_path.exists)
        with connected(f"nbd+unix:///?socket={socket_path}", 3):
            workers = workers_of(process.pid)
            assert len(workers) == 2
            process.send_signal(number)
            process.communicate(timeout=PATIENCE)
    assert process.returncode == (0 if number != signal.SIGKILL else -number)
    until(lambda: not any(is_running(pid) for pid in workers))


def in_transmission(socket_path, stack):
    client = RawClient(socket.socket(socket.AF_UNIX))
    stack.callback(client.close)
    client.sock.connect(str(socket_path))
    client.greet()
    client.go()
    return client


def begin_write(client):
    """Send half a write, which the server has received on return; return the other half."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    request = client.pack(CommandType.WRITE, 0, 1000, payload=bytes(1000))
    client.send(request[:528])
    until(lambda: fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4)) == bytes(4))
    return request[528:]


def test_sigterm_to_the_whole_process_group_interrupts_no_request_of_any_process(socket_path):
    command = [sys.executable, "-m", "nbdcore", "serve", "--memory", "1M", "--unix", str(socket_path), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process, contextlib.ExitStack() as stack:
        assert process.stdout.readline()
        clients = [in_transmission(socket_path, stack) for _ in range(4)]
        assert len(workers_of(process.pid)) == 1
        rests = [begin_write(client) for client in clients[:2]]
        os.killpg(process.pid, signal.SIGTERM)
        assert [client.hung_up() for client in clients[2:]] == [True, True]  # so every process stops
        for client, rest in zip(clients, rests, strict=False):
            client.send(rest)
            assert client.reply().error == 0
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (0, b"")
