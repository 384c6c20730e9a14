"""A bell wakes whoever waits for its descriptor, however often it was rung, and before it had one."""

from __future__ import annotations

import errno
import os
import select

import pytest

from nbdcore.streams import bell as bells
from nbdcore.streams.bell import Bell


@pytest.fixture
def bell():
    bell = Bell()
    yield bell
    bell.close()


def rings(bell):
    return bool(select.select([bell.fileno()], [], [], 0)[0])


def test_bell_rings_until_it_is_silenced(bell):
    assert not rings(bell)
    for _ in range(100_000):  # more than a socket has room for
        bell.release()
    assert rings(bell)
    while rings(bell):
        bell.silence()
    assert not bell.rung
    bell.release()
    assert rings(bell)


def test_bell_that_rang_before_it_had_a_descriptor_says_so(bell):
    bell.release()
    assert bell.rung
    bell.silence()
    assert not bell.rung
    assert not rings(bell)


class SilencedFirst:
    """An end of a bell that another thread silences just before it is sent to."""

    def __init__(self, bell):
        self._bell, self._end = bell, bell._ends[1]

    def send(self, data):
        self._bell.silence()
        return self._end.send(data)

    def close(self):
        self._end.close()


def test_bell_that_is_silenced_while_it_is_rung_does_not_ring_for_ever(bell):
    bell.fileno()
    bell._ends = (bell._ends[0], SilencedFirst(bell))
    bell.release()
    while bell.rung:  # as whoever waits for it does
        bell.silence()
    assert not rings(bell)


def test_bell_without_a_descriptor_is_none_to_wait_for(bell, monkeypatch):
    def none_left():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(bells, "connected_pair", none_left)
    assert bell.fileno() == -1
    bell.release()
    assert bell.rung


def test_closed_bell_may_be_rung(bell):
    bell.fileno()
    bell.close()
    bell.release()
    bell.close()
