"""`nbdcore compare`: 0, 1 or 2, and where disks differ."""

from __future__ import annotations

import json
import os
import random
import sys

import pytest

from tests.cli.commands import invoke, run
from tests.disk.disks import ToldDisk, served
from tests.interop.servers import nbdkit

DATA = random.Random(1).randbytes(300_000)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its disks are served on unix sockets")


def disk(folder, name, data=DATA):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture
def one(tmp_path):
    return disk(tmp_path, "one")


@pytest.fixture
def changed(tmp_path):
    """Differs in bytes 5000 and 5001, and in the last one."""
    data = bytearray(DATA)
    for at in (5000, 5001, len(data) - 1):
        data[at] ^= 1
    return disk(tmp_path, "changed", data)


def outcome(*words):
    done = invoke("compare", *words)
    return done.exit_code, done.stdout, done.stderr


def test_the_same_contents_have_status_0(one, tmp_path, socket_path):
    with served(ToldDisk(DATA, []), socket_path) as uri:
        assert outcome(one, uri) == (0, "The disks have the same contents.\n", "")
        assert outcome(one, uri, "--map") == outcome(one, uri, "-q") == (0, "", "")


def test_the_first_difference_is_told_to_the_byte_with_status_1(one, changed):
    assert outcome(one, changed) == (1, "The disks differ, first at byte 5000.\n", "")
    assert outcome(one, changed, "--quiet", "--map") == (1, "", "")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ((), ["4096 4096", "299008 992"]),
        (("--granularity=64K",), ["0 65536", "262144 37856"]),
        (("--granularity=1M",), ["0 300000"]),
    ],
    ids=str,
)
def test_the_map_has_all_differences(words, lines, one, changed):
    status, text, errors = outcome("--map", one, changed, *words)
    assert [" ".join(line.split()) for line in text.splitlines()] == lines
    assert (status, errors) == (1, "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--offset=8K", "--length", "280K"), (0, "The disks have the same contents there.\n", "")),
        (("--offset=5001",), (1, "The disks differ, first at byte 5001.\n", "")),
        (("--offset=5001", "--map"), (1, f"{5001:>12} {4096:>12}\n{299913:>12} {87:>12}\n", "")),
        (("--offset=1M",), (2, "", "nbdcore: the disk has 300000 bytes, and no offset 1048576\n")),
    ],
    ids=str,
)
def test_a_range_is_compared_by_itself(words, told, one, changed):
    assert outcome(one, changed, *words) == told


def test_json_has_the_differences_with_the_map_only(one, changed):
    _, text, _ = outcome(one, changed, "--json")
    facts = {"same": False, "first-difference": 5000, "sizes": [300_000, 300_000]}
    assert json.loads(text) == facts
    _, text, _ = outcome(one, changed, "--json", "--map")
    assert json.loads(text) == {
        **facts,
        "differences": [{"offset": 4096, "length": 4096}, {"offset": 299_008, "length": 992}],
    }


def test_a_larger_disk_is_the_same_where_its_rest_is_zero_unless_sizes_matter(one, tmp_path):
    larger = disk(tmp_path, "larger", DATA)
    os.truncate(larger, 1 << 20)
    assert outcome(larger, one) == (
        0,
        "The disks have the same contents, and the last 748576 bytes of the larger one are zero.\n",
        "",
    )
    assert outcome("--strict", one, larger) == (1, "The disks differ in size: 300000 and 1048576 bytes.\n", "")
    # A program that reads ranges finds none: there is nothing else among them.
    assert outcome("--strict", "--map", one, larger) == (
        1,
        "",
        "nbdcore: The disks differ in size: 300000 and 1048576 bytes.\n",
    )
    assert outcome("--strict", "--map", "--quiet", one, larger) == (1, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{one}",), "Missing argument 'B'"),
        (("{one}", "{one}", "--nonsense"), "No such option"),
        (("{one}", "{one}", "--granularity=3K"), "granularity is a power of two up to 1048576 bytes, not 3072"),
        (("{one}", "{one}-not"), "nbdcore: {one}-not: No such file or directory"),
        (("-", "{one}"), "nbdcore: -: what comes through a pipe cannot be compared"),
        (("{one}", "nbd+unix:///?socket={one}"), "nbdcore: cannot connect to"),
        (("{one}", "["), 'no "]" ends it'),
        (("{one}", ""), "nbdcore: '' is no disk"),
    ],
    ids=str,
)
def test_trouble_has_status_2_and_nothing_on_standard_output(words, message, one):
    status, text, errors = outcome(*(word.format(one=one) for word in words))
    assert (status, text) == (2, "")
    assert message.format(one=one) in errors


@pytest.mark.interop("nbdkit")
def test_an_error_in_the_middle_is_trouble(one):
    failing = ("[", "nbdkit", "--filter=error", "file", str(one), "error-pread=EIO", "error-pread-rate=100%", "]")
    done = run("compare", "--map", one, *failing)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("nbdcore: the command nbdkit: read")


@pytest.mark.interop("nbdkit")
def test_two_servers_that_it_starts_itself_are_compared(one, changed):
    assert outcome("[", "nbdkit", "file", str(one), "]", "[", "nbdkit", "file", str(changed), "]")[0] == 1


@pytest.mark.interop("nbdkit")
def test_a_disk_is_the_same_as_itself(one):
    with nbdkit("file", str(one)) as server:
        assert outcome(server.uri, server.uri)[0] == 0
