"""Leaving a loop in which many commands are queued: the work grows with their number, and not with its square."""

from __future__ import annotations

import errno
import random

import pytest

from nbdcore.clients.session.group import Group
from nbdcore.errors import DeadlineExceeded
from nbdcore.protocol import wire
from nbdcore.protocol.constants import CommandType
from nbdcore.protocol.transmission.commands import Command
from tests.protocol.harness import broken_off, connected, success

MANY = 2000
COUNT = 16
GIVEN_UP = DeadlineExceeded(errno.ETIMEDOUT, "not wanted any more")


class Compared(Command):
    """A read that counts how often one is compared with another: what a search through a queue comes down to."""

    __slots__ = ()
    comparisons = 0

    def __eq__(self, other):
        Compared.comparisons += 1
        return self is other

    __hash__ = Command.__hash__


@pytest.fixture(autouse=True)
def count_anew():
    Compared.comparisons = 0


def reads(count):
    return [Compared(CommandType.READ, 0, COUNT * number, COUNT) for number in range(count)]


def queued(count=MANY):
    client = connected()
    several = reads(count)
    client.engine.submit_all(several)
    return client, several


ORDERS = {
    "forwards": lambda several: several,
    "backwards": lambda several: several[::-1],
    "in any order": lambda several: random.Random(1).sample(several, len(several)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_queued_commands_are_given_up_without_a_search(order):
    client, several = queued()
    for command in ORDERS[order](several):
        client.engine.abandon(command, GIVEN_UP)
    assert Compared.comparisons == 0
    assert all(command.done and command.error is GIVEN_UP for command in several)
    assert client.engine.pending == 0
    assert not client.engine.has_outgoing
    assert client.speak() == b""


def test_unsent_commands_are_given_up_together_without_a_search():
    client, several = queued()
    client.engine.abandon_unsent(GIVEN_UP)
    assert Compared.comparisons == 0
    assert all(command.error is GIVEN_UP for command in several)
    assert not client.engine.has_outgoing


def test_connection_of_a_command_is_found_without_a_search():
    (one, ones), (other, others) = queued(), queued()
    group = Group([one.engine, other.engine])
    for mine, engine in ((ones, one.engine), (others, other.engine)):
        assert all(group.owner(command) is engine for command in mine)
        assert all(engine.knows(command) for command in mine)
    assert not any(one.engine.knows(command) for command in others)
    assert not one.engine.knows(reads(1)[0])
    assert Compared.comparisons == 0


def test_command_is_known_until_it_is_done():
    client, (command,) = queued(1)
    assert client.engine.knows(command)
    client.speak()
    assert client.engine.knows(command)
    client.hear(success("structured", command, bytes(COUNT)))
    assert not client.engine.knows(command)


@pytest.mark.parametrize("kept", [{0}, {MANY - 1}, {0, MANY - 1}, {MANY // 2}, set(range(0, MANY, 7))])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_left_is_sent_whole_and_in_order(order, kept):
    client, several = queued()
    for command in ORDERS[order]([command for number, command in enumerate(several) if number not in kept]):
        client.engine.abandon(command, GIVEN_UP)
    assert client.engine.pending == len(kept)
    assert client.engine.has_outgoing
    before = client.engine.traffic.chunks_sent
    sent = client.speak()
    size = wire.REQUEST.size
    cookies = [wire.REQUEST.unpack_from(sent, at)[3] for at in range(0, len(sent), size)]
    assert cookies == [several[number].cookie for number in sorted(kept)]
    assert client.engine.traffic.chunks_sent == before + len(kept)
    assert client.engine.pending == len(kept)
    client.hear(b"".join(success("structured", several[number], bytes(COUNT)) for number in sorted(kept)))
    assert client.engine.pending == 0


def test_connection_that_ends_completes_none_of_those_given_up_again():
    client, several = queued(10)
    completed = []
    for command in several:
        command.completion = completed.append
    for command in several[2:5]:
        client.engine.abandon(command, GIVEN_UP)
    client.engine.end()
    assert len(completed) == 10
    assert sorted(command.cookie for command in completed) == [command.cookie for command in several]
    assert client.engine.pending == 0


def test_shutdown_completes_none_of_those_given_up_again():
    client, several = queued(1)
    client.speak()
    more = reads(5)
    completed = []
    for command in more:
        command.completion = completed.append
        client.engine.submit(command)
    client.engine.abandon(more[2], GIVEN_UP)
    client.hear(broken_off("structured", several[0], 108))
    assert len(completed) == 5
    assert more[2].error is GIVEN_UP
    assert client.engine.finished_sending


def test_command_that_was_never_submitted_may_be_given_up():
    client, several = queued(3)
    stranger = reads(1)[0]
    client.engine.abandon(stranger, GIVEN_UP)
    assert stranger.done
    assert client.engine.pending == 3
    assert len(client.speak()) == 3 * wire.REQUEST.size
    assert several[0].cookie in client.engine.in_flight
