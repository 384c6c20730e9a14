from __future__ import annotations

import functools
import itertools
import operator
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
@given(extents, st.sampled_from([(1, 1), (1, 512), (2, 512), (512, 512), (4096, 4096)]), st.integers(0, 10000))
def test_an_aligned_block_has_only_the_flags_of_all_its_bytes(told, sizes, start):
    minimum, block = sizes
    start -= start % minimum
    flat = per_byte(told)
    result = list(aligned(told, block, minimum=minimum, start=start))
    assert all(length > 0 and length % minimum == 0 for length, _ in result)
    expected = []
    at = 0
    while at < len(flat):
        end = min(at + block - (start + at) % block, len(flat))
        expected += [functools.reduce(operator.and_, flat[at:end])] * (end - at)
        at = end
    assert per_byte(result) == expected[: len(expected) - len(expected) % minimum]
    ends = itertools.accumulate(length for length, _ in result[:-1])
    assert all((start + end) % block == 0 for end in ends)


@pytest.mark.parametrize("length", [0, -1])
def test_an_extent_of_nothing_is_a_fault(length):
    with pytest.raises(ValueError, match="extent"):
        list(clipped([(length, 0)], 10))
