"""How a command hears of the signals that stop it."""

from __future__ import annotations

import signal
import sys
from typing import Self

import pytest

from nbdcore.cli.signals import until_signalled
from tests.alarms import watchdog


@pytest.fixture
def _harmless():
    """Have signals do nothing where nobody hears them; and a hanging call end the run."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    with watchdog():
        yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class At:
    """Sends this process a signal with the given call or return of a function in the block."""

    def __init__(self, moment: int, number: int) -> None:
        self.left = moment
        self.number = number

    def __enter__(self) -> Self:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)


@pytest.mark.usefixtures("_harmless")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_any_moment_of_starting_and_ending_is_no_error(number):
    moment, come = 0, True
    while come:
        moment += 1
        with At(moment, number) as at:
            until_signalled(lambda _: None)
        come = at.left <= 0
    assert moment > 20


@pytest.mark.usefixtures("_harmless")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_comes_before_the_wait_for_it_ends_the_run(number):
    def run(wait):
        try:
            signal.raise_signal(number)
            wait()
        finally:
            ended.append(True)

    ended = []
    until_signalled(run)
    assert ended == [True]
