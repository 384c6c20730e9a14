"""`nbdcore copy` beside nbdkit and qemu-nbd: what it says, what its options do, and what it leaves when it fails."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdcore.disk import checksum, copy
from tests.cli.commands import COMMAND, DEADLINE, invoke, run
from tests.interop.images import add_dirty_bitmap, pattern, qcow2_image, raw_image
from tests.interop.programs import DIES_WITH_US, path_of
from tests.interop.servers import nbdkit, qemu_nbd

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets, named pipes and holes, as Windows lacks")

MEBIBYTE = 1 << 20


@pytest.fixture
def origin(tmp_path):
    """A sparse image with data at its beginning, in its middle and at its end, of an odd size."""
    return raw_image(
        tmp_path / "origin", 3 * MEBIBYTE + 77, {0: pattern(5000), MEBIBYTE: pattern(300_000), 3 * MEBIBYTE: pattern(77)}
    )


def failed(done, *words):
    """Assert that a command said one line on standard error, and nothing else."""
    [line] = done.stderr.splitlines()
    assert line.startswith("nbdcore: ")
    assert all(word in line for word in words), line
    assert (done.stdout, done.exit_code) == ("", 1)


@contextlib.contextmanager
def copying(*arguments, **options):
    """Run a copy in a process of its own, that goes on meanwhile."""
    with subprocess.Popen(
        [*DIES_WITH_US, *COMMAND, "copy", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **{"text": True, **options},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- ends


@pytest.mark.interop("nbdkit")
def test_servers_are_started_for_either_end(origin, tmp_path):
    done = invoke(
        "copy", "--", "[", "nbdkit", "file", origin, "]", "[", "nbdkit", "file", raw_image(tmp_path / "b", 4 * MEBIBYTE), "]"
    )
    assert (done.stdout, done.stderr, done.exit_code) == ("", "", 0)
    assert (tmp_path / "b").read_bytes()[: origin.stat().st_size] == origin.read_bytes()


def test_standard_input_and_output_are_ends(origin, tmp_path):
    line = f"{sys.executable} -m nbdcore copy {origin} - | {sys.executable} -m nbdcore copy --checksum - {tmp_path / 'copy'}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert (tmp_path / "copy").read_bytes() == origin.read_bytes()
    assert done.stdout == f"{checksum(origin).digest.hex()}\n"


def test_null_is_an_end_and_the_checksum_is_printed_or_written(origin, tmp_path):
    expected = f"{checksum(origin).digest.hex()}\n"
    assert invoke("copy", "--blkhash", origin, "null:").stdout == expected
    done = invoke("copy", "--blkhash=sha256/64k", "--blkhash-file", tmp_path / "hash", origin, "null:")
    assert (done.stdout, (tmp_path / "hash").read_text()) == ("", expected)


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize(
    "options",
    [
        ("--synchronous", "-C", "1", "-R", "1"),
        ("--request-size=4k", "--queue-size=64K", "-T", "2", "-S", "512"),
        ("--no-extents", "--sparse=0", "--allocated", "--flush", "-C16", "--verify"),
    ],
    ids=" ".join,
)
def test_every_option_gives_an_equal_copy(origin, tmp_path, options):
    with nbdkit("memory", "4M") as server:
        assert invoke("copy", *options, origin, server.uri).stderr == ""
        assert invoke("copy", *options, server.uri, tmp_path / "copy").exit_code == 0
    assert (tmp_path / "copy").read_bytes()[: origin.stat().st_size] == origin.read_bytes()


@pytest.mark.interop("nbdkit")
def test_a_server_that_cannot_zero_is_sent_zeroes(origin):
    with nbdkit("memory", "4M", filters=["nozero"]) as server:
        ones = subprocess.run(["head", "-c", "4M", "/dev/zero"], capture_output=True, check=True).stdout.replace(b"\0", b"x")
        subprocess.run([*COMMAND, "copy", "-", server.uri], input=ones, check=True, timeout=DEADLINE)
        assert invoke("copy", "--verify", origin, server.uri).exit_code == 0
        failed(
            invoke("copy", "--verify", "--target-is-zero", "-S0", raw_image(origin.with_name("zero"), MEBIBYTE), server.uri),
            "differs",
        )


def test_verbose_says_what_is_copied_and_progress_counts(origin, tmp_path):
    done = invoke("copy", "-v", "--progress=1", origin, tmp_path / "copy")
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()[:4]] == ["src", "src", "dst", "dst"]
    assert "synchronous=false" in done.stderr
    counted = run("copy", "--progress=1", origin, tmp_path / "copy").stdout.splitlines()
    assert counted[-1] == "100/100"


def test_a_bar_is_drawn_when_it_is_asked_for(origin):
    assert "100%" in invoke("copy", "-p", origin, "null:").stderr
    assert invoke("copy", "-pq", origin, "null:").stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--request-size", "5000"), "power of two"),
        (("--sparse", "1000"), "power of two"),
        (("--connections", "0"), "--connections"),
        (("--checksum=sha0",), "sha0"),
        (("--progress=many",), "file descriptor"),
    ],
)
def test_wrong_usage_is_refused(origin, tmp_path, words, said):
    done = invoke("copy", *words, origin, tmp_path / "copy")
    assert (done.exit_code, done.stdout, said in done.stderr) == (1, "", True), done.stderr
    assert not (tmp_path / "copy").exists()


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.interop("nbdkit")
def test_a_read_error_names_the_range_and_leaves_no_file(tmp_path):
    with nbdkit("pattern", "3M", "error-pread-rate=100%", "error=EIO", filters=["error"]) as server:
        failed(invoke("copy", server.uri, tmp_path / "copy"), "cannot read 1048576 bytes at offset ", "EIO", "is removed")
    assert not (tmp_path / "copy").exists()


@pytest.mark.interop("nbdkit")
def test_a_write_error_names_the_range(origin):
    with nbdkit("memory", "4M", "error-pwrite-rate=100%", "error=ENOSPC", filters=["error"]) as server:
        failed(invoke("copy", origin, server.uri), "cannot write ", ": No space left on device; ", "no complete copy")


@pytest.mark.interop("nbdkit")
def test_a_block_status_error_ends_the_copy_and_says_what_to_do(tmp_path):
    with nbdkit("memory", "3M", "error-extents-rate=100%", filters=["error"]) as server:
        failed(invoke("copy", server.uri, tmp_path / "copy"), "--no-extents")
        assert invoke("copy", "--no-extents", server.uri, tmp_path / "copy").exit_code == 0


@pytest.mark.interop("nbdkit")
def test_a_server_killed_in_the_middle_ends_the_copy(tmp_path):
    with nbdkit("pattern", "8M", "rdelay=200ms", filters=["delay"]) as server:
        with copying(server.uri, tmp_path / "copy", "-C1", "-R1") as process:
            wait_for(lambda: (tmp_path / "copy").exists() and (tmp_path / "copy").stat().st_size)
            server.kill()
            _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1
        assert "cannot read" in said
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_is_an_error(tmp_path):
    origin = tmp_path / "origin"
    origin.write_bytes(pattern(3 * MEBIBYTE))
    done = subprocess.run(
        ["prlimit", f"--fsize={MEBIBYTE}", "--", *COMMAND, "copy", origin, tmp_path / "copy"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.interop("nbdkit")
def test_ctrl_c_stops_the_copy_and_says_what_is_left(tmp_path):
    (tmp_path / "copy").write_bytes(b"old")
    with (
        nbdkit("pattern", "8M", "rdelay=200ms", filters=["delay"]) as server,
        copying(server.uri, tmp_path / "copy", "-C1", "-R1") as process,
    ):
        wait_for(lambda: (tmp_path / "copy").stat().st_size >= MEBIBYTE)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert said == f"nbdcore: interrupted: {tmp_path / 'copy'} is no complete copy\n"
    assert (tmp_path / "copy").stat().st_size < 8 * MEBIBYTE


def test_ctrl_c_stops_a_copy_to_a_pipe_that_nobody_empties(origin):
    with copying(origin, "-", text=False) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        assert process.stderr.read() == b"nbdcore: interrupted: standard output is no complete copy\n"


# ---------------------------------------------------------------------------------------------- resuming


def reads_in(log: Path) -> list[tuple[int, int]]:
    """Return begin and end of each read that nbdkit's log filter wrote down."""
    found = []
    for line in log.read_text().splitlines():
        if " Read " in line:
            numbers = dict(word.split("=") for word in line.split() if "=" in word)
            begin = int(numbers["offset"], 16)
            found.append((begin, begin + int(numbers["count"], 16)))
    return found


@pytest.mark.interop("nbdkit")
def test_a_copy_that_is_killed_at_any_moment_goes_on(tmp_path):
    manifest, target, log = tmp_path / "manifest", tmp_path / "copy", tmp_path / "log"
    chance = random.Random(14)
    with nbdkit("pattern", "60M", f"logfile={log}", "rdelay=30ms", filters=["log", "delay"]) as server:
        kept: list[list[int]] = []
        for _ in range(3):
            before = len(reads_in(log)) if log.exists() else 0
            with copying("--resume", manifest, "-C2", "-R1", server.uri, target) as process:
                wait_for(lambda before=before: log.exists() and len(reads_in(log)) > before)
                time.sleep(chance.uniform(0.05, 0.4))
                process.kill()
            fresh = reads_in(log)[before:]
            assert all(begin >= b or end <= a for begin, end in fresh for a, b in kept)
            if manifest.exists():
                kept = json.loads(manifest.read_text())["finished"]
            assert not target.exists() or target.stat().st_size < 60 * MEBIBYTE
        before = len(reads_in(log))
        assert run("copy", "--resume", manifest, server.uri, target).returncode == 0
        assert all(begin >= b or end <= a for begin, end in reads_in(log)[before:] for a, b in kept)
        assert invoke("compare", server.uri, target).exit_code == 0
    assert not manifest.exists()


# ---------------------------------------------------------------------------------------------- bitmaps


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io")
def test_what_a_bitmap_names_is_copied_onto_a_full_copy_or_kept_as_changes(tmp_path):
    size = 4 * MEBIBYTE
    image = qcow2_image(tmp_path / "vm", size, {0: pattern(size)})
    full, changes, other = tmp_path / "full", tmp_path / "changes", tmp_path / "other"
    full.write_bytes(pattern(size))
    other.write_bytes(pattern(size))
    add_dirty_bitmap(image, "monday", [(MEBIBYTE, 65536), (3 * MEBIBYTE, 70_000)])
    with qemu_nbd(image, format="qcow2", bitmap="monday", read_only=True) as server:
        assert invoke("copy", server.uri, full, "--bitmap", "monday", "--verify").stderr == ""
        assert invoke("copy", server.uri, changes, "--bitmap", "monday", "--changes", tmp_path / "map").stderr == ""
        failed(invoke("copy", server.uri, full, "--bitmap", "friday"), "qemu:dirty-bitmap:friday")
        failed(invoke("copy", server.uri, tmp_path / "none", "--bitmap", "monday"), "onto a full copy")
    assert not (tmp_path / "none").exists()
    listed = json.loads((tmp_path / "map").read_text())
    assert [(one["offset"], one["length"]) for one in listed["ranges"]] == [(MEBIBYTE, 65536), (3 * MEBIBYTE, 131072)]
    assert (changes.stat().st_size, changes.stat().st_blocks * 512 < MEBIBYTE) == (size, True)
    assert invoke("copy", changes, other, "--apply", tmp_path / "map").stderr == ""
    assert other.read_bytes() == full.read_bytes() != pattern(size)


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io")
def test_what_has_become_zero_is_a_change(tmp_path):
    size = 2 * MEBIBYTE
    image = qcow2_image(tmp_path / "vm", size, {0: pattern(size)})
    add_dirty_bitmap(image, "monday", [])
    subprocess.run([path_of("qemu-img"), "bitmap", "--enable", image, "monday"], check=True, timeout=DEADLINE)
    subprocess.run([path_of("qemu-io"), "-f", "qcow2", "-c", "write -q -z 64k 64k", image], check=True, timeout=DEADLINE)
    subprocess.run([path_of("qemu-img"), "bitmap", "--disable", image, "monday"], check=True, timeout=DEADLINE)
    full, changes, other = tmp_path / "full", tmp_path / "changes", tmp_path / "other"
    for each in (full, other):
        each.write_bytes(pattern(size))
    with qemu_nbd(image, format="qcow2", bitmap="monday", read_only=True) as server:
        assert invoke("copy", server.uri, full, "--bitmap", "monday").stderr == ""
        assert invoke("copy", server.uri, changes, "--bitmap", "monday", "--changes", tmp_path / "map").stderr == ""
    assert json.loads((tmp_path / "map").read_text())["ranges"] == [{"offset": 65536, "length": 65536, "zero": True}]
    assert invoke("copy", changes, other, "--apply", tmp_path / "map").stderr == ""
    assert other.read_bytes() == full.read_bytes() == pattern(size)[:65536] + bytes(65536) + pattern(size)[131072:]


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io")
def test_an_earlier_map_does_not_stand_beside_changes_that_are_not_complete(tmp_path):
    image = qcow2_image(tmp_path / "vm", MEBIBYTE, {0: pattern(MEBIBYTE)})
    add_dirty_bitmap(image, "monday", [(65536, 65536)])
    (tmp_path / "map").write_text("an earlier one's")

    def interrupt(_):
        raise KeyboardInterrupt

    with qemu_nbd(image, format="qcow2", bitmap="monday", read_only=True) as server, pytest.raises(KeyboardInterrupt):
        copy(server.uri, tmp_path / "changes", bitmap="monday", changes=tmp_path / "map", progress=interrupt)
    assert not (tmp_path / "map").exists()
