"""Who is parked and who is woken: an account that nobody may be left on."""

from __future__ import annotations

from typing import Any

import pytest

from nbdcore.clients.blocking.waiters import Wait, Waiters
from nbdcore.streams.waiting import NEVER


class Awaited:
    """Something to wait for."""

    def __init__(self) -> None:
        self.completion: Any = None
        self.done = False


def parked(waiters: Waiters) -> Wait:
    wait = Wait(Awaited(), (), any_of_several=False)
    waiters.park(wait)
    return wait


def finish(wait: Wait) -> None:
    assert isinstance(wait.pending, Awaited)
    wait.pending.done = True
    wait.pending.completion()


def test_caller_with_its_outcome_leaves_the_rest_to_those_that_are_woken():
    waiters = Waiters()
    one, other = parked(waiters), parked(waiters)
    finish(one)
    finish(other)
    assert waiters.may_leave(one)
    assert not waiters.may_leave(other)
    assert not waiters.woken


def test_caller_whose_outcome_comes_at_its_deadline_is_not_taken_for_woken_ever_after():
    waiters = Waiters()
    other, late = parked(waiters), parked(waiters)
    finish(other)
    assert isinstance(late.pending, Awaited)
    late.pending.done = True  # its completion is about to be called, by another thread, and its deadline passes
    assert not waiters.may_leave(late)
    finish(late)
    waiters.unpark(late)
    assert [*waiters.woken] == [other.parker]
    assert not waiters.parked


class InterruptedAfterwards:
    """A lock, where a signal handler raises when it has been released."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def release(self) -> None:
        self._lock.release()
        raise KeyboardInterrupt


class InterruptedBefore:
    """A gate at which a signal handler raises before it has opened, once."""

    def __init__(self) -> None:
        self.opened = 0

    def release(self) -> None:
        self.opened += 1
        if self.opened == 1:
            raise KeyboardInterrupt


def test_caller_is_woken_though_a_signal_handler_interrupts_whoever_wakes_it():
    waiters, gate = Waiters(), InterruptedBefore()
    wait = Wait(Awaited(), (), any_of_several=True, gate=gate)
    parker = waiters.park(wait)
    with pytest.raises(KeyboardInterrupt):
        parker.wake()
    assert gate.opened == 2
    assert [*waiters.woken] == [parker]
    assert not waiters.parked
    assert not waiters.waiting_for_any


def test_lock_that_is_open_when_a_signal_handler_raises_is_no_error():
    waiters = Waiters()
    wait = parked(waiters)
    parker = wait.parker
    assert parker is not None
    parker._gate = InterruptedAfterwards(parker._lock)
    with pytest.raises(KeyboardInterrupt):
        parker.wake()
    parker.park(NEVER)  # returns at once
