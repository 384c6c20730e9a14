from __future__ import annotations

import errno

import pytest

import nbdcore
from tests.interop.images import pattern
from tests.interop.servers import nbdkit

pytestmark = pytest.mark.interop("nbdkit")

TIMEOUT = 20
MiB = 1 << 20


def opened(uri, **options):
    return nbdcore.connect(uri, timeout=TIMEOUT, **options)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_memory_disk_keeps_what_is_written(tcp):
    data = pattern(3 * MiB)
    with nbdkit("memory", "16M", tcp=tcp) as server, opened(server.uri) as disk:
        disk.pwrite(data, 12345, timeout=TIMEOUT)
        disk.flush(timeout=TIMEOUT)
        assert disk.pread(len(data), 12345, timeout=TIMEOUT) == data
        assert disk.pread(12345, 0, timeout=TIMEOUT) == bytes(12345)


def test_requests_beyond_any_maximum_are_split():
    with nbdkit("memory", "256M") as server, opened(server.uri) as disk:
        data = pattern(100 * MiB)
        disk.pwrite(data, 1, fua=True, timeout=60)
        buffer = bytearray(100 * MiB)
        assert disk.pread_into(buffer, 1, timeout=60) == len(buffer)
        assert buffer == data


@pytest.mark.parametrize(
    ("options", "protocol", "structured"),
    [
        (["--oldstyle"], "oldstyle", False),
        (["--mask-handshake=0"], "newstyle", False),
        (["--mask-handshake=1"], "newstyle-fixed", True),
        (["--mask-handshake=2"], "newstyle", False),
        (["--mask-handshake=3"], "newstyle-fixed", True),
        (["--no-sr"], "newstyle-fixed", False),
    ],
)
def test_every_age_of_handshake_reaches_the_same_disk(options, protocol, structured):
    data = pattern(200_000)
    with nbdkit(*options, "memory", "1M") as server, opened(server.uri) as disk:
        assert (disk.protocol, disk.structured_replies, disk.size) == (protocol, structured, MiB)
        disk.pwrite(data, 3, timeout=TIMEOUT)
        assert disk.pread(len(data), 3, timeout=TIMEOUT) == data
        assert disk.pread(100, 0, timeout=TIMEOUT) == bytes(3) + data[:97]


def test_extents_of_a_data_disk_are_its_pieces():
    with nbdkit("data", "@0x1000 1 2 3 @0x100000 0xff*1000", "size=2M") as server, opened(server.uri) as disk:
        assert [(piece.offset, piece.length, piece.zero) for piece in disk.extents(timeout=TIMEOUT)] == [
            (0, 32768, False),
            (32768, MiB - 32768, True),
            (MiB, 32768, False),
            (MiB + 32768, MiB - 32768, True),
        ]
        assert disk.pread(4, 0x1000, timeout=TIMEOUT) == b"\1\2\3\0"


def test_extents_of_a_sparse_random_disk_tell_the_truth():
    with nbdkit("sparse-random", "64M", "seed=7") as server, opened(server.uri) as disk:
        extents = list(disk.extents(timeout=TIMEOUT))
        assert sum(extent.length for extent in extents) == disk.size
        assert len({extent.zero for extent in extents}) == 2
        for extent in extents:
            assert not extent.zero or not any(disk.pread(extent.length, extent.offset, timeout=TIMEOUT))


def test_clipped_extents_begin_and_end_where_asked():
    with nbdkit("data", "@0x8000 1", "size=1M") as server, opened(server.uri) as disk:
        extents = list(disk.extents(offset=1000, count=100_000, timeout=TIMEOUT))
        assert (extents[0].offset, extents[-1].end) == (1000, 101_000)


def test_pattern_disk_beyond_4_gib_is_addressed_right():
    with nbdkit("pattern", "8G") as server, opened(server.uri) as disk:
        for offset in (0, (1 << 32) - 8, (1 << 32), (8 << 30) - 16):
            expected = offset.to_bytes(8, "big") + (offset + 8).to_bytes(8, "big")
            assert disk.pread(16, offset, timeout=TIMEOUT) == expected


def test_zero_trim_and_cache_beyond_4_gib_loop():
    with nbdkit("memory", "9G") as server, opened(server.uri) as disk:
        disk.pwrite(b"x" * 65536, 5 << 30, timeout=TIMEOUT)
        disk.zero(9 << 30, 0, timeout=60)
        assert disk.pread(65536, 5 << 30, timeout=TIMEOUT) == bytes(65536)
        disk.trim(9 << 30, 0, timeout=60)
        disk.cache(9 << 30, 0, timeout=60)
        assert [(extent.length, extent.zero) for extent in disk.extents(timeout=TIMEOUT)] == [(9 << 30, True)]


def test_strict_block_sizes_are_obeyed():
    policy = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"]
    data = pattern(MiB)
    with nbdkit("memory", "64M", *policy, filters=["blocksize-policy"]) as server, opened(server.uri) as disk:
        size = disk.block_size
        assert (size.minimum, size.preferred, size.maximum, size.advertised) == (512, 4096, 65536, True)
        disk.pwrite(data, 512, timeout=TIMEOUT)
        assert disk.pread(len(data), 512, timeout=TIMEOUT) == data
        disk.zero(32 * MiB, 0, timeout=TIMEOUT)
        disk.trim(64 * MiB, 0, timeout=TIMEOUT)
        with pytest.raises(nbdcore.UsageError, match="multiples of 512 bytes"):
            disk.pread(100, 0)


def test_failed_read_is_the_servers_error_and_the_connection_lives():
    with (
        nbdkit("memory", "1M", "error-pread=EIO", "error-pread-rate=100%", filters=["error"]) as server,
        opened(server.uri) as disk,
    ):
        with pytest.raises(nbdcore.CommandError) as caught:
            disk.pread(4096, 512, timeout=TIMEOUT)
        assert caught.value.errno == errno.EIO
        assert "read of 4096 bytes at offset 512" in str(caught.value)
        disk.pwrite(b"alive", 0, timeout=TIMEOUT)


def test_large_split_read_that_fails_leaves_the_connection_in_step():
    script = ["get_size=echo 256M", "pread=if [ $4 -ge 67108864 ]; then echo ENOSPC bad >&2; exit 1; fi; head -c $3 /dev/zero"]
    with nbdkit("eval", *script) as server, opened(server.uri) as disk:
        with pytest.raises(nbdcore.CommandError) as caught:
            disk.pread(200 * MiB, 0, timeout=60)
        assert caught.value.errno == errno.ENOSPC
        assert disk.pread(4, 0, timeout=TIMEOUT) == bytes(4)


def test_command_that_the_server_lacks_is_refused_before_it_is_sent():
    with nbdkit("eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero") as server, opened(server.uri) as disk:
        assert disk.read_only
        assert not disk.can_trim
        with pytest.raises(nbdcore.UsageError) as caught:
            disk.pwrite(b"x", 0)
        assert caught.value.errno == errno.EPERM
        with pytest.raises(nbdcore.UsageError):
            disk.trim(512, 0)


def test_slow_server_runs_into_the_deadline_and_the_connection_stays_usable():
    script = ["get_size=echo 1M", "pread=if [ $4 -eq 0 ]; then sleep 2; fi; head -c $3 /dev/zero"]
    with nbdkit("eval", *script) as server, opened(server.uri) as disk:
        buffer = bytearray(b"\xff" * 4096)
        with pytest.raises(nbdcore.DeadlineExceeded):
            disk.pread_into(buffer, 0, timeout=0.2)
        assert disk.pread(16, 4096, timeout=TIMEOUT) == bytes(16)
        assert buffer == b"\xff" * 4096


def test_exports_of_a_server_are_listed():
    names = "list_exports=echo NAMES; echo first; echo 'second one'"
    with nbdkit("eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", names) as server:
        assert [export.name for export in nbdcore.list_exports(server.uri, timeout=TIMEOUT)] == ["first", "second one"]
        with opened(server.uri) as disk:
            assert [export.name for export in disk.list_exports(timeout=TIMEOUT)] == ["first", "second one"]


def test_export_description_and_canonical_name_are_learnt():
    script = ["get_size=echo 1M", "pread=head -c $3 /dev/zero", "default_export=echo main", "export_description=echo the disk"]
    with nbdkit("eval", *script) as server, opened(server.uri) as disk:
        assert (disk.export_name, disk.description) == ("main", "the disk")


def test_killed_server_is_one_clear_error_and_nothing_hangs():
    with nbdkit("memory", "1M") as server, opened(server.uri) as disk:
        server.kill()
        with pytest.raises(nbdcore.Disconnected):
            disk.pread(4096, 0, timeout=TIMEOUT)
        assert disk.phase in (nbdcore.Phase.CLOSED, nbdcore.Phase.DEAD)
        with pytest.raises(nbdcore.Disconnected, match="it ended with"):
            disk.flush()


def test_opt_mode_asks_one_option_at_a_time():
    with nbdkit("memory", "1M") as server, nbdcore.Client(opt_mode=True).connect(server.uri, timeout=TIMEOUT) as client:
        assert client.phase is nbdcore.Phase.NEGOTIATING
        assert client.opt_list(timeout=TIMEOUT) == [nbdcore.Export("")]
        assert client.opt_info(timeout=TIMEOUT).size == MiB
        assert "base:allocation" in client.opt_list_meta_context(timeout=TIMEOUT)
        assert client.opt_set_meta_context(["base:allocation"], timeout=TIMEOUT) == ["base:allocation"]
        client.opt_go(timeout=TIMEOUT)
        assert client.pread(4, 0, timeout=TIMEOUT) == bytes(4)
