"""A copy is equal, byte for byte and hole for hole, whatever both ends are; one that fails says where, and leaves no trap."""

from __future__ import annotations

import _thread
import asyncio
import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

import nbdcore
from nbdcore import aio
from nbdcore.disk import NULL, BlockHash, CopyError, checksum, copy
from nbdcore.disk.copying.ends import Range
from nbdcore.disk.copying.files import FileSource
from nbdcore.disk.copying.manifest import Finished
from nbdcore.disk.copying.moving import Crew, Mover, Rules
from nbdcore.disk.copying.plan import aligned, cut
from nbdcore.disk.copying.streams import StreamDestination
from nbdcore.disk.copying.zeroes import runs
from nbdcore.errors import UsageError
from nbdcore.server import ExportSettings, FileDisk, MemoryDisk, Server
from tests.leaks import none_left_open, settled

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets, named pipes and holes, as Windows lacks")

KIBIBYTE = 1 << 10
MEBIBYTE = 1 << 20
BLOCK = 4096
SIZE = 3 * MEBIBYTE


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    with none_left_open():
        yield
        settled(lambda: [thread for thread in threading.enumerate() if thread.name == "nbdcore-copy"])


@pytest.fixture
def serve(short_folder):
    """Starts a server on a unix socket, and gives its URI."""
    servers = []

    def start(exported):
        server = Server(exported)
        servers.append(server)
        listener = server.listen("unix", path=short_folder / f"socket-{len(servers)}")
        server.start()
        return server.uri(listener)

    yield start
    for server in servers:
        server.stop()


def image(path: Path, size: int = SIZE, seed: int = 1) -> Path:
    """Make a sparse file: islands of data, of any length at any place, some with zeroes in them."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(12):
            file.seek(chance.randrange(size))
            length = min(chance.choice([1, 511, BLOCK, 5000, 70_000, 300_000]), size - file.tell())
            file.write(chance.choice([chance.randbytes(length), bytes(length)]))
        file.truncate(size)
    return path


def disk_of(path: Path) -> MemoryDisk:
    """Return a disk in memory with a file's contents."""
    disk = MemoryDisk(path.stat().st_size)
    contents = path.read_bytes()
    for offset in range(0, len(contents), BLOCK):
        if any(contents[offset : offset + BLOCK]):
            disk.pwrite(contents[offset : offset + BLOCK], offset)
    return disk


def data_blocks(contents: bytes) -> set[int]:
    """Return the numbers of the blocks that are not zero."""
    return {at // BLOCK for at in range(0, len(contents), BLOCK) if any(contents[at : at + BLOCK])}


def allocated_blocks(path: Path) -> set[int]:
    """Return the numbers of the blocks that a file has room for."""
    found: set[int] = set()
    with path.open("rb") as file:
        size, at = path.stat().st_size, 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            found |= set(range(at // BLOCK, -(-end // BLOCK)))
            at = end
    return found


# ---------------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize("seed", range(3))
def test_copies_over_every_way_are_equal_and_have_the_same_holes(serve, tmp_path, seed):
    size = SIZE + seed * 1000
    origin = image(tmp_path / "origin", size, seed)
    first, second = (MemoryDisk(size) for _ in range(2))
    copy(origin, serve(first))
    copy(serve(first), serve(second), request_size=64 * KIBIBYTE)
    result = copy(serve(second), tmp_path / "copy", verify=True)
    contents = origin.read_bytes()
    assert (tmp_path / "copy").read_bytes() == contents
    assert allocated_blocks(tmp_path / "copy") == data_blocks(contents)
    assert result.copied + result.zeroes == result.size == result.verified == size
    assert len(data_blocks(contents)) * BLOCK - BLOCK < result.copied <= len(data_blocks(contents)) * BLOCK


def test_zeroes_are_written_onto_a_server_with_other_contents(serve, tmp_path):
    origin = image(tmp_path / "origin")
    target = MemoryDisk(SIZE + MEBIBYTE)
    target.pwrite(b"x" * (SIZE + MEBIBYTE), 0)
    copy(origin, serve(target))
    assert target.pread(SIZE, 0) == origin.read_bytes()
    assert target.pread(MEBIBYTE, SIZE) == b"x" * MEBIBYTE


def test_zeroes_among_data_are_not_written_unless_nobody_looks(serve, tmp_path):
    contents = bytearray(random.Random(3).randbytes(MEBIBYTE))
    contents[BLOCK : 5 * BLOCK] = bytes(4 * BLOCK)
    (tmp_path / "origin").write_bytes(contents)
    assert copy(tmp_path / "origin", tmp_path / "sparse").zeroes == 4 * BLOCK
    assert allocated_blocks(tmp_path / "sparse") == data_blocks(contents)
    assert copy(tmp_path / "origin", tmp_path / "full", sparse=0).zeroes == 0
    assert len(allocated_blocks(tmp_path / "full")) == MEBIBYTE // BLOCK
    assert copy(tmp_path / "origin", tmp_path / "coarse", sparse=64 * KIBIBYTE).zeroes == 0


def test_allocated_zeroes_take_up_room(serve, tmp_path):
    origin = image(tmp_path / "origin")
    copy(origin, tmp_path / "copy", allocated=True)
    assert (tmp_path / "copy").read_bytes() == origin.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 >= SIZE


def test_an_existing_file_has_nothing_of_its_own_left(tmp_path):
    origin = image(tmp_path / "origin")
    (tmp_path / "copy").write_bytes(b"x" * (SIZE + 7))
    copy(origin, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == origin.read_bytes()


def test_files_are_copied_where_the_system_does_not_read_at_an_offset(tmp_path):
    origin = image(tmp_path / "origin")
    script = """
import os, sys
from tests.portability.elsewhere import take_away
take_away()
for name in ("readv", "O_CLOEXEC"):
    delattr(os, name)
from nbdcore.disk import copy
copy(sys.argv[1], sys.argv[2], flush=True, verify=True, request_size=65536, resume=sys.argv[2] + ".manifest")
copy("-", sys.argv[3])
"""
    command = [sys.executable, "-c", script, origin, tmp_path / "copy", tmp_path / "streamed"]
    with origin.open("rb") as file:
        subprocess.run(command, stdin=file, timeout=30, check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "streamed").read_bytes() == origin.read_bytes()


def test_what_is_said_to_be_zero_already_is_not_zeroed(serve, tmp_path):
    (tmp_path / "origin").write_bytes(bytes(MEBIBYTE) + b"end")
    target = MemoryDisk(2 * MEBIBYTE)
    target.pwrite(b"was a lie", 0)
    copy(tmp_path / "origin", serve(target), destination_is_zero=True)
    assert target.pread(9, 0) == b"was a lie"
    assert target.pread(4, MEBIBYTE) == b"end\0"


@pytest.mark.parametrize("size", [0, 1, 10_000, 8 * BLOCK])
@pytest.mark.parametrize("maximum", [BLOCK, 16 * BLOCK])
def test_block_sizes_of_both_ends_are_obeyed(serve, tmp_path, size, maximum):
    room = size + -size % BLOCK + BLOCK
    origin = tmp_path / "origin"
    origin.write_bytes(random.Random(4).randbytes(size))
    target = MemoryDisk(room)
    target.pwrite(b"x" * room, 0)
    uri = serve(ExportSettings(target, block_sizes=(BLOCK, BLOCK, maximum)))
    copy(origin, uri)
    assert target.pread(room, 0) == origin.read_bytes() + b"x" * (room - size)
    copy(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == target.pread(room, 0)


def test_pipes_are_copied_in_order(serve, tmp_path):
    origin = image(tmp_path / "origin", 300_001)
    target = MemoryDisk(300_001)
    uri = serve(target)
    for source, destination in ((origin, "in"), ("out", uri)):
        fifo = tmp_path / destination if destination == "in" else tmp_path / "out"
        os.mkfifo(fifo)
        if destination == "in":
            reader = threading.Thread(target=lambda fifo=fifo: (tmp_path / "read").write_bytes(fifo.read_bytes()))
            reader.start()
            copy(source, fifo)
            reader.join()
        else:
            writer = threading.Thread(target=lambda fifo=fifo: fifo.write_bytes(origin.read_bytes()))
            writer.start()
            copy(fifo, destination)
            writer.join()
    assert (tmp_path / "read").read_bytes() == origin.read_bytes() == target.pread(300_001, 0)


def socket_ends():
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@pytest.mark.parametrize(("ends", "anew"), [(os.pipe, True), (os.pipe, False), (socket_ends, False)])
def test_no_write_to_a_stream_waits_for_its_reader_and_the_stream_stays_as_it_was(ends, anew, monkeypatch):
    if not anew:
        monkeypatch.setattr("nbdcore.disk.copying.streams._opened_anew", lambda pipe: pipe)
    reader, writer = ends()
    destination = StreamDestination("pipe", writer, owned=False)
    contents, got = random.Random(3).randbytes(300_000), bytearray()

    def read_some():
        got.extend(os.read(reader, MEBIBYTE))

    destination.waiting = read_some  # nobody else does, so that a write that waited would wait forever
    try:
        destination.write(memoryview(contents), 0)
        assert os.get_blocking(writer)
        destination.close()
        os.close(writer)
        while more := os.read(reader, MEBIBYTE):
            got.extend(more)
    finally:
        os.close(reader)
    assert got == contents


def test_open_clients_are_used_and_stay_open(serve, tmp_path):
    origin = image(tmp_path / "origin")
    with nbdcore.connect(serve(MemoryDisk(SIZE))) as disk:
        copy(origin, disk)
        assert copy(disk, NULL).size == SIZE
        assert disk.pread(BLOCK, 0) == origin.read_bytes()[:BLOCK]


def test_the_caller_hears_what_begins_and_how_far_it_is(serve, tmp_path):
    origin = image(tmp_path / "origin")
    begun, told = [], []
    result = copy(origin, serve(MemoryDisk(SIZE)), connections=2, started=begun.append, progress=told.append)
    [settings] = begun
    assert (settings.source.kind, settings.destination.kind, settings.connections) == ("file", "server", 2)
    assert (told[-1].done, told[-1].size, told[-1].copied) == (SIZE, SIZE, result.copied)


def test_a_server_that_takes_one_connection_gets_one(serve, tmp_path):
    begun = []
    origin = image(tmp_path / "origin")
    copy(origin, serve(ExportSettings(MemoryDisk(SIZE), multi_conn=False)), started=begun.append)
    assert begun[0].connections == 1


# ---------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_is_refused_and_nothing_is_changed(serve, tmp_path):
    origin = image(tmp_path / "origin")
    small = MemoryDisk(SIZE - 1)
    read_only = ExportSettings(MemoryDisk(SIZE), read_only=True)
    for destination, words in (
        (serve(small), "fewer than"),
        (serve(read_only), "read-only"),
        (origin, "the same file"),
    ):
        with pytest.raises(UsageError, match=words):
            copy(origin, destination)
    with pytest.raises(UsageError, match="destination, and no source"):
        copy(NULL, origin)
    for wrong in ({"sparse": 1000}, {"connections": 0}, {"changes": "map"}, {"checksum": "sha256", "resume": tmp_path / "m"}):
        with pytest.raises(UsageError):
            copy(origin, tmp_path / "copy", **wrong)
    assert origin.stat().st_size == SIZE
    assert not (tmp_path / "copy").exists()


def test_a_terminal_is_no_destination(tmp_path):
    origin = image(tmp_path / "origin", 1000)
    ours, theirs = os.openpty()
    try:
        with pytest.raises(UsageError, match="terminal"):
            copy(origin, Path(os.ttyname(theirs)))
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_bitmap_and_its_changes_are_refused_where_they_cannot_be(serve, tmp_path):
    origin, uri = image(tmp_path / "origin"), serve(MemoryDisk(SIZE))
    with pytest.raises(UsageError, match="no metadata context qemu:dirty-bitmap:monday"):
        copy(uri, NULL, bitmap="monday")
    with pytest.raises(UsageError, match="is no server"):
        copy(origin, NULL, bitmap="monday")
    with pytest.raises(UsageError, match="is a server"):
        copy(uri, NULL, apply=tmp_path / "map")
    for said in ("[]", "{}", '{"format": "nbdcore changes 1", "size": 5, "ranges": []}'):
        (tmp_path / "map").write_text(said)
        with pytest.raises(UsageError, match="map of"):
            copy(origin, NULL, apply=tmp_path / "map")


# ---------------------------------------------------------------------------------------------- failed


class Failing(MemoryDisk):
    """A disk on which a block cannot be read or written."""

    def __init__(self, size: int, bad: int) -> None:
        super().__init__(size)
        self._bad = bad

    def _fail(self, count: int, offset: int) -> None:
        if offset <= self._bad < offset + count:
            raise OSError(5, "bad block")

    def pread(self, count, offset):
        self._fail(count, offset)
        return super().pread(count, offset)

    def pwrite(self, data, offset):
        self._fail(len(data), offset)
        super().pwrite(data, offset)


def failing_source(serve):
    disk = Failing(SIZE, -1)
    disk.pwrite(random.Random(5).randbytes(SIZE), 0)
    disk._bad = 2 * MEBIBYTE + 5
    return serve(disk)


def test_a_read_error_names_the_range_and_removes_what_was_made(serve, tmp_path):
    with pytest.raises(CopyError, match=f"cannot read {MEBIBYTE} bytes at offset {2 * MEBIBYTE} of .* is removed") as error:
        copy(failing_source(serve), tmp_path / "copy")
    assert (error.value.offset, error.value.count) == (2 * MEBIBYTE, MEBIBYTE)
    assert not (tmp_path / "copy").exists()


def test_a_read_error_leaves_an_existing_file_too_short(serve, tmp_path):
    (tmp_path / "copy").write_bytes(bytes(SIZE))
    with pytest.raises(CopyError, match="is no complete copy"):
        copy(failing_source(serve), tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size < SIZE


def test_a_write_error_names_the_range(serve, tmp_path):
    (tmp_path / "origin").write_bytes(random.Random(6).randbytes(SIZE))
    with pytest.raises(CopyError, match=f"cannot write {MEBIBYTE} bytes at offset 0 of .* is no complete copy"):
        copy(tmp_path / "origin", serve(Failing(SIZE, 0)))


def test_a_server_that_dies_ends_the_copy(serve, tmp_path):
    origin = tmp_path / "origin"
    origin.write_bytes(random.Random(7).randbytes(SIZE))
    server = Server(FileDisk(origin))

    class Dying(MemoryDisk):
        def pwrite(self, data, offset):
            if offset >= MEBIBYTE:
                threading.Thread(target=server.stop, args=(0,)).start()
            super().pwrite(data, offset)

    listener = server.listen("unix", path=tmp_path / "s")
    server.start()
    with pytest.raises(CopyError, match="cannot read"):
        copy(server.uri(listener), serve(Dying(SIZE)), request_size=4 * KIBIBYTE, connections=1, requests=1)
    server.stop()


def test_a_verified_copy_that_differs_is_an_error(serve, tmp_path):
    class Forgetful(MemoryDisk):
        def pwrite(self, data, offset):
            super().pwrite(data if offset < MEBIBYTE else bytes(len(data)), offset)

    (tmp_path / "origin").write_bytes(random.Random(8).randbytes(SIZE))
    with pytest.raises(CopyError, match=f"first byte that does is at offset {MEBIBYTE}"):
        copy(tmp_path / "origin", serve(Forgetful(SIZE)), verify=True)


def test_what_progress_raises_ends_the_copy(tmp_path):
    origin = image(tmp_path / "origin")
    with pytest.raises(RuntimeError) as error:
        copy(origin, tmp_path / "copy", progress=lambda _: (_ for _ in ()).throw(RuntimeError("enough")))
    assert any("is removed" in note for note in error.value.__notes__)
    assert not (tmp_path / "copy").exists()


def test_a_second_interruption_closes_no_file_under_a_thread(serve, tmp_path):
    reading, victim = threading.Event(), tmp_path / "victim"

    class Stuck:
        size = SIZE

        def pread(self, count, _offset):
            reading.set()
            time.sleep(1.5)
            return b"x" * count

    def interrupted(_):
        if reading.is_set():
            threading.Timer(0.1, _thread.interrupt_main).start()
            raise KeyboardInterrupt

    with nbdcore.Client().connect(serve(Stuck())) as client:
        with pytest.raises(KeyboardInterrupt):
            copy(client, tmp_path / "copy", extents=False, request_size=64 * KIBIBYTE, progress=interrupted)
        with victim.open("wb"):
            settled(lambda: [thread for thread in threading.enumerate() if thread.name == "nbdcore-copy"])
    assert victim.read_bytes() == b""
    assert not (tmp_path / "copy").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_write_error_is_told_while_the_source_does_not_tell_its_extents(tmp_path):
    asked, told = threading.Event(), threading.Event()

    def pieces():
        yield Range(0, BLOCK, zero=False)
        asked.set()
        told.wait(10)

    class Full(StreamDestination):
        def write(self, view, offset):
            asked.wait(10)
            super().write(view, offset)

    source = FileSource("origin", os.open(image(tmp_path / "origin"), os.O_RDONLY))
    destination = Full("full", os.open("/dev/full", os.O_WRONLY), owned=True)
    rules = Rules(size=BLOCK, granule=0, allocated=False)
    crew = Crew(pieces(), lambda: Mover(source, destination, rules), 2, 2)
    begun = time.monotonic()
    with pytest.raises(CopyError, match="cannot write"):
        crew.run(lambda: None)
    assert time.monotonic() - begun < 5
    told.set()
    assert crew.wait(10)
    source.close()
    destination.close()


def test_standard_input_and_output_are_not_the_file_at_the_other_end(tmp_path):
    both = image(tmp_path / "both")
    before = both.read_bytes()
    for ends, opened in ((("-", both), {"stdin": both.open("rb")}), ((both, "-"), {"stdout": both.open("r+b")})):
        with next(iter(opened.values())):
            command = [sys.executable, "-m", "nbdcore", "copy", *ends]
            ran = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=30, check=False, **opened)
        assert (ran.returncode, "same file" in ran.stderr) == (1, True)
    assert both.read_bytes() == before


def test_changes_are_not_widened_to_the_blocks_of_a_server(serve, tmp_path):
    full, changes = MemoryDisk(SIZE), tmp_path / "changes"
    full.pwrite(b"f" * SIZE, 0)
    with changes.open("wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), b"c" * 512, 1024)
    (tmp_path / "map").write_text(
        json.dumps({"format": "nbdcore changes 1", "size": SIZE, "ranges": [{"offset": 1024, "length": 512, "zero": False}]})
    )
    uri = serve(ExportSettings(full, block_sizes=(BLOCK, BLOCK, MEBIBYTE)))
    with pytest.raises(UsageError, match="blocks of 4096 bytes"):
        copy(changes, uri, apply=tmp_path / "map")
    assert full.pread(SIZE, 0) == b"f" * SIZE


# ---------------------------------------------------------------------------------------------- checksums, resuming


@pytest.mark.parametrize("algorithm", ["sha256", BlockHash("md5", 4096)], ids=str)
def test_a_checksum_of_what_is_copied_is_that_of_the_disk(serve, tmp_path, algorithm):
    origin = image(tmp_path / "origin", SIZE + 77)
    expected = checksum(origin, block_hash=algorithm if isinstance(algorithm, BlockHash) else BlockHash(algorithm))
    result = copy(serve(disk_of(origin)), tmp_path / "copy", checksum=algorithm, request_size=8 * KIBIBYTE)
    assert result.digest == expected.digest.hex()


class Counting(MemoryDisk):
    """A disk that knows which bytes were read."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.read: list[tuple[int, int]] = []

    def pread(self, count, offset):
        self.read.append((offset, offset + count))
        return super().pread(count, offset)


def stop_after(size: int):
    def told(now):
        if now.done >= size:
            raise InterruptedError("enough")

    return told


def test_a_copy_goes_on_behind_what_is_finished(serve, tmp_path):
    disk = Counting(SIZE)
    disk.pwrite(random.Random(9).randbytes(SIZE), 0)
    uri, manifest = serve(disk), tmp_path / "manifest"
    how = {"resume": manifest, "request_size": 64 * KIBIBYTE, "synchronous": True}
    with pytest.raises(InterruptedError) as error:
        copy(uri, tmp_path / "copy", progress=stop_after(MEBIBYTE), **how)
    assert any("goes on from here" in note for note in error.value.__notes__)
    assert json.loads(manifest.read_text())["finished"] == [[0, MEBIBYTE]]
    assert (tmp_path / "copy").stat().st_size < SIZE
    disk.read.clear()
    result = copy(uri, tmp_path / "copy", **how)
    assert result.resumed == MEBIBYTE
    assert min(begin for begin, _ in disk.read) == MEBIBYTE
    assert (tmp_path / "copy").read_bytes() == MemoryDisk.pread(disk, SIZE, 0)
    assert not manifest.exists()


def test_a_manifest_of_another_copy_is_refused(serve, tmp_path):
    origin, manifest = image(tmp_path / "origin"), tmp_path / "manifest"
    with pytest.raises(InterruptedError):
        copy(origin, tmp_path / "copy", resume=manifest, progress=stop_after(0), synchronous=True)
    kept = manifest.read_text()
    with pytest.raises(UsageError, match="is of another copy"):
        copy(origin, tmp_path / "other", resume=manifest)
    assert not (tmp_path / "other").exists()
    (tmp_path / "copy").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="is of another copy"):
        copy(origin, tmp_path / "copy", resume=manifest)
    assert manifest.read_text() == kept
    manifest.write_text("{}")
    with pytest.raises(UsageError, match="no manifest"):
        copy(origin, tmp_path / "copy", resume=manifest)


def interrupted(origin, destination, manifest, **how):
    with pytest.raises(InterruptedError):
        copy(origin, destination, resume=manifest, progress=stop_after(MEBIBYTE), synchronous=True, extents=False, **how)


def test_a_file_that_was_truncated_is_not_gone_on_with(tmp_path):
    origin, manifest = tmp_path / "origin", tmp_path / "manifest"
    origin.write_bytes(random.Random(20).randbytes(SIZE))
    interrupted(origin, tmp_path / "copy", manifest)
    os.truncate(tmp_path / "copy", BLOCK)
    with pytest.raises(UsageError, match="what that lists is lost"):
        copy(origin, tmp_path / "copy", resume=manifest)


def test_a_copy_that_is_found_to_differ_begins_from_the_start(serve, tmp_path):
    class Forgetful(MemoryDisk):
        forgets = True

        def pwrite(self, data, offset):
            super().pwrite(bytes(len(data)) if self.forgets and offset else data, offset)

    origin, manifest, disk = tmp_path / "origin", tmp_path / "manifest", Forgetful(SIZE)
    origin.write_bytes(random.Random(21).randbytes(SIZE))
    uri = serve(disk)
    with pytest.raises(CopyError, match=r"differs from .* is no complete copy .EIO.$"):
        copy(origin, uri, resume=manifest, verify=True)
    disk.forgets = False
    copy(origin, uri, resume=manifest)
    assert disk.pread(SIZE, 0) == origin.read_bytes()


def test_nothing_is_listed_after_a_flush_that_failed(serve, tmp_path):
    class Lossy(MemoryDisk):
        flushes = 0

        def flush(self):
            self.flushes += 1
            if self.flushes == 2:
                raise OSError(5, "data were lost")

    origin, manifest = tmp_path / "origin", tmp_path / "manifest"
    origin.write_bytes(random.Random(22).randbytes(SIZE))
    with pytest.raises(CopyError, match="data were lost"):
        copy(origin, serve(Lossy(SIZE)), resume=manifest)
    assert json.loads(manifest.read_text())["finished"] == []


def test_what_a_copy_writes_beside_must_not_be_an_end_of_it_or_nowhere(serve, tmp_path):
    origin, existing = image(tmp_path / "origin"), tmp_path / "existing"
    existing.write_bytes(b"precious")
    for manifest, destination in ((tmp_path / "new", tmp_path / "new"), (tmp_path / "nowhere" / "manifest", existing)):
        with pytest.raises(UsageError, match=r"end of the copy|there is no folder"):
            copy(origin, destination, resume=manifest)
    with pytest.raises(UsageError, match="no manifest"):
        copy(origin, existing, resume=origin)
    assert existing.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing", "origin"]


def test_what_a_part_lacks_is_not_taken_for_finished(serve, tmp_path):
    origin, manifest, uri = tmp_path / "origin", tmp_path / "manifest", serve(MemoryDisk(SIZE))
    origin.write_bytes(random.Random(23).randbytes(SIZE))
    (tmp_path / "map").write_text(json.dumps({"format": "nbdcore changes 1", "size": SIZE, "ranges": []}))
    interrupted(origin, uri, manifest)
    with pytest.raises(UsageError, match="its part was"):
        copy(origin, uri, resume=manifest, apply=tmp_path / "map")


# ---------------------------------------------------------------------------------------------- arithmetic


def test_only_whole_blocks_of_zeroes_are_zero():
    ranges = [Range(0, 100, False), Range(100, 20_000, True), Range(20_100, 380, False), Range(20_480, 1000, True)]
    assert [*aligned(ranges, BLOCK, 21_480)] == [
        Range(0, BLOCK, False),
        Range(BLOCK, 3 * BLOCK, True),
        Range(4 * BLOCK, BLOCK, False),
        Range(5 * BLOCK, 1000, True),
    ]


def test_planned_ranges_cover_what_was_asked_for_in_blocks():
    chance = random.Random(10)
    for _ in range(200):
        size = chance.randrange(1, 100)
        edges = sorted({0, size, *(chance.randrange(size) for _ in range(6))})
        given = [Range(a, b - a, chance.random() < 0.5) for a, b in pairwise(edges)]
        given = [one for one in given if chance.random() < 0.8]
        block = chance.choice([1, 4, 8])
        kinds = {at: one.zero for one in given for at in range(one.offset, one.end)}
        planned = [*cut(aligned(given, block, size), 16)]
        assert all(one.offset % block == 0 and (one.end % block == 0 or one.end == size) for one in planned)
        assert all(a.end <= b.offset for a, b in pairwise(planned))
        covered = {at: one.zero for one in planned for at in range(one.offset, one.end)}
        for at, zero in kinds.items():
            assert at in covered
            assert zero or not covered[at]
        for at, zero in covered.items():  # only blocks of which a part was asked for, and zero only where all of a block is
            block_of = range(at - at % block, min(at - at % block + block, size))
            assert any(each in kinds for each in block_of)
            assert not zero or all(kinds.get(each) for each in block_of)


def test_finished_ranges_are_left_out():
    chance = random.Random(11)
    for _ in range(200):
        finished, done = Finished(), set()
        for _ in range(chance.randrange(8)):
            begin = chance.randrange(100)
            end = begin + chance.randrange(1, 20)
            finished.add(begin, end)
            done |= set(range(begin, end))
        listed = [*finished]
        assert {at for begin, end in listed for at in range(begin, end)} == done
        assert all(a[1] < b[0] for a, b in pairwise(listed))
        assert finished.total() == len(done)
        ranges = [Range(0, 30, False), Range(30, 10, True), Range(60, 40, False)]
        left = [at for one in finished.left_of(ranges) for at in range(one.offset, one.end)]
        assert left == [at for one in ranges for at in range(one.offset, one.end) if at not in done]


def test_runs_of_zeroes_are_found_to_the_byte():
    chance = random.Random(12)
    for _ in range(100):
        count = chance.randrange(1, 5000)
        memory = bytearray(b"".join(chance.choice([bytes(512), b"\0" * 100 + b"a" * 412, b"b" * 512]) for _ in range(10)))
        found = [*runs(memory, count, 512)]
        assert [at for at, _, _ in found] == [0, *(at + length for at, length, _ in found)][:-1]
        assert sum(length for _, length, _ in found) == count
        for at, length, zero in found:
            for begin in range(at, at + length, 512):
                assert any(memory[begin : min(begin + 512, count)]) is not zero


def test_a_new_file_has_the_mode_of_other_tools(tmp_path):
    copy(image(tmp_path / "origin", 1000), tmp_path / "copy")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o644 & ~mask


# ---------------------------------------------------------------------------------------------- asyncio


def test_a_copy_in_a_task_is_equal_and_tells_the_loop(serve, tmp_path):
    origin = image(tmp_path / "origin")
    told = []

    async def main():
        loop = asyncio.get_running_loop()
        result = await aio.copy(
            origin, serve(MemoryDisk(SIZE)), progress=lambda now: told.append((now, asyncio.get_running_loop() is loop))
        )
        await asyncio.sleep(0)
        return result

    assert asyncio.run(main()).size == SIZE
    assert [now.done for now, in_loop in told if in_loop][-1] == SIZE


class Slow(MemoryDisk):
    """A disk of which each read takes a while."""

    def pread(self, count, offset):
        time.sleep(0.05)
        return super().pread(count, offset)


def test_a_cancelled_copy_ends_soon_and_leaves_nothing(serve, tmp_path):
    disk = Slow(256 * MEBIBYTE)
    disk.pwrite(b"x" * MEBIBYTE, 0)
    uri = serve(disk)

    async def main():
        begun = asyncio.Event()
        task = asyncio.create_task(aio.copy(uri, tmp_path / "copy", extents=False, started=lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
        assert not (tmp_path / "copy").exists()

    asyncio.run(main())


async def cancelled_soon(task):
    await asyncio.sleep(0.3)
    task.cancel()
    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begun < 2


def test_a_copy_that_waits_for_a_pipe_is_cancelled_soon(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    holding = os.open(tmp_path / "pipe", os.O_RDWR)

    async def main():
        await cancelled_soon(asyncio.create_task(aio.copy(tmp_path / "pipe", tmp_path / "copy")))
        assert not (tmp_path / "copy").exists()

    try:
        asyncio.run(main())
    finally:
        os.close(holding)


def test_a_copy_to_a_pipe_that_nobody_empties_is_cancelled_soon(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    holding = os.open(tmp_path / "pipe", os.O_RDWR)

    async def main():
        begun = asyncio.Event()
        copying = aio.copy(image(tmp_path / "origin"), tmp_path / "pipe", started=lambda _: begun.set())
        task = asyncio.create_task(copying)
        await begun.wait()
        await cancelled_soon(task)

    try:
        asyncio.run(main())
    finally:
        os.close(holding)


def test_a_copy_that_connects_is_cancelled_soon_and_changes_nothing(tmp_path, short_folder):
    (tmp_path / "copy").write_bytes(b"precious")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(short_folder / "mute"))
        mute.listen()
        uri = f"nbd+unix:///?socket={short_folder / 'mute'}"

        async def main():
            await cancelled_soon(asyncio.create_task(aio.copy(uri, tmp_path / "copy")))

        begun = time.monotonic()
        asyncio.run(main())
        assert time.monotonic() - begun < 5
    assert (tmp_path / "copy").read_bytes() == b"precious"


def test_what_a_callback_raises_in_the_loop_ends_the_copy(serve, tmp_path):
    disk = Slow(1024 * MEBIBYTE)

    def refuse(_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as error:
        asyncio.run(aio.copy(serve(disk), tmp_path / "copy", extents=False, progress=refuse))
    assert any("is removed" in note for note in error.value.__notes__)
