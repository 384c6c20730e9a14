"""The map of a disk: whole, in pieces, and summed up, of our own server with a disk of known parts."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

import nbdcore
from nbdcore import AllocationFlag, CommandError, UsageError
from nbdcore.disk import DiskMap, Part, describe, read_map
from nbdcore.disk.maps import read_map_pieces, totals
from nbdcore.disk.pictures import svg
from nbdcore.disk.sketch import sketched
from nbdcore.server import MemoryDisk, Server

MEBIBYTE = 1 << 20
HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO


class Parted:
    """A disk that says of itself what a test wants: (length, flags) in order. It reads as zeroes."""

    def __init__(self, *parts):
        self.parts = parts
        self.size = sum(length for length, _ in parts)

    def pread(self, count, offset):  # noqa: ARG002 (a back end's signature)
        return bytes(count)

    def extents(self, count, offset):
        at = 0
        for length, flags in self.parts:
            begin, end = max(at, offset), min(at + length, offset + count)
            if begin < end:
                yield end - begin, flags
            at += length


class Broken(Parted):
    """A disk that does not know all of itself."""

    def extents(self, count, offset):
        if offset >= self.size // 2:
            raise OSError(5, "it is broken")
        return super().extents(count, offset)


@pytest.fixture
def connect():
    """Serves a disk, and gives a client of it."""
    servers = []

    def start(disk):
        server = Server(disk)
        servers.append(server)
        listener = server.listen("tcp", host="127.0.0.1", port=0)
        server.start()
        return nbdcore.connect(server.uri(listener), timeout=20, command_timeout=20)

    yield start
    for server in servers:
        server.stop()


def alternating(count, length=MEBIBYTE):
    return Parted(*zip(itertools.repeat(length, count), itertools.cycle([AllocationFlag(0), HOLE])))


def test_parts_have_words_and_neighbours_alike_are_one(connect):
    with connect(Parted((4096, AllocationFlag(0)), (4096, HOLE), (8192, HOLE), (512, AllocationFlag.ZERO))) as disk:
        found = read_map(disk)
    assert list(found) == [
        Part(0, 4096, (0,), ("data",)),
        Part(4096, 12288, (3,), ("hole,zero",)),
        Part(16384, 512, (2,), ("zero",)),
    ]
    assert (len(found), found.begin, found.end) == (3, 0, 16896)
    assert (next(iter(found)).type, next(iter(found)).description) == (0, "data")


def test_range_has_its_own_totals(connect):
    with connect(alternating(4)) as disk:
        found = read_map(disk, offset=MEBIBYTE // 2, count=2 * MEBIBYTE)
    assert [(total.size, total.share, total.descriptions) for total in found.totals()] == [
        (MEBIBYTE, 0.5, ("data",)),
        (MEBIBYTE, 0.5, ("hole,zero",)),
    ]


def test_disk_without_bytes_has_no_parts(connect):
    with connect(MemoryDisk(0)) as disk:
        found = read_map(disk)
        assert [len(piece) for piece in read_map_pieces(disk)] == [0]
    assert (list(found), found.totals(), found.begin, found.end, list(found.lines(lambda _: ""))) == ([], [], 0, 0, [])


@pytest.mark.parametrize("parts", [(300, MEBIBYTE), (7, 40 * MEBIBYTE), (2, 512 * MEBIBYTE), (1, 1 << 40)])
def test_pieces_are_the_whole_and_cut_no_part(connect, parts):
    with connect(alternating(*parts)) as disk:
        pieces = list(read_map_pieces(disk))
        whole = list(read_map(disk))
        assert [part for piece in pieces for part in piece] == whole
        assert totals(pieces) == read_map(disk).totals()
        begun = [part for piece in read_map_pieces(disk, offset=1000, count=disk.size - 3000) for part in piece]
    assert (begun[0].offset, begun[-1].offset + begun[-1].length, len(begun)) == (1000, disk.size - 2000, len(whole))


def test_pieces_of_a_disk_that_fails_halfway_are_an_error_that_leaves_the_connection(connect):
    with connect(Broken((1 << 30, AllocationFlag(0)))) as disk:
        with pytest.raises(CommandError):
            list(read_map_pieces(disk))
        assert disk.pread(512, 0) == bytes(512)


def test_range_that_is_not_the_disks_is_refused(connect):
    with connect(alternating(200)) as disk, pytest.raises(UsageError):
        list(read_map_pieces(disk, count=1 << 40))


def test_context_that_was_not_agreed_on_is_refused(connect):
    with connect(alternating(1)) as disk, pytest.raises(UsageError):
        read_map(disk, "qemu:dirty-bitmap:b")


def test_lines_are_those_of_each_part(connect):
    with connect(alternating(40_000, 4096)) as disk:
        found = read_map(disk)
    text = "".join(found.lines(lambda types: f"%d+%d={types[0]}%%", between=";"))
    assert text.split(";") == [f"{part.offset}+{part.length}={part.type}%" for part in found]


def test_columns_of_the_client_for_asyncio_make_a_map(connect):
    async def ask(uri):
        async with nbdcore.aio.connect(uri) as disk:
            return DiskMap(await disk.extent_columns())

    server = Server(alternating(3))
    try:
        uri = server.uri(server.listen("tcp", host="127.0.0.1", port=0))
        server.start()
        assert [part.description for part in asyncio.run(ask(uri))] == ["data", "hole,zero", "data"]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("context", "number", "word"),
    [
        ("base:allocation", 4, ""),
        ("qemu:dirty-bitmap:a:b", 1, "dirty"),
        ("qemu:dirty-bitmap:a:b", 2, ""),
        ("qemu:allocation-depth", 0, "absent"),
        ("qemu:allocation-depth", 7, "backing depth 7"),
        ("else:where", 0, ""),
    ],
)
def test_numbers_of_known_contexts_have_words(context, number, word):
    assert describe(context, number) == word


def test_maps_bring_nothing_that_starts_processes():
    code = "import sys; from nbdcore.disk import read_map; print('multiprocessing' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="nonsense"):
        nbdcore.disk.nonsense  # noqa: B018 (asked for, not used)
    assert set(nbdcore.disk.__all__) <= set(dir(nbdcore.disk))


# Sketches and pictures


def test_no_part_is_lost_in_a_sketch(connect):
    with connect(Parted((1 << 42, HOLE), (512, AllocationFlag(0)), ((1 << 42) - 512, HOLE))) as disk:
        found = read_map(disk)
    [sketch] = sketched(found, 100)
    assert len(sketch.cells) == 64
    assert [number for number in range(64) if sketch.share(number)] == [32]
    assert sketch.totals() == {0: 512, 3: (1 << 43) - 512}
    assert (sketch.percent(512), sketch.percent((1 << 43) - 512), sketch.percent(1 << 42)) == ("<0.1%", ">99.9%", "50.0%")


@pytest.mark.parametrize(("size", "cells"), [(1, 10), (512, 1), (1000, 1), (1 << 20, 7), ((1 << 63) - 1, 2000)])
def test_sketch_has_no_more_cells_than_there_is_room_for(connect, size, cells):
    with connect(Parted((size, AllocationFlag(0)))) as disk:
        [sketch] = sketched(read_map(disk), cells)
    assert 0 < len(sketch.cells) <= cells
    assert sum(sum(cell.values()) for cell in sketch.cells) == size
    assert {sketch.share(number) for number in range(len(sketch.cells))} == {1}


def test_picture_is_xml_whatever_the_title_and_has_the_totals(connect):
    with connect(alternating(4)) as disk:
        picture = ET.fromstring(svg(read_map(disk), title='<a & "b">\x1b' + "c" * 200).encode())
    assert picture.attrib["viewBox"] == f"0 0 {picture.attrib['width']} {picture.attrib['height']}"
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"data: 2 MiB (50.0%)", "hole,zero: 2 MiB (50.0%)", "4 MiB, 4 parts"} <= set(words)


def test_picture_of_nothing_is_one_all_the_same(connect):
    with connect(MemoryDisk(0)) as disk:
        assert "0 B, 0 parts" in svg(read_map(disk), title="nothing")
