"""Who is parked and who is woken: an account that nobody may be left on."""

from __future__ import annotations

from typing import Any

from nbdcore.clients.blocking.waiters import Wait, Waiters


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
