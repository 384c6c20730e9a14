from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdcore.server.ranges import aligned, clipped, merged

extents = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 3)), max_size=20)


def per_byte(told):
    return [flags for length, flags in told for _ in range(length)]


@settings(deadline=None)
@given(extents, st.integers(1, 10000))
def test_clipping_keeps_every_byte_inside_the_range(told, count):
    assert per_byte(clipped(told, count)) == per_byte(told)[:count]


@settings(deadline=None)
@given(extents)
def test_merging_keeps_every_byte_and_leaves_no_equal_neighbours(told):
    result = list(merged(told))
    assert per_byte(result) == per_byte(told)
    assert all(before[1] != after[1] for before, after in pairwise(result))


@settings(deadline=None)
@given(extents, st.sampled_from([1, 2, 512]))
def test_an_aligned_block_has_only_the_flags_of_all_its_bytes(told, block):
    flat = per_byte(told)
    result = list(aligned(told, block))
    assert all(length > 0 and length % block == 0 for length, _ in result)
    expected = []
    for start in range(0, len(flat) - len(flat) % block, block):
        common = 3
        for flags in flat[start : start + block]:
            common &= flags
        expected += [common] * block
    assert per_byte(result) == expected


@pytest.mark.parametrize("length", [0, -1])
def test_an_extent_of_nothing_is_a_fault(length):
    with pytest.raises(ValueError, match="extent"):
        list(clipped([(length, 0)], 10))
