"""`nbdcore checksum`: a word that a script compares, of whatever a disk is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from nbdcore.cli.progress import bar
from nbdcore.server import MemoryDisk
from tests.cli.commands import COMMAND, DEADLINE, invoke, run
from tests.disk.disks import SilentDisk, ToldDisk, block_hash, served
from tests.interop.programs import DIES_WITH_US
from tests.interop.servers import nbdkit

DATA = random.Random(1).randbytes(300_000)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its disks are served on unix sockets")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(DATA)
    return path


def test_a_server_and_a_file_have_the_same_line(path, socket_path):
    with served(ToldDisk(DATA, []), socket_path) as uri:
        over_nbd = invoke("checksum", uri)
    assert over_nbd.stdout == invoke("checksum", path).stdout == block_hash(DATA).hex() + "\n"
    assert (over_nbd.stderr, over_nbd.exit_code) == ("", 0)


@pytest.mark.interop("nbdkit")
def test_a_server_that_it_starts_itself_is_read_too(path):
    done = invoke("checksum", "[", "nbdkit", "file", str(path), "]", "--blkhash", "md5/4k")
    assert (done.stdout, done.stderr) == (block_hash(DATA, "md5", 4096).hex() + "\n", "")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), block_hash(DATA)),
        (("--algorithm=SHA512",), block_hash(DATA, "sha512")),
        (("--algorithm=sha1/1M",), block_hash(DATA, "sha1", 1 << 20)),
        (("--offset=64K", "--length=100"), block_hash(DATA[65536:65636])),
        (("--offset=300000",), block_hash(b"")),
    ],
    ids=str,
)
def test_options_say_what_is_hashed_and_how(words, wanted, path):
    assert invoke("checksum", path, *words).stdout == wanted.hex() + "\n"


@pytest.mark.parametrize("quietly", [False, True])
def test_what_comes_through_a_pipe_is_hashed_to_its_end(quietly, path):
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        words = ["checksum", "-", "--length=200000", *(["-q"] if quietly else [])]
        done = subprocess.run(
            [*DIES_WITH_US, *COMMAND, *words], stdin=cat.stdout, capture_output=True, timeout=DEADLINE, check=True, text=True
        )
    assert (done.stdout, done.stderr) == (block_hash(DATA[:200_000]).hex() + "\n", "")


def test_a_named_pipe_is_a_pipe_and_a_file_called_dash_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with subprocess.Popen(["sh", "-c", "printf x > fifo"]):
        assert invoke("checksum", "fifo").stdout == block_hash(b"x").hex() + "\n"
    (tmp_path / "-").write_bytes(b"y")
    assert invoke("checksum", "./-").stdout == block_hash(b"y").hex() + "\n"


def test_json_has_what_was_read_and_the_parts_checksums(path):
    document = json.loads(invoke("checksum", path, "--json", "--range-size=128K", "--offset=512").stdout)
    part = DATA[512:]
    assert document == {
        "digest": block_hash(part).hex(),
        "algorithm": "sha256",
        "block-size": 65536,
        "offset": 512,
        "length": len(part),
        "zeroes": 0,
        "ranges": [
            {"offset": 512 + at, "length": len(part[at : at + 131072]), "digest": block_hash(part[at : at + 131072]).hex()}
            for at in range(0, len(part), 131072)
        ],
    }


def test_json_of_nothing_has_no_parts_but_says_so(path):
    assert json.loads(invoke("checksum", path, "--json", "--range-size=128K", "--length=0").stdout)["ranges"] == []
    assert "ranges" not in json.loads(invoke("checksum", path, "--json").stdout)


@pytest.mark.interop("nbdkit")
def test_a_server_that_tells_untruths_about_zeroes_is_read_with_no_extents(tmp_path):
    script = tmp_path / "server"
    script.write_text(
        """case $1 in
        get_size) echo 1M ;;
        pread) head -c $3 /dev/zero | tr '\\0' x ;;
        can_extents) exit 0 ;;
        extents) echo 0 1M zero ;;
        *) exit 2 ;;
        esac"""
    )
    script.chmod(0o755)
    with nbdkit("sh", str(script)) as server:
        assert invoke("checksum", server.uri).stdout == block_hash(bytes(1 << 20)).hex() + "\n"
        assert invoke("checksum", server.uri, "--no-extents").stdout == block_hash(b"x" * (1 << 20)).hex() + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--algorithm=sha257",), "there is no algorithm 'sha257' here; there are: blake2b,"),
        (("--algorithm=shake_256/4k",), "digests of shake_256 have any length"),
        (("--algorithm=sha256/5k",), "a power of two from 512 to 33554432 bytes, not 5120"),
        (("--algorithm=sha256/",), "'' is no size"),
        (("--range-size=64K",), "--range-size is for --json"),
        (("--offset=1T",), "the disk has 300000 bytes, and no offset 1099511627776"),
        (("--length=1M",), "and no 1048576 bytes at offset 0"),
        (("--json", "--range-size=100"), "parts have a multiple of 65536 bytes, a block: not 100"),
        (("--connections=0",), "0 is not in the range"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_status_1(words, message, path):
    done = invoke("checksum", path, *words)
    assert (done.stdout, done.exit_code) == ("", 1)
    assert message in done.stderr


@pytest.mark.interop("nbdkit")
def test_an_error_in_the_middle_is_one_line_and_no_checksum(path):
    with nbdkit("file", str(path), "error-pread=EIO", "error-pread-rate=100%", filters=["error"]) as server:
        done = invoke("checksum", server.uri)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"nbdcore: {server.uri}: read")
    assert (done.stdout, done.exit_code) == ("", 1)


def test_an_empty_word_is_no_disk():
    done = invoke("checksum", "")
    assert done.stderr == "nbdcore: '' is no disk: write an NBD URI, a file, - or [ COMMAND ARGS ... ]\n"
    assert (done.stdout, done.exit_code) == ("", 1)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    done = invoke("checksum", tmp_path / "nothing")
    assert (done.stdout, done.stderr, done.exit_code) == ("", f"nbdcore: {tmp_path}/nothing: No such file or directory\n", 1)


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize("by_itself", [False, True], ids=["uri", "command"])
def test_ctrl_c_ends_it_at_once_though_the_server_does_not_answer(by_itself, tmp_path, eventually):
    log = tmp_path / "log"
    words = ("--filter=log", "--filter=delay", "pattern", "64M", "rdelay=300", f"logfile={log}")
    with contextlib.ExitStack() as stack:
        disk = ["[", "nbdkit", *words, "]"] if by_itself else [stack.enter_context(nbdkit(*words)).uri]
        process = stack.enter_context(
            subprocess.Popen(
                [*DIES_WITH_US, *COMMAND, "checksum", *disk],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # A test run in the background may have been told to ignore it, and hand that down.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 (no threads here)
            )
        )
        eventually(lambda: log.exists() and " Read " in log.read_text(), "the server was asked")
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=DEADLINE)
    # The server that it started says something about its own end.
    assert [line for line in errors.splitlines() if not line.startswith(b"nbdkit:")] == []
    assert (text, process.returncode) == (b"", 130)


@pytest.mark.parametrize(("terminal", "drawn"), [("xterm", True), ("dumb", False)])
def test_a_bar_is_for_terminals_that_can_wipe_it_away(terminal, drawn, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar("work") as told:
        assert (told is not None) is drawn


def test_on_a_terminal_a_bar_is_drawn_and_wiped_away(socket_path):
    class SlowDisk(SilentDisk):
        def pread(self, count, offset):
            time.sleep(0.08)
            return super().pread(count, offset)

    disk = SlowDisk(bytes(10 << 20), [])
    main, terminal = os.openpty()
    with served(disk, socket_path) as uri, os.fdopen(main, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [*DIES_WITH_US, *COMMAND, "checksum", "-C1", uri],
            stdout=subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(terminal)
        drawn = b""
        with process, contextlib.suppress(OSError):  # the end of a terminal is an error
            while more := screen.read(4096):
                drawn += more
        assert process.stdout is not None
    assert b"checksum" in drawn
    assert b"%" in drawn
    assert process.returncode == 0


def test_a_disk_of_the_largest_common_size_without_data_takes_no_time(socket_path):
    with served(MemoryDisk(1 << 40), socket_path) as uri:
        done = run("checksum", uri, "--algorithm", "md5/32M")
    assert (len(done.stdout.strip()), done.stderr) == (32, "")
