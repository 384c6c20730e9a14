"""`nbdcore map`: what is drawn, and what is written for programs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from xml.etree import ElementTree as ET

import pytest

from nbdcore.server import MemoryDisk, Server
from tests.cli.commands import COMMAND, DEADLINE, invoke, run
from tests.interop import programs
from tests.interop.images import add_dirty_bitmap, pattern, qcow2_image
from tests.interop.programs import DIES_WITH_US
from tests.interop.servers import nbdkit, qemu_nbd

MEBIBYTE = 1 << 20


@pytest.fixture
def sparse():
    """The URI of 1 MiB with 64 KiB of data in the middle."""
    disk = MemoryDisk(MEBIBYTE)
    disk.pwrite(memoryview(b"x" * 65536), MEBIBYTE // 2)
    server = Server(disk)
    listener = server.listen("tcp", host="127.0.0.1", port=0)
    server.start()
    yield server.uri(listener)
    server.stop()


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """qemu-nbd with a backing file and two dirty bitmaps."""
    folder = tmp_path_factory.mktemp("layered")
    base = qcow2_image(folder / "base.qcow2", 4 * MEBIBYTE, {0: pattern(MEBIBYTE)})
    top = qcow2_image(folder / "top.qcow2", 4 * MEBIBYTE)
    programs.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    add_dirty_bitmap(top, "monday", [(MEBIBYTE // 2, MEBIBYTE)])
    with qemu_nbd(top, "--allocation-depth", format="qcow2", bitmap="monday", read_only=True) as server:
        yield server.uri


def rows(done):
    """Return what each row of the drawing shows, by its offset."""
    assert (done.exit_code, done.stderr) == (0, "")
    found = [line.split() for line in done.stdout.splitlines()[3:]]
    return {row[0]: row[1] for row in found[: found.index([])]}


def test_drawing_has_a_character_for_each_cell_and_a_legend_with_totals(sparse):
    done = invoke("map", sparse)
    head, _, about, *drawing = done.stdout.splitlines()
    assert (head, about) == ("1M, 3 parts", "base:allocation, a character is 1K")
    assert rows(done)["512K"] == "█" * 64
    assert set("".join(characters for offset, characters in rows(done).items() if offset != "512K")) == {"·"}
    assert [line.split() for line in drawing[-2:]] == [["█", "data", "64K", "6.2%"], ["·", "hole,zero", "960K", "93.8%"]]


@pytest.mark.interop("nbdkit")
def test_cell_with_little_in_it_is_seen():
    with nbdkit("data", "@1024 1", "size=1T") as server:
        done = invoke("map", server.uri)
    assert [characters.count("░") for characters in rows(done).values()] == [1, *[0] * 15]
    assert done.stdout.splitlines()[-1].split() == ["░", "less", "than", "half", "is", "data"]
    assert "<0.1%" in done.stdout


def test_encoding_without_blocks_gets_ascii(sparse):
    done = run("map", sparse, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "#" * 64 in done.stdout
    assert "." * 64 in done.stdout


@pytest.mark.parametrize(
    ("option", "colored"), [("--color", True), ("--colour", True), ("--no-color", False), ("--no-colours", False)]
)
def test_colour_is_a_matter_of_choice(sparse, option, colored):
    assert ("\x1b[" in invoke("map", option, sparse).stdout) is colored
    assert ("\x1b[" in invoke("info", option, sparse).stdout) is colored
    assert ("\x1b[" in invoke("info", "--map", option, sparse).stdout) is colored


@pytest.mark.parametrize(("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_and_columns_are_the_terminals(sparse, environment, colored):
    ours, its = os.openpty()
    try:
        os.set_blocking(ours, False)
        variables = {**{name: text for name, text in os.environ.items() if name != "NO_COLOR"}, "TERM": "xterm", "COLUMNS": "60"}
        done = subprocess.run(
            [*DIES_WITH_US, *COMMAND, "map", sparse], stdin=its, stdout=its, stderr=subprocess.PIPE, timeout=DEADLINE,
            env={**variables, **environment}, check=False,
        )  # fmt: skip
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(its)
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("\x1b[" in shown) is colored
    if environment.get("TERM") != "dumb":  # of which rich says that it has 80 columns
        assert {line.count("·") for line in shown.splitlines()} <= {0, 1, 16, 32, 48}


def test_json_is_that_of_info(sparse):
    assert invoke("map", "--json", sparse).stdout == invoke("info", "--map", "--json", sparse).stdout
    assert [part["description"] for part in json.loads(invoke("map", "--json", sparse).stdout)] == [
        "hole,zero",
        "data",
        "hole,zero",
    ]


def test_csv_has_names_and_a_line_for_each_part(sparse):
    lines = list(csv.DictReader(invoke("map", "--csv", sparse, "--offset", "256K").stdout.splitlines()))
    assert lines == [
        {"offset": "262144", "length": "262144", "type": "3", "description": "hole,zero"},
        {"offset": "524288", "length": "65536", "type": "0", "description": "data"},
        {"offset": "589824", "length": "458752", "type": "3", "description": "hole,zero"},
    ]


def test_picture_is_written_to_its_file_and_nothing_printed(sparse, tmp_path):
    done = invoke("map", sparse, "--svg", tmp_path / "disk.svg")
    assert (done.output, done.exit_code) == ("", 0)
    picture = ET.fromstring((tmp_path / "disk.svg").read_text(encoding="utf-8"))
    assert {"width", "height", "viewBox"} <= picture.attrib.keys()
    assert "data: 64 KiB (6.2%)" in [element.text for element in picture.iter()]
    assert ET.fromstring(invoke("map", sparse, "--svg", "-").stdout).attrib == picture.attrib
    assert ">4 KiB, 1 part<" in invoke("map", sparse, "--length", "4K", "--svg", "-").stdout


def test_picture_that_cannot_be_written_is_one_line(sparse, tmp_path):
    done = invoke("map", sparse, "--svg", tmp_path / "nowhere" / "disk.svg")
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 1, 1)
    assert "nowhere" in done.stderr


def test_command_without_a_standard_output_prints_nowhere(sparse):
    closed = ("sh", "-c", 'exec "$@" >&-', "sh", *COMMAND)
    for words in (["map", "--json"], ["map"], ["info", "--json"]):
        done = run(*words, sparse, command=closed)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_picture_that_does_not_fit_leaves_no_file_behind(sparse, tmp_path):
    file = tmp_path / "disk.svg"
    small = ("sh", "-c", 'ulimit -f 1 && exec "$@"', "sh", *COMMAND)  # files of a block
    done = run("map", sparse, "--svg", file, command=small)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"nbdcore: cannot write {file}: File too large\n")
    assert not file.exists()


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io")
def test_contexts_are_drawn_below_each_other_with_their_own_characters(layered):
    done = invoke("map", layered, "--context", "qemu:allocation-depth", "--context", "qemu:dirty-bitmap:*")
    depth, bitmap = done.stdout.split("\n\nqemu:")[1:]
    assert depth.startswith("allocation-depth, a character is 4K\n")
    assert "█  local" in depth
    assert bitmap.startswith("dirty-bitmap:monday, ")
    assert [line.split()[1:3] for line in bitmap.splitlines()[-2:]] == [["clean", "3M"], ["dirty", "1M"]]


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io")
def test_several_contexts_are_taken_in_step(layered):
    arguments = ("--map=qemu:dirty-bitmap:monday", "--map", layered)
    told = json.loads(invoke("info", "--json", *arguments).stdout)
    assert [(part["offset"], part["length"]) for part in told][:2] == [(0, MEBIBYTE // 2), (MEBIBYTE // 2, MEBIBYTE)]
    assert told[1]["contexts"] == {
        "qemu:dirty-bitmap:monday": {"type": 1, "description": "dirty"},
        "base:allocation": {"type": 0, "description": "data"},
    }
    assert invoke("info", *arguments).stdout.splitlines()[1] == "    524288     1048576    1  dirty    0  data"
    assert invoke("info", "--totals", *arguments).stdout.splitlines()[-1] == "   1048576  25.0%   1 dirty   0 data"
    totals = json.loads(invoke("info", "--totals", "--json", *arguments).stdout)
    assert totals[-1] == {"size": MEBIBYTE, "percent": 25, "contexts": told[1]["contexts"]}
    lines = invoke("map", "--csv", "--context", "qemu:*", "--context", "base:allocation", layered).stdout.splitlines()
    assert lines[0] == "offset,length,qemu:allocation-depth,qemu:dirty-bitmap:monday,base:allocation"
    assert lines[2].startswith("524288,1048576,local,dirty,data")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--context", "no:thing"), 'does not support metadata context "no:thing"'),
        (("--context", "no:*"), 'begins with "no:"'),
        (("--offset", "2M"), "behind the end of the disk"),
        (("--offset", "512K", "--length", "1M"), "no part of the export"),
    ],
)
def test_what_the_disk_does_not_have_is_one_line(sparse, arguments, words):
    done = invoke("map", *arguments, sparse)
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 1, 1)
    assert words in done.stderr


@pytest.mark.parametrize("options", [("--json", "--csv"), ("--csv", "--svg", "x"), ("--offset", "-1"), ()])
def test_wrong_usage_is_status_1(options):
    disk = ["nbd://localhost"] if options else []
    assert invoke("map", *options, *disk).exit_code == 1


def test_disk_without_bytes_is_drawn_in_a_line(tmp_path):
    server = Server(MemoryDisk(0))
    try:
        uri = server.uri(server.listen("tcp", host="127.0.0.1", port=0))
        server.start()
        assert invoke("map", uri).stdout == "0, 0 parts\n"
        assert json.loads(invoke("map", "--json", uri).stdout) == []
        assert invoke("map", "--csv", uri).stdout == "offset,length,type,description\n"
        assert invoke("map", "--svg", tmp_path / "nothing.svg", uri).exit_code == 0
    finally:
        server.stop()
