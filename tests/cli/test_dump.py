from __future__ import annotations

import os
import pty
import random
import re
import subprocess
import sys

import pytest

from nbdcore.server import MemoryDisk, Server
from tests.cli.commands import COMMAND, DEADLINE, invoke, run
from tests.interop import programs
from tests.interop.programs import DIES_WITH_US

CONTENTS = b"hello, world\n".ljust(512, b"\0") + bytes(range(256)) + b"A" * 100 + bytes(5000) + b"end"


@pytest.fixture(scope="module")
def uri():
    disk = MemoryDisk(len(CONTENTS))
    disk.pwrite(CONTENTS, 0)
    with Server(disk) as server:
        listener = server.listen("tcp", host="127.0.0.1", port=0)
        server.start()
        yield server.uri(listener)


def test_lines_are_offset_digits_and_letters(uri):
    done = invoke("dump", uri, "--length", "40")
    assert done.stdout == (
        "0000000000: 68 65 6c 6c 6f 2c 20 77  6f 72 6c 64 0a 00 00 00 |hello, world....|\n"
        "0000000010: 00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00 |................|\n"
        "*\n"
    )
    assert (done.stderr, done.exit_code) == ("", 0)


@pytest.mark.parametrize(
    "words",
    [("-o", "4", "-n", "8"), ("--offset=4", "--length=8"), ("--skip", "4", "--limit", "8"), ("--offset", "4B", "--length", "8")],
    ids=str,
)
def test_offset_and_length_have_several_names(uri, words):
    assert (
        invoke("dump", uri, *words).stdout == "0000000004: 6f 2c 20 77 6f 72 6c 64                          |o, world        |\n"
    )


def test_sizes_may_have_units(uri):
    assert invoke("dump", uri, "-o", "5K", "-n", "1K").stdout == invoke("dump", uri, "-o", "5120", "-n", "1024").stdout


def test_length_beyond_the_end_ends_there(uri):
    assert invoke("dump", uri, "-n", "1G").stdout == invoke("dump", uri).stdout


def test_offset_beyond_the_end_is_refused(uri):
    done = invoke("dump", uri, "--offset", "1M")
    assert done.stderr == f"nbdcore: --offset 1048576 is beyond the end of the disk, which has {len(CONTENTS)} bytes\n"
    assert (done.stdout, done.exit_code) == ("", 1)


@pytest.mark.interop("nbddump", "nbdkit")
@pytest.mark.parametrize("options", [(), ("--color",), ("--colours", "--length=1007"), ("--length=48",)], ids=str)
def test_it_prints_what_nbddump_prints(uri, options):
    theirs = programs.run("nbddump", *options, uri)
    assert invoke("dump", *options, uri).stdout == theirs.stdout


@pytest.mark.interop("nbddump", "nbdkit")
@pytest.mark.parametrize("color", ["--color", "--no-color"])
def test_it_prints_what_nbddump_prints_of_noise_and_of_lines_that_repeat(color, tmp_path):
    noise = random.Random(1).randbytes(70_000)
    image = tmp_path / "image"
    image.write_bytes(noise + noise[:16] * 5000 + bytes(range(256)) + noise[:4096] + bytes(7))
    server = ("--", "[", programs.path_of("nbdkit"), "file", image, "]")
    assert invoke("dump", color, *server).stdout == programs.run("nbddump", color, *server).stdout


@pytest.mark.interop("nbddump", "nbdkit")
@pytest.mark.parametrize("color", ["--color", "--no-color"])
def test_it_prints_what_nbddump_prints_of_a_short_last_line(color, tmp_path):
    for length in (1, 8, 9, 23):
        image = tmp_path / "image"
        image.write_bytes(random.Random(length).randbytes(length))
        server = ("--", "[", programs.path_of("nbdkit"), "file", image, "]")
        assert invoke("dump", color, *server).stdout == programs.run("nbddump", color, *server).stdout


def on_a_terminal(*arguments, **environment):
    """Run the command with a terminal for its output; return what it showed there."""
    ours, its = pty.openpty()
    with subprocess.Popen(
        [*DIES_WITH_US, *COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=its,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
    ) as process:
        os.close(its)
        assert process.wait(DEADLINE) == 0
    try:
        return os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)


def test_colors_are_for_terminals_and_for_who_wants_them(uri):
    shown = ("dump", uri, "--length", "16")
    assert "\x1b[22;32m0000000000\x1b[22;90m: \x1b[1;34m68" in on_a_terminal(*shown, NO_COLOR="")
    assert "0000000000: 68" in on_a_terminal(*shown, NO_COLOR="1")
    assert "\x1b" in on_a_terminal(*shown, "--color", NO_COLOR="1")
    assert "\x1b" not in run(*shown).stdout


def test_reader_that_takes_one_line_is_no_news(uri):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("dump", uri, stdout=writer)
    finally:
        os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.interop("nbdkit")
def test_read_that_fails_ends_it_with_one_line():
    server = (programs.path_of("nbdkit"), "--filter=error", "pattern", "1M", "error-pread=EIO", "error-pread-rate=100%")
    done = run("dump", "--length", "16", "[", *server, "]")
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("nbdkit: ")]
    assert line.startswith("nbdcore: ")
    assert "EIO" in line
    assert (done.stdout, done.returncode) == ("", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="servers are started on unix sockets")
def test_command_that_is_no_server_is_told_to_have_ended():
    done = run("dump", "[", "true", "]")
    assert re.fullmatch(r"nbdcore: the command true ended with status 0 \(E[A-Z]+\)\n", done.stderr)
    assert done.returncode == 1
