"""The block hash, against nbdcopy's own answers and a reference of one line."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdcore.disk import BlockHash, combined
from nbdcore.errors import UsageError
from tests.disk.disks import block_hash


def of(data, algorithm="sha256", size=65536):
    return combined([BlockHash(algorithm, size).digests_of(data)], len(data), algorithm)


@given(
    st.lists(st.sampled_from([b"x", bytes(511), bytes(512), bytes(5000), b"\0" * 700 + b"y"]), max_size=8).map(b"".join),
    st.sampled_from(["sha256", "md5", "blake2b", "sha512_256"]),
    st.sampled_from([512, 1024, 4096]),
)
def test_it_is_the_hash_of_all_blocks_hashes_and_the_length(data, algorithm, size):
    assert of(data, algorithm, size) == block_hash(data, algorithm, size)


def test_an_algorithms_name_may_be_written_in_capitals():
    assert of(b"data", "SHA256") == block_hash(b"data")


@pytest.mark.parametrize("length", [0, 1, 512, 513, 512 * 4096 * 2, 512 * 4097 + 1])
def test_zeroes_have_the_digests_that_reading_them_gives(length):
    how = BlockHash("sha1", 512)
    parts = list(how.zero_digests(length))
    assert b"".join(digests for digests, _ in parts) == how.digests_of(bytes(length))
    assert sum(count for _, count in parts) == length


def test_a_zero_blocks_digest_is_computed_once():
    how = BlockHash()
    assert how.digest_of_block(bytes(65536)) is how.zero_digest(65536)


def test_digests_may_come_one_by_one_and_from_any_memory():
    data = random.Random(1).randbytes(200_000)
    how = BlockHash()
    view = memoryview(bytearray(data))
    digests = [how.digest_of_block(view[at : at + 65536]) for at in range(0, len(data), 65536)]
    assert combined(digests, len(data)) == block_hash(data)


@pytest.mark.parametrize("algorithm", ["", "sha3", "shake_128", "no such thing", "__doc__", "algorithms_guaranteed"])
def test_an_algorithm_that_has_no_fixed_digest_is_refused(algorithm):
    with pytest.raises(UsageError, match=r"there is no algorithm|have any length"):
        BlockHash(algorithm)


@pytest.mark.parametrize("size", [0, -512, 1, 256, 513, 65537, 3 << 16, 64 << 20])
def test_a_block_that_requests_cannot_begin_with_is_refused(size):
    with pytest.raises(UsageError, match="a power of two from 512 to 33554432 bytes"):
        BlockHash("sha256", size)


def test_it_is_shown_as_it_is_written():
    assert [str(BlockHash()), str(BlockHash("md5", 512)), str(BlockHash("sha1", 1 << 20))] == [
        "sha256/64k",
        "md5/512",
        "sha1/1024k",
    ]
