"""A server that ends in the middle of work on its disk: what the error says, whatever the work is."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

import nbdcore
from nbdcore.disk import checksum, compare, copy, read_map
from nbdcore.disk.dumping import dump
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
    assert f" of {uri}; see why the server ended, and begin again" in message
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
