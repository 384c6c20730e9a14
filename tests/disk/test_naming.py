"""What the error of work on a disk says of which disk and which range, whatever the work is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re

import pytest

import nbdcore
from nbdcore.disk import checksum, compare, copy, read_map
from nbdcore.disk.dumping import dump
from nbdcore.disk.offsets import PositionedFile
from nbdcore.errors import Disconnected
from tests.cli.commands import invoke
from tests.interop.servers import nbdkit

pytestmark = [
    pytest.mark.interop("nbdkit"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

SIZE = 8 << 20


@pytest.fixture
def dying():
    """Serve a disk whose server is killed when its second half is read, or when it is asked for extents if that is said."""
    with contextlib.ExitStack() as running:

        def serve(*, asked=False):
            tells = ("can_extents=exit 0", "extents=kill -9 $PPID") if asked else ()
            read = f"pread=test $(($3 + $4)) -le {SIZE // 2} || kill -9 $PPID; head -c $3 /dev/zero | tr '\\0' x"
            return running.enter_context(nbdkit("eval", f"get_size=echo {SIZE}", read, *tells)).uri

        yield serve


def dumped(uri):
    with nbdcore.connect(uri) as disk:
        return [*dump(disk)]


def mapped(uri):
    with nbdcore.connect(uri, contexts=[nbdcore.BASE_ALLOCATION]) as disk:
        return read_map(disk)


@pytest.mark.parametrize(
    "work",
    [checksum, lambda uri: compare(uri, uri), lambda uri: asyncio.run(nbdcore.aio.checksum(uri)), dumped],
    ids=["checksum", "compare", "aio.checksum", "dump"],
)
def test_a_server_that_ends_while_it_is_read_is_told_with_the_range(work, dying):
    uri = dying()
    with pytest.raises(Disconnected) as told:
        work(uri)
    message = told.value.message
    assert ", in the middle of reading " in message
    assert re.search(rf" of {re.escape(uri)}( \(the \w+ disk\))?; see why the server ended, and begin again", message)
    assert isinstance(told.value.__cause__, Disconnected)


@pytest.mark.parametrize("work", [mapped, checksum, dumped], ids=["read_map", "checksum", "dump"])
def test_a_server_that_ends_while_it_is_asked_for_extents_is_told_with_the_range(work, dying):
    with pytest.raises(Disconnected, match=f"in the middle of asking about {SIZE} bytes at offset 0 of nbd"):
        work(dying(asked=True))


def test_a_copy_gives_no_advice_that_does_not_help(dying):
    with pytest.raises(OSError, match="does not tell which parts") as told:
        copy(dying(asked=True), nbdcore.disk.NULL)
    assert "extents=False" not in str(told.value)


def test_the_command_says_it_in_one_line(dying):
    done = invoke("checksum", dying())
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 1, 1)
    assert "in the middle of reading" in done.stderr


# ---------------------------------------------------------------------------------------------- which of two disks


GOOD = "pread=head -c $3 /dev/zero | tr '\\0' x"
BROKEN = GOOD.replace("=", f"=[ $4 -lt {SIZE // 2} ] || {{ echo EIO worn out >&2; exit 1; }}; ", 1)


@contextlib.contextmanager
def good_and_broken():
    with (
        nbdkit("eval", f"get_size=echo {SIZE}", GOOD) as good,
        nbdkit("eval", f"get_size=echo {SIZE}", BROKEN) as broken,
    ):
        yield good.uri, broken.uri


@pytest.mark.parametrize("first", [True, False])
def test_the_disk_that_failed_is_named_by_a_comparison(first):
    with good_and_broken() as (good, broken), pytest.raises(nbdcore.CommandError) as told:
        compare(*((broken, good) if first else (good, broken)))
    assert told.value.message.startswith(f"{broken}: read of ")
    assert told.value.errno == errno.EIO


@pytest.mark.parametrize("first", [True, False])
def test_of_two_disks_with_one_name_it_is_said_which_one_failed(first):
    def started(read):
        return lambda: nbdcore.connect_socket_activation(["nbdkit", "eval", f"get_size=echo {SIZE}", read])

    reads = (BROKEN, GOOD) if first else (GOOD, BROKEN)
    with pytest.raises(nbdcore.CommandError, match="first disk" if first else "second disk"):
        compare(*map(started, reads))


def test_a_disk_that_is_late_is_named():
    with nbdkit("--filter=delay", "data", "1", "rdelay=2") as server:
        disk = nbdcore.connect(server.uri, command_timeout=0.1)
        with disk, pytest.raises(nbdcore.DeadlineExceeded, match=f"^{re.escape(server.uri)}: "):
            checksum(disk)


def test_wrong_usage_is_left_as_it_is():
    with nbdkit("memory", "1M") as server, nbdcore.connect(server.uri) as disk, pytest.raises(nbdcore.UsageError) as told:
        read_map(disk, "no:such-context")
    assert not told.value.names_disk


def test_a_file_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    file = tmp_path / "disk"
    file.write_bytes(bytes(4096))
    monkeypatch.setattr(PositionedFile, "read_some", fails)
    with pytest.raises(OSError, match="Input/output error") as told:
        checksum(file)
    assert told.value.filename == str(file)
