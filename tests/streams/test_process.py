"""Child processes as streams: what they are given, what they leave, and that nobody else is ever killed in their place."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdcore.errors import Disconnected, TransportError, UsageError
from nbdcore.streams import process as processes
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.process import Child, ProcessStream, run_activated, run_command
from nbdcore.streams.waiting import Deadline, drive, wait
from nbdcore.testing.streams import check_stream
from tests import leaks
from tests.forks import needs_fork, status_of_child

#: Seconds that anything here may take on a busy machine.
PATIENCE = 30.0
#: A program that says back what it is told, until its input ends.
ECHO = "import os\nwhile piece := os.read(0, 65536): os.write(1, piece)"

pytestmark = pytest.mark.timeout(60)


def python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", source, *arguments]


@pytest.fixture(autouse=True)
def _nothing_left(eventually: Callable[..., None]) -> Iterator[None]:
    """Each program that a test started has ended and was reaped, and each descriptor and thread is gone."""
    children, descriptors = leaks.children().keys(), leaks.open_descriptors()
    yield
    eventually(lambda: leaks.children().keys() <= children, "the programs ended, and were reaped", seconds=PATIENCE)
    eventually(lambda: not [it for it in threading.enumerate() if it.name == "nbdcore-command"], "their threads ended")
    assert leaks.settled(lambda: {fd: what for fd, what in leaks.open_descriptors().items() if fd not in descriptors}) == {}


@pytest.fixture
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files; empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    return short_folder


@contextlib.contextmanager
def running(*command: str) -> Iterator[ProcessStream]:
    with contextlib.closing(run_command(command)) as stream:
        yield stream


def activated(*command: str, **options: str) -> ProcessStream:
    return drive(run_activated(command, **options), Deadline.after(PATIENCE), "the program did not take its socket over")


def receive_all(stream: Stream) -> bytes:
    received = bytearray()
    room = bytearray(1 << 16)
    while (count := stream.recv_into(memoryview(room))) != 0:
        if count is None:
            wait(stream.fileno(), Want.READ, Deadline.after(PATIENCE), "the program says nothing")
        else:
            received += room[:count]
    return bytes(received)


def receive_some(stream: Stream) -> bytes:
    room = bytearray(1 << 16)
    while (count := stream.recv_into(memoryview(room))) is None:
        wait(stream.fileno(), Want.READ, Deadline.after(PATIENCE), "the program says nothing")
    return bytes(room[:count])


def failure(stream: Stream) -> Disconnected:
    with pytest.raises(Disconnected) as caught:
        receive_all(stream)
    return caught.value


def ended(child: Child) -> int | None:
    """Return the exit status of a process that was ended and reaped."""
    child.join()
    return child.process.returncode


def tells(expression: str) -> list[str]:
    """Return the command line of a program that says something of itself, as JSON."""
    return python(f"import json, os, socket, stat, sys\nprint(json.dumps({expression}), end='', flush=True)")


# ---------------------------------------------------------------------------------------------- what a program is given


def test_program_is_a_stream_like_any_other():
    """Its other end is of a program of its own: what a pair of streams needs is a relay to a socket that we hold."""
    relay = """
import os, select, socket, sys
near, far = socket.socket(fileno=0), socket.socket(fileno=int(sys.argv[1]))
ways = {near: far, far: near}
while ways:
    for source in select.select(list(ways), [], [])[0]:
        try:
            data = source.recv(1 << 16)
        except OSError:
            sys.exit()
        if data:
            try:
                ways[source].sendall(data)
            except OSError:
                sys.exit()
        else:
            try:
                ways.pop(source).shutdown(socket.SHUT_WR)
            except OSError:
                sys.exit()
"""

    def make_pair() -> tuple[Stream, Stream]:
        ours, theirs = socket.socketpair()
        near, far = socket.socketpair()
        with theirs, far:
            process = subprocess.Popen(
                python(relay, str(theirs.fileno())),
                stdin=far,
                stdout=far,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        return ProcessStream(near, Child(process)), processes.SocketStream(ours)

    check_stream(make_pair)


def test_arguments_arrive_as_they_are_and_no_shell_reads_them(folder):
    words = ["a b", "$HOME", "`touch owned`", "; touch owned", "$(touch owned)", "", "--", "*", "'", '"', "\n", "\udcff", "-c"]
    with running(*tells("sys.argv[1:]"), *words) as stream:
        assert json.loads(receive_all(stream)) == words
    with contextlib.closing(activated(*_telling_through_socket("sys.argv[1:]"), *words)) as stream:
        assert json.loads(receive_all(stream)) == words
    assert list(folder.iterdir()) == []


def test_program_gets_three_descriptors_and_none_of_ours():
    listing = "sorted(map(int, os.listdir('/proc/self/fd')))"
    with socket.socket() as sock:
        os.set_inheritable(sock.fileno(), True)  # as a careless library leaves its own
        with running(*tells(listing)) as stream:
            assert json.loads(receive_all(stream)) == [0, 1, 2, 3]  # the last is the listing's own


def _telling_through_socket(expression: str) -> list[str]:
    """Say something to the first who connects to descriptor 3."""
    source = f"""import json, os, socket, stat, sys
told = {expression}
listener = socket.socket(fileno=3)
listener.accept()[0].sendall(json.dumps(told).encode())"""
    return python(source)


@pytest.fixture
def _default_timeout() -> Iterator[None]:
    """The program has given all sockets that it makes a timeout, and with that made them non-blocking."""
    socket.setdefaulttimeout(PATIENCE)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("_default_timeout")
def test_default_timeout_of_sockets_leaves_what_a_program_is_given_blocking(folder):
    with running(*tells("[os.get_blocking(0), os.get_blocking(1)]")) as stream:
        assert json.loads(receive_all(stream)) == [True, True]
    with contextlib.closing(activated(*_telling_through_socket("os.get_blocking(3)"))) as stream:
        assert json.loads(receive_all(stream)) is True


def test_program_that_takes_a_socket_over_gets_it_as_descriptor_3_and_nothing_else(folder, monkeypatch):
    monkeypatch.setenv("LISTEN_FDS", "7")  # of a service manager that started this very program
    told = """{
        "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("LISTEN_")},
        "itself": str(os.getpid()),
        "input": os.readlink("/proc/self/fd/0"),
        "folder": oct(stat.S_IMODE(os.stat(os.path.dirname(socket.socket(fileno=os.dup(3)).getsockname())).st_mode)),
    }"""
    with contextlib.closing(activated(*_telling_through_socket(told), name="disk")) as stream:
        assert stream.path is not None
        assert Path(stream.path).parent.parent == folder
        said = json.loads(receive_all(stream))
    assert said.pop("environment") == {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "disk", "LISTEN_PID": said.pop("itself")}
    assert said == {"descriptors": [0, 1, 2, 3, 4], "input": "/dev/null", "folder": "0o700"}  # descriptor 4 is the listing's own
    assert list(folder.iterdir()) == []


def test_program_that_is_not_there_is_a_transport_error_and_leaves_nothing():
    with pytest.raises(TransportError) as caught:
        run_command(["/nonexistent/program"])
    assert caught.value.errno == errno.ENOENT
    assert "/nonexistent/program" in str(caught.value)


@pytest.mark.parametrize("start", [run_command, lambda command: drive(run_activated(command), Deadline.after(PATIENCE), "")])
def test_no_thread_for_a_program_is_a_transport_error_and_leaves_nothing(start, folder, monkeypatch):
    def no_more(_):
        raise RuntimeError("can't start new thread")

    before = leaks.children()
    monkeypatch.setattr(threading.Thread, "start", no_more)
    with leaks.none_left_open(), pytest.raises(TransportError, match=r"cannot run .*: can't start new thread") as caught:
        start(["sleep", "100"])
    assert caught.value.errno == errno.EAGAIN
    assert leaks.children().keys() <= before.keys()
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    "start", [lambda: run_command(["cat"]), lambda: drive(run_activated(["sleep", "100"]), Deadline.after(PATIENCE), "")]
)
def test_no_descriptors_for_a_program_is_a_transport_error_and_leaves_nothing(start, folder):
    """The programs end when their stream is closed: at the end of their input, and by the signal that an activated one gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    failed = 0
    before = leaks.children()
    with leaks.none_left_open(), contextlib.ExitStack() as fillers:
        used = 0
        last = max(leaks.open_descriptors())
        while used <= last:  # no gaps among those in use
            used = os.dup(0)
            fillers.callback(os.close, used)
        for room in range(1, 14):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, hard))
            try:
                start().close()
            except TransportError as exc:
                assert exc.errno == errno.EMFILE  # noqa: PT017 (with room for all that it needs it succeeds)
                failed += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert failed > 2
    assert leaks.settled(lambda: leaks.children().keys() - before.keys()) == set()
    assert [*folder.iterdir()] == []


def test_program_that_may_not_be_run_is_a_transport_error(tmp_path):
    with pytest.raises(TransportError) as caught:
        run_command([str(tmp_path)])
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("start", [run_command, lambda command: drive(run_activated(command), Deadline.after(PATIENCE), "")])
def test_no_program_at_all_is_a_usage_error(start):
    with pytest.raises(UsageError, match="missing command name"):
        start([])


@pytest.mark.parametrize("command", [["/nonexistent/program"], ["false"]])
def test_program_that_does_not_take_its_socket_over_leaves_no_folder_and_has_its_say(folder, command):
    with pytest.raises(Disconnected, match="ended with status"), contextlib.closing(activated(*command)) as stream:
        receive_all(stream)
    assert list(folder.iterdir()) == []


def test_socket_that_cannot_be_made_starts_no_program_and_leaves_no_folder(short_folder, monkeypatch):
    deep = short_folder / ("d" * 100)  # a unix socket's path has 108 bytes at most
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(TransportError, match="listen on"):
        activated("touch", str(short_folder / "started"))
    assert list(deep.iterdir()) == []
    assert list(short_folder.iterdir()) == [deep]


# ---------------------------------------------------------------------------------------------- last words


def test_end_of_what_a_failed_program_wrote_to_standard_error_is_kept_and_passed_on(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    source = "import sys; sys.stderr.write('first' + 'x' * 100_000 + 'la\\x1bst\\n'); sys.exit(3)"
    with running(*python(source)) as stream:
        error = failure(stream)
    assert "ended with status 3" in error.message
    assert error.server_text == "x" * (4096 - len("la\x1bst\n")) + "la\x1bst"
    assert "\x1b" not in str(error)
    assert shown.getvalue() == "first" + "x" * 100_000 + "la\x1bst\n"


def test_few_words_of_a_program_that_failed_are_in_the_error_alone(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with running(*python("import sys; sys.exit('no such disk')")) as stream:
        assert "no such disk" in str(failure(stream))
    assert shown.getvalue() == ""


@pytest.mark.parametrize("said", ["", "NBDMAGIC"], ids=["closed before it said anything", "working"])
def test_what_a_program_that_has_not_failed_wrote_to_standard_error_is_passed_on(said, monkeypatch, eventually):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    source = f"import os; os.write(2, b'a notice'); os.write(1, {said.encode()!r}); os.read(0, 1)"
    with running(*python(source)) as stream:
        eventually(lambda: b"a notice" in stream.child._tail, "its notice has come")
        if said:
            assert receive_some(stream) == said.encode()
            assert shown.getvalue() == "a notice"
    assert shown.getvalue() == "a notice"


def test_words_that_are_no_text_are_kept_to_the_byte():
    with running(*python("import os, sys; os.write(2, b'\\xff\\xfe'); sys.exit(1)")) as stream:
        assert failure(stream).server_text == "\udcff\udcfe"


@pytest.mark.parametrize("replaced", [None, io.StringIO()], ids=["none", "closed"])
def test_program_of_ours_without_a_standard_error_hears_of_failures_all_the_same(replaced, monkeypatch):
    if replaced is not None:
        replaced.close()
    monkeypatch.setattr(sys, "stderr", replaced)
    with running(*python("import sys; sys.exit('because')")) as stream:
        assert failure(stream).server_text == "because"


def test_program_that_ended_well_is_an_end_like_any_other():
    with running(*python("import os; os.write(1, b'bye')")) as stream:
        assert receive_all(stream) == b"bye"
        assert receive_all(stream) == b""


def test_program_that_was_killed_is_said_to_be():
    with running(*python("import os; os.kill(os.getpid(), 9)")) as stream:
        assert "was killed by signal 9" in failure(stream).message


def test_program_that_hangs_up_and_lives_on_is_an_end_like_any_other():
    with running(*python("import os, time; os.dup2(2, 0); os.dup2(2, 1); time.sleep(60)")) as stream:
        assert receive_all(stream) == b""
        stream.child.signal(signal.SIGKILL)


def test_sending_to_a_program_that_died_says_why():
    with running(*python("import sys; sys.exit('the disk is on fire')")) as stream:
        stream.child.process.wait(PATIENCE)
        with pytest.raises(Disconnected, match="the disk is on fire"):
            stream.send([memoryview(b"x")])


# ---------------------------------------------------------------------------------------------- the end


def test_closing_ends_a_program_by_the_end_of_its_input_and_reaps_it():
    with running(*python(ECHO)) as stream:
        pass
    assert ended(stream.child) == 0
    assert stream.fileno() == -1


def test_closing_twice_and_from_two_threads_ends_it_once():
    stream = run_command(python(ECHO))
    threads = [threading.Thread(target=stream.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended(stream.child) == 0


def test_closing_ends_a_server_that_waits_for_clients_by_a_signal(folder):
    stream = activated(*_telling_through_socket("'hello'"), "and wait")
    stream.close()
    assert ended(stream.child) in (0, -signal.SIGTERM)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("deaf_to", [(), ("SIGTERM",)])
def test_program_that_does_not_end_by_itself_is_made_to(deaf_to, monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 0.05)
    ignore = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN);" for name in deaf_to)
    source = f"import os, signal, time;{ignore} os.write(1, b'ready'); time.sleep(60)"
    with running(*python(source)) as stream:
        room = bytearray(5)
        while stream.recv_into(memoryview(room)) is None:
            wait(stream.fileno(), Want.READ, Deadline.after(PATIENCE), "the program does not start")
    assert ended(stream.child) == -(signal.SIGKILL if deaf_to else signal.SIGTERM)


def test_hanging_up_keeps_the_descriptor_and_the_program_until_closing():
    with running(*python(ECHO)) as stream:
        fd = stream.fileno()
        stream.hang_up()
        stream.hang_up()
        assert stream.fileno() == fd
        with pytest.raises(Disconnected, match="closed by this program"):
            receive_all(stream)
        assert stream.child.process.wait(PATIENCE) == 0  # the echo's input ended
    assert stream.fileno() == -1


def test_hanging_up_wakes_a_thread_that_waits_for_the_program():
    with running(*python("import time; time.sleep(60)")) as stream:
        hanger = threading.Timer(0.05, stream.hang_up)
        hanger.start()
        wait(stream.fileno(), Want.READ, Deadline.after(PATIENCE), "hanging up did not wake who waits")
        hanger.join()
        stream.child.signal(signal.SIGKILL)


def test_process_that_was_reaped_is_never_signalled(monkeypatch):
    """Its number may be another process's by now."""
    killed: list[int] = []
    with running("true") as stream:
        assert stream.child.process.wait(PATIENCE) == 0
        monkeypatch.setattr(os, "kill", lambda number, _signal: killed.append(number))
        stream.child.signal(signal.SIGKILL)
        stream.child.end()
        stream.child.join()
    assert killed == []


def test_signal_and_reaping_at_once_never_hit_a_reaped_process(monkeypatch):
    """Whoever signals looks first, and nobody reaps in between: checked at the moment of each kill."""
    kill, late = os.kill, []

    def watched(number: int, sent: int) -> None:
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            kill(number, sent)  # it runs
        # else it is a zombie still, whose number is its own

    monkeypatch.setattr(os, "kill", watched)
    for _ in range(20):
        stream = run_command(["true"])
        hunters = [threading.Thread(target=_hunt, args=(stream.child, late)) for _ in range(4)]
        for hunter in hunters:
            hunter.start()
        stream.close()
        for hunter in hunters:
            hunter.join()
        stream.child.join()
    assert late == []


def _hunt(child: Child, late: list[BaseException]) -> None:
    try:
        while child.process.returncode is None:
            child.signal(0)
    except ChildProcessError as exc:  # waitid knows no such child: it was reaped
        late.append(exc)


def test_forgotten_stream_takes_its_program_along():
    stream = run_command(python(ECHO))
    child = stream.child
    forgotten = weakref.ref(stream)
    stream.close()
    del stream
    assert forgotten() is None
    assert ended(child) == 0


def test_program_that_ends_without_closing_takes_its_children_along():
    source = """
import sys
from nbdcore.streams.process import run_command
stream = run_command([sys.executable, "-I", "-S", "-c", sys.argv[1]])
print(stream.child.process.pid)
"""
    done = subprocess.run([sys.executable, "-c", source, ECHO], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stderr == ""
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_failed_command_says_so_behind_a_receive_that_waited():
    room = memoryview(bytearray(8))
    stream = run_command([sys.executable, "-c", "import sys; print('its last words', file=sys.stderr); sys.exit(3)"])
    taken = []
    assert stream.fill(room, taken)
    assert not any(taken)
    with pytest.raises(Disconnected, match="ended with status 3: its last words"):
        stream.recv_into(room)
    stream.close()


# ---------------------------------------------------------------------------------------------- forks


def is_closed(*descriptors: int) -> bool:
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.fstat(fd)
            return False
    return True


@needs_fork
def test_forked_child_that_closes_its_copy_frees_the_descriptors_and_leaves_the_program_to_its_parent() -> None:
    with running(*python(ECHO)) as stream:
        assert stream.child.process.stderr is not None
        descriptors = stream.fileno(), stream.child.process.stderr.fileno()

        def child() -> None:
            stream.close()
            stream.close()
            assert is_closed(*descriptors)

        assert status_of_child(child) == 0
        assert stream.send([memoryview(b"alive")]) == 5
        assert stream.finish_sending()
        assert receive_all(stream) == b"alive"


@pytest.fixture
def _full_backlog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have nobody accepted by whoever listens at a unix socket: its backlog is full."""
    listen = socket.socket.listen
    with contextlib.ExitStack() as queued:

        def listen_and_fill(sock: socket.socket) -> None:
            listen(sock, 0)
            while True:
                queued.enter_context(client := socket.socket(socket.AF_UNIX)).setblocking(False)
                if client.connect_ex(sock.getsockname()) == errno.EAGAIN:
                    break

        monkeypatch.setattr(socket.socket, "listen", listen_and_fill)
        yield


@needs_fork
@pytest.mark.usefixtures("_full_backlog")
def test_forked_child_that_drops_its_copy_of_an_activation_under_way_leaves_folder_and_program_to_its_parent(
    folder: Path,
) -> None:
    before = leaks.children()
    steps = run_activated(python("import time; time.sleep(60)"))
    next(steps)
    made = list(folder.rglob("*"))
    (program,) = leaks.children().keys() - before
    assert status_of_child(steps.close) == 0
    assert list(folder.rglob("*")) == made != []
    os.kill(program, 0)
    steps.close()
    assert list(folder.rglob("*")) == []
