"""Who sleeps and who is awake: an account that nobody may be left on."""

from __future__ import annotations

from typing import Any

from nbdcore.clients.blocking.waiters import Crowd, Turn


class Awaited:
    """Something to wait for."""

    def __init__(self) -> None:
        self.completion: Any = None
        self.done = False


def asleep(crowd: Crowd) -> Turn:
    turn = Turn(Awaited(), (), any_of_several=False)
    crowd.lie_down(turn)
    return turn


def finish(turn: Turn) -> None:
    assert isinstance(turn.pending, Awaited)
    turn.pending.done = True
    turn.pending.completion()


def test_caller_with_its_outcome_leaves_the_rest_to_those_that_are_awake():
    crowd = Crowd()
    one, other = asleep(crowd), asleep(crowd)
    finish(one)
    finish(other)
    assert crowd.needs_nobody(one)
    assert not crowd.needs_nobody(other)
    assert not crowd.awake


def test_caller_whose_outcome_comes_at_its_deadline_is_not_taken_for_awake_ever_after():
    crowd = Crowd()
    other, late = asleep(crowd), asleep(crowd)
    finish(other)
    assert isinstance(late.pending, Awaited)
    late.pending.done = True  # its completion is about to be called, by another thread, and its deadline passes
    assert not crowd.needs_nobody(late)
    finish(late)
    crowd.get_up(late)
    assert [*crowd.awake] == [other.sleeper]
    assert not crowd.asleep
