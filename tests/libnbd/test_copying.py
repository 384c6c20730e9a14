"""A whole disk of 1 GiB copied by code that only knows libnbd, as migration tools have it, and compared with its source."""

from __future__ import annotations

import random
import struct

import pytest

import nbdcore
import nbdcore.libnbd as nbd
from nbdcore.libnbd.handle import NBD
from tests.interop.servers import nbdkit

pytestmark = pytest.mark.interop("nbdkit")

DISK = 1 << 30
PIECE = 1 << 20
DEPTH = 16


def copy(source: NBD, target: NBD) -> list[int]:
    """Copy what is data, piece by piece, with buffers that go from one handle to the other; return the offsets written."""
    written: list[int] = []

    def is_read(buffer, offset, error):
        assert error.value == 0
        target.aio_pwrite(buffer, offset, lambda error: is_written(offset, error))
        return 1

    def is_written(offset, error):
        assert error.value == 0
        written.append(offset)
        return 1

    for offset, length in pieces(source):
        while source.aio_in_flight() + target.aio_in_flight() >= DEPTH:
            progress(source, target)
        buffer = nbd.Buffer(length)
        source.aio_pread(buffer, offset, lambda error, buffer=buffer, offset=offset: is_read(buffer, offset, error))
    while source.aio_in_flight() > 0 or target.aio_in_flight() > 0:
        progress(source, target)
    target.flush()
    return written


def progress(*handles: NBD) -> None:
    """Wait for whichever handle has waited for longest, and let the others do what they can."""
    busy = [handle for handle in handles if handle.aio_in_flight() > 0]
    busy[0].poll(-1)
    for handle in busy[1:]:
        handle.poll(0)


def pieces(source: NBD):
    """Yield offset and length of what the source says is data."""
    end, offset = source.get_size(), 0
    while offset < end:
        extents: list[int] = []
        source.block_status(
            min(end - offset, 0xFFFF0000), offset, lambda _, __, entries, ___, found=extents: found.extend(entries)
        )
        for length, flags in zip(extents[::2], extents[1::2], strict=True):
            if not flags & nbd.STATE_ZERO:
                yield from ((at, min(PIECE, offset + length - at)) for at in range(offset, offset + length, PIECE))
            offset += length


def test_disk_of_1_gib_is_copied_whole_between_two_servers(handles):
    source, target = handles(), handles()
    source.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    source.connect_systemd_socket_activation(["nbdkit", "--exit-with-parent", "pattern", "1G"])
    with nbdkit("memory", "1G") as server:
        target.connect_uri(server.uri)

        written = copy(source, target)

        assert sorted(written) == list(range(0, DISK, PIECE))
        uri = source.get_uri()
        with nbdcore.connect(server.uri) as copied, nbdcore.connect(uri) as original:
            for offset in range(0, DISK, 8 << 20):
                assert copied.pread(8 << 20, offset) == original.pread(8 << 20, offset)
            for word in random.Random(1).sample(range(DISK // 8), 1000):
                assert struct.unpack(">Q", copied.pread(8, 8 * word)) == (8 * word,)
        target.shutdown()
        source.shutdown()
