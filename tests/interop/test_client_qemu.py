from __future__ import annotations

import errno

import pytest

import nbdcore
from tests.interop.images import add_dirty_bitmap, contents, pattern, qcow2_image, raw_image
from tests.interop.programs import QEMU_NBD_10, run
from tests.interop.servers import qemu_nbd

TIMEOUT = 20
MiB = 1 << 20
GiB = 1 << 30

pytestmark = pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io", QEMU_NBD_10)

both = pytest.mark.parametrize("binary", ["qemu-nbd", QEMU_NBD_10])


def opened(server, **options):
    return nbdcore.connect(server.uri, timeout=TIMEOUT, **options)


@both
def test_raw_image_reads_and_writes_what_the_file_holds(tmp_path, binary):
    data = {MiB: pattern(65536), 5 * MiB: pattern(4096, seed=1)}
    image = raw_image(tmp_path / "disk.raw", 8 * MiB, data)
    with qemu_nbd(image, binary=binary, export="disk") as server, opened(server) as disk:
        assert disk.pread(8 * MiB, 0, timeout=TIMEOUT) == contents(8 * MiB, data)
        disk.pwrite(b"written", 3 * MiB, fua=True, timeout=TIMEOUT)
        disk.zero(65536, MiB, timeout=TIMEOUT)
        disk.flush(timeout=TIMEOUT)
    expected = contents(8 * MiB, {3 * MiB: b"written", 5 * MiB: data[5 * MiB]})
    assert image.read_bytes() == expected


@both
def test_qcow2_image_with_a_dirty_bitmap_gives_both_contexts_in_step(tmp_path, binary):
    image = qcow2_image(tmp_path / "disk.qcow2", 8 * GiB, {0: pattern(65536)})
    add_dirty_bitmap(image, "changes", [(MiB, 65536), (6 * GiB, 65536)])
    contexts = ["base:allocation", "qemu:dirty-bitmap:changes"]
    server = qemu_nbd(image, format="qcow2", binary=binary, bitmap="changes", read_only=True)
    with server as running, opened(running, contexts=contexts) as disk:
        assert disk.contexts == tuple(contexts)
        dirty = [(it.offset, it.length) for it in disk.extents(contexts[1], timeout=TIMEOUT) if it.flags]
        assert dirty == [(MiB, 65536), (6 * GiB, 65536)]
        combined = list(disk.extents(*contexts, timeout=TIMEOUT))
        assert [(it.offset, it.length, it.flags) for it in combined] == [
            (0, 65536, (0, 0)),
            (65536, MiB - 65536, (3, 0)),
            (MiB, 65536, (0, 1)),
            (MiB + 65536, 6 * GiB - MiB - 65536, (3, 0)),
            (6 * GiB, 65536, (0, 1)),
            (6 * GiB + 65536, 2 * GiB - 65536, (3, 0)),
        ]


def test_extended_headers_cover_more_than_4_gib_in_one_request(tmp_path):
    image = qcow2_image(tmp_path / "disk.qcow2", 16 * GiB, {10 * GiB: pattern(65536)})
    with qemu_nbd(image, format="qcow2", binary=QEMU_NBD_10) as server, opened(server) as disk:
        assert disk.extended_headers
        [extent] = disk.block_status(10 * GiB, 0, req_one=True, timeout=TIMEOUT)["base:allocation"]
        assert (extent.length, extent.flags) == (10 * GiB, 3)
        disk.zero(12 * GiB, 0, timeout=60)
        assert disk.pread(65536, 10 * GiB, timeout=TIMEOUT) == bytes(65536)
        data = pattern(3 * MiB)
        disk.pwrite(data, 9 * GiB + 1, timeout=TIMEOUT)
        assert disk.pread(len(data), 9 * GiB + 1, timeout=TIMEOUT) == data


def test_extended_headers_that_were_not_wanted_are_not_used(tmp_path):
    image = raw_image(tmp_path / "disk.raw", MiB)
    with qemu_nbd(image, binary=QEMU_NBD_10) as server, opened(server, extended_headers=False) as disk:
        assert not disk.extended_headers
        assert disk.structured_replies
        assert disk.pread(4, 0, timeout=TIMEOUT) == bytes(4)


def test_block_status_of_some_contexts_only_is_asked_with_a_payload(tmp_path):
    image = qcow2_image(tmp_path / "disk.qcow2", GiB)
    add_dirty_bitmap(image, "changes", [(MiB, 65536)])
    contexts = ["base:allocation", "qemu:dirty-bitmap:changes"]
    server = qemu_nbd(image, format="qcow2", binary=QEMU_NBD_10, bitmap="changes", read_only=True)
    with server as running, opened(running, contexts=contexts) as disk:
        assert disk.can_block_status_payload
        assert list(disk.block_status(GiB, 0, contexts=contexts[1:], timeout=TIMEOUT)) == contexts[1:]


@both
def test_unknown_export_is_a_negotiation_error_with_the_servers_words(tmp_path, binary):
    image = raw_image(tmp_path / "disk.raw", MiB)
    with qemu_nbd(image, binary=binary, export="disk") as server:
        with pytest.raises(nbdcore.NegotiationError, match="'nope'") as caught:
            nbdcore.connect(server.uri_of("nope"), timeout=TIMEOUT)
        assert caught.value.errno == errno.ENOENT
        assert "not present" in caught.value.server_text


def test_fast_zero_of_a_range_that_is_a_hole_already_is_fast(tmp_path):
    image = raw_image(tmp_path / "disk.raw", 4 * MiB, {0: pattern(MiB)})
    with qemu_nbd(image) as server, opened(server) as disk:
        assert disk.can_fast_zero
        disk.zero(MiB, 2 * MiB, fast_zero=True, timeout=TIMEOUT)
        assert disk.pread(MiB, 2 * MiB, timeout=TIMEOUT) == bytes(MiB)


def test_image_written_through_nbd_passes_qemus_own_check(tmp_path):
    image = qcow2_image(tmp_path / "disk.qcow2", 64 * MiB)
    data = pattern(5 * MiB)
    with qemu_nbd(image, format="qcow2") as server, opened(server) as disk:
        disk.pwrite(data, 7 * MiB, timeout=TIMEOUT)
        disk.trim(MiB, 7 * MiB, timeout=TIMEOUT)
        disk.flush(timeout=TIMEOUT)
    run("qemu-img", "check", image)
    with qemu_nbd(image, format="qcow2") as server, opened(server) as disk:
        assert disk.pread(4 * MiB, 8 * MiB, timeout=TIMEOUT) == data[MiB:]


def test_server_that_ends_after_its_first_client_sees_a_clean_goodbye(tmp_path):
    image = raw_image(tmp_path / "disk.raw", MiB)
    with qemu_nbd(image, persistent=False) as server:
        with opened(server) as disk:
            disk.pwrite(b"x", 0, timeout=TIMEOUT)
        assert server.process.wait(TIMEOUT) == 0
