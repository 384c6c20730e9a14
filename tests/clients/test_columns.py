"""Extents as columns: the same as extents as objects, with numpy and without, whatever the layout and the server's cuts."""

from __future__ import annotations

import gc
import pickle
import sys
import tracemalloc
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdcore import (
    CombinedExtent,
    CombinedExtentColumns,
    CommandError,
    DeadlineExceeded,
    Extent,
    ExtentColumns,
    Phase,
    UsageError,
)
from nbdcore.clients.extents.walking import ExtentWalk
from nbdcore.protocol.constants import CommandType
from nbdcore.protocol.transmission.commands import Command, StatusChunk
from nbdcore.testing.scripted import answer, drain, error, goodbye, serve, status
from tests.clients.talking import DONE, PATIENCE, talk
from tests.clients.test_extents import BITMAP, KIB, SIZE, TWO, WHOLE, kib, not_done, of_map, plain, replies

ways = pytest.mark.parametrize("installed", [True, False], ids=["numpy", "no numpy"])


@contextmanager
def numpy_if(installed: bool) -> Iterator[type]:
    """Make numpy importable or not; gives the type that columns have then."""
    with pytest.MonkeyPatch.context() as patch:
        if not installed:
            patch.setitem(sys.modules, "numpy", None)
        yield np.ndarray if installed else array


def rows(found: ExtentColumns | CombinedExtentColumns) -> list[Extent | CombinedExtent]:
    """Return columns as the objects that they stand for."""
    offsets, lengths = map(int, found.offsets), map(int, found.lengths)
    if isinstance(found, ExtentColumns):
        return [Extent(*row) for row in zip(offsets, lengths, map(int, found.flags), strict=True)]
    flags = zip(*(map(int, column) for column in found.flags), strict=True)
    return [CombinedExtent(*row) for row in zip(offsets, lengths, flags, strict=True)]


# ---------------------------------------------------------------------------------------------- any layout


@st.composite
def conversations(draw):
    """A disk's status in each context, and what is asked of it: (layouts, unit in bytes, first unit, units, random)."""
    units = draw(st.integers(1, 24))
    contexts = draw(st.integers(1, 3))
    layouts = [draw(st.lists(st.integers(0, 2), min_size=units, max_size=units)) for _ in range(contexts)]
    first = draw(st.integers(0, units))
    count = draw(st.integers(0, units - first))
    return layouts, 1 << draw(st.sampled_from([0, 9, 27, 58])), first, count, draw(st.randoms(use_true_random=False))


def reply(random, layout, unit, first, last, name) -> list[StatusChunk]:
    """Describe at least one unit from `first` on, perhaps fewer or more than were asked for, cut anywhere, in chunks."""
    described = random.randint(first + 1, last if random.random() < 0.5 else len(layout))
    lengths: list[int] = []
    flags: list[int] = []
    for at in range(first, described):
        if flags and flags[-1] == layout[at] and random.random() < 0.5:
            lengths[-1] += unit
        else:
            lengths.append(unit)
            flags.append(layout[at])
    code = "I" if max(lengths) < 1 << 32 and random.random() < 0.5 else "Q"
    cut = random.randint(1, len(lengths))
    parts = [(lengths[:cut], flags[:cut]), (lengths[cut:], flags[cut:])]
    return [StatusChunk(name, array(code, part), array(code, status)) for part, status in parts if part]


def walked(layouts, unit, first, count, random, *, columns):
    """Walk over part of a disk; returns what comes out, as objects."""
    names = [f"context {number}" for number in range(len(layouts))]
    walk = ExtentWalk(names, first * unit, count * unit, columns=columns)
    found = []
    while walk.position < walk.end:
        command = Command(int(CommandType.BLOCK_STATUS), 0, walk.position, walk.end - walk.position)
        for name, layout in zip(names, layouts, strict=True):
            command.chunks += reply(random, layout, unit, walk.position // unit, walk.end // unit, name)
        before = walk.position
        if columns:
            walk.take_in(command)
        else:
            found += walk.feed(command)
        assert before < walk.position <= walk.end
    return rows(walk.columns()) if columns else found


def model(layouts, unit, first, count):
    """Return what must come out."""
    found: list[list] = []
    for at in range(first, first + count):
        status = tuple(layout[at] for layout in layouts)
        if found and found[-1][2] == status:
            found[-1][1] += unit
        else:
            found.append([at * unit, unit, status])
    if len(layouts) == 1:
        return [Extent(offset, length, flags) for offset, length, (flags,) in found]
    return [CombinedExtent(*row) for row in found]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(conversations())
def test_any_layout_comes_out_the_same_as_objects_and_as_columns(conversation):
    *layouts, random = conversation
    expected = model(*layouts)
    assert walked(*layouts, random, columns=False) == expected
    for installed in (True, False):
        with numpy_if(installed):
            assert walked(*layouts, random, columns=True) == expected


# ---------------------------------------------------------------------------------------------- through a client


@ways
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("past_request", [False, True])
@pytest.mark.parametrize("at_most", [1, 2, 100])
def test_columns_are_the_same_however_the_server_cuts_them(at_most, past_request, extended, installed):
    server = serve(of_map(WHOLE, at_most=at_most, past_request=past_request))
    with numpy_if(installed) as column, talk(server, size=SIZE, extended=extended) as (client, _):
        for where in ({}, {"offset": 10 * KIB, "count": 30 * KIB}, {"offset": 60 * KIB}, {"count": KIB}):
            found = client.extent_columns(timeout=PATIENCE, **where)
            assert {type(each) for each in (found.offsets, found.lengths, found.flags)} == {column}
            assert rows(found) == list(client.extents(timeout=PATIENCE, **where))


@ways
@pytest.mark.parametrize(("first_cut", "second_cut"), [(1, 1), (2, 1), (1, 100), (100, 100)])
def test_columns_of_several_contexts_go_in_lock_step(first_cut, second_cut, installed):
    other = kib((4, 1), (20, 0), (40, 1))
    both = replies(
        lambda request: not_done(of_map(WHOLE, at_most=first_cut), request), of_map(other, context=7, at_most=second_cut)
    )
    with numpy_if(installed) as column, talk(serve(both), size=SIZE, **TWO) as (client, _):
        found = client.extent_columns("base:allocation", BITMAP, timeout=PATIENCE)
        assert isinstance(found, CombinedExtentColumns)
        assert [type(each) for each in found.flags] == [column, column]
        expected = [(0, 4, (0, 1)), (4, 4, (0, 0)), (8, 16, (3, 0)), (24, 8, (3, 1)), (32, 16, (0, 1)), (48, 16, (2, 1))]
        assert plain(rows(found)) == expected


@ways
def test_flags_and_lengths_of_64_bits_are_kept_whole(installed):
    size = (1 << 63) - 1
    extents = [(1 << 62, (1 << 64) - 1), (size - (1 << 62), 1 << 32)]
    with numpy_if(installed), talk(answer(status(1, extents)), size=size, extended=True) as (client, _):
        assert rows(client.extent_columns(timeout=PATIENCE)) == [
            Extent(0, 1 << 62, (1 << 64) - 1),
            Extent(1 << 62, size - (1 << 62), 1 << 32),
        ]


@ways
@pytest.mark.parametrize("size", [1 << 20, (1 << 63) - 1, (1 << 64) - 512])
@pytest.mark.parametrize("quarters", [3, 4])
def test_chunks_of_one_context_that_pass_the_end_together_are_an_error(installed, size, quarters):
    """Each begins where the one before ended. One that tells all anew would be taken for what follows the end."""
    described = size * quarters // 4
    pieces = replies(*(status(1, [(described, number)], done=number == 3) for number in range(4)))
    with numpy_if(installed), talk(answer(pieces), size=size, extended=True) as (client, _):
        with pytest.raises(CommandError, match="past the end"):
            client.extent_columns(timeout=PATIENCE)
        assert client.phase is Phase.CONNECTED


@ways
def test_columns_of_an_empty_range_ask_nothing_and_are_empty(installed):
    with numpy_if(installed), talk(goodbye, size=SIZE, **TWO) as (client, _):
        assert len(client.extent_columns(count=0)) == 0
        assert rows(client.extent_columns("base:allocation", BITMAP, offset=SIZE)) == []
        client.disconnect(timeout=PATIENCE)


@ways
@pytest.mark.parametrize("said", [DONE, status(9, kib((64, 0))), status(1, [(0, 0)])], ids=["nothing", "a stranger", "no bytes"])
def test_a_server_that_does_not_advance_is_an_error_and_no_endless_loop(said, installed):
    with numpy_if(installed), talk(answer(said), answer(DONE, kind=CommandType.FLUSH), size=SIZE) as (client, _):
        with pytest.raises(CommandError) as caught:
            client.extent_columns(timeout=PATIENCE)
        assert caught.value.errno == 71
        assert client.phase is Phase.CONNECTED
        client.flush(timeout=PATIENCE)


@ways
def test_an_extent_past_the_end_is_an_error_of_columns_too(installed):
    with numpy_if(installed), talk(answer(status(1, [(SIZE + 1, 0)])), size=SIZE) as (client, _):
        with pytest.raises(CommandError, match="past the end"):
            client.extent_columns(timeout=PATIENCE)
        client.close()


def test_an_error_half_way_leaves_the_client_usable():
    server = [answer(of_map(WHOLE, at_most=2)), answer(error(5)), answer(of_map(WHOLE))]
    with talk(*server, size=SIZE) as (client, _):
        with pytest.raises(CommandError):
            client.extent_columns(timeout=PATIENCE)
        assert len(client.extent_columns(timeout=PATIENCE)) == 4


def test_the_timeout_is_for_each_request_of_columns():
    with talk(answer(of_map(WHOLE, at_most=2)), drain, size=SIZE) as (client, _):
        with pytest.raises(DeadlineExceeded):
            client.extent_columns(timeout=0.05)
        client.close()


def test_wrong_arguments_of_columns_are_a_usage_error():
    with talk(goodbye, size=SIZE) as (client, _):
        with pytest.raises(UsageError, match="no part of the export"):
            client.extent_columns(offset=1, count=SIZE)
        with pytest.raises(UsageError, match="metadata context qemu:x is not selected"):
            client.extent_columns("qemu:x")
        client.disconnect(timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- the values


@ways
def test_columns_are_values(installed):
    with numpy_if(installed), talk(serve(of_map(WHOLE)), size=SIZE) as (client, _):
        found, again = (client.extent_columns(timeout=PATIENCE) for _ in range(2))
        part = client.extent_columns(count=KIB, timeout=PATIENCE)
    assert found == again == pickle.loads(pickle.dumps(found))
    assert found != part
    assert found != "columns"
    assert found != CombinedExtentColumns(found.offsets, found.lengths, (found.flags,))
    assert (len(found), repr(found)) == (4, "<ExtentColumns: 4 extents>")
    with pytest.raises(AttributeError):
        found.offsets = part.offsets
    with pytest.raises(TypeError, match="unhashable"):
        hash(found)
    match found:
        case ExtentColumns(offsets, lengths, flags):
            assert (offsets is found.offsets, lengths is found.lengths, flags is found.flags) == (True, True, True)


def test_with_and_without_numpy_columns_are_equal():
    outcomes = []
    for installed in (True, False):
        with numpy_if(installed), talk(serve(of_map(WHOLE)), size=SIZE) as (client, _):
            outcomes.append(client.extent_columns(timeout=PATIENCE))
    assert outcomes[0] == outcomes[1]
    assert (np.asarray(outcomes[1].offsets) == outcomes[0].offsets).all()


def test_numpy_columns_can_be_computed_with():
    with talk(serve(of_map(WHOLE)), size=SIZE) as (client, _):
        found = client.extent_columns(timeout=PATIENCE)
    assert int(found.lengths[found.flags & 2 != 0].sum()) == 40 * KIB
    assert found.offsets.dtype == found.lengths.dtype == found.flags.dtype == np.uint64
    found.offsets[0] += np.uint64(1)  # they are the caller's
    assert found.offsets[0] == 1


@ways
def test_columns_cost_no_more_than_is_said(installed):
    count = 1 << 17
    command = Command(int(CommandType.BLOCK_STATUS), 0, 0, count * 512)
    command.chunks.append(StatusChunk("a", array("I", [512]) * count, array("I", [0, 3]) * (count // 2)))
    with numpy_if(installed):
        tracemalloc.start()
        try:
            walk = ExtentWalk(["a"], 0, count * 512, columns=True)
            walk.take_in(command)
            found = walk.columns()
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(found) == count
    assert left < count * 24 * 9 // 8  # arrays grow a little ahead


# ---------------------------------------------------------------------------------------------- objects made many at a time


def test_extents_of_a_walk_are_like_any_other():
    with talk(serve(of_map(WHOLE)), size=SIZE) as (client, _):
        made = next(iter(client.extents(timeout=PATIENCE)))
    usual = Extent(0, 8 * KIB, 0)
    assert type(made) is Extent
    assert (made, hash(made), repr(made)) == (usual, hash(usual), repr(usual))
    assert pickle.loads(pickle.dumps(made)) == usual
    with pytest.raises(AttributeError):
        made.offset = 1
    match made:
        case Extent(offset, length, flags):
            assert (offset, length, flags) == (0, 8 * KIB, 0)


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_walk_makes_more_objects_than_fit_one_piece(contexts):
    count = 20_000
    names = ["a", "b"][:contexts]
    walk = ExtentWalk(names, 0, count * 512)
    command = Command(int(CommandType.BLOCK_STATUS), 0, 0, count * 512)
    for name in names:
        command.chunks.append(StatusChunk(name, array("I", [512]) * count, array("I", [0, 3]) * (count // 2)))
    found = list(walk.feed(command))
    assert [extent.offset for extent in found] == list(range(0, count * 512, 512))
    assert {extent.length for extent in found} == {512}
    assert found[-1].flags == (3 if contexts == 1 else (3, 3))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_walk_leaves_the_garbage_collector_as_it_was(enabled):
    walk = ExtentWalk(["a"], 0, 1024)
    command = Command(int(CommandType.BLOCK_STATUS), 0, 0, 1024)
    command.chunks.append(StatusChunk("a", array("I", [512, 512]), array("I", [0, 3])))
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert len(list(walk.feed(command))) == 2
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
