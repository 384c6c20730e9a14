"""Completions: once each, after the bytes at hand, whatever they do themselves, and however the connection ends."""

from __future__ import annotations

import pytest

from nbdcore.errors import Disconnected, ProtocolViolation
from nbdcore.protocol.constants import Option
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from tests.protocol.harness import MODES, ack, connected, error_chunk, export, feed, greeting, newborn, said, simple, success

all_modes = pytest.mark.parametrize("mode", MODES)


def flushes(client, number):
    return [commands.flush(client.engine.limits) for _ in range(number)]


@all_modes
def test_completion_may_submit(mode):
    client = connected(mode)
    engine = client.engine
    seen = []

    def again(command):
        seen.append(command.cookie)
        if len(seen) < 100:
            follower = commands.flush(engine.limits)
            follower.completion = again
            engine.submit(follower)

    first = commands.flush(engine.limits)
    first.completion = again
    engine.submit(first)
    while engine.pending:
        said(engine)
        feed(engine, b"".join(success(mode, command) for command in list(engine.in_flight.values())))

    assert seen == list(range(1, 101))


@all_modes
def test_completions_run_after_all_replies_at_hand_were_taken_in(mode):
    client = connected(mode)
    five = flushes(client, 5)
    states = []
    for command in five:
        command.completion = lambda _: states.append([other.done for other in five])
        client.engine.submit(command)
    client.speak()

    feed(client.engine, b"".join(success(mode, command) for command in five))

    assert states == [[True] * 5] * 5


@all_modes
def test_replies_before_a_broken_one_complete_their_commands_with_success(mode):
    client = connected(mode)
    first, second, third = flushes(client, 3)
    client.submit(first, second, third)

    client.hear(success(mode, first) + success(mode, second) + b"\xff" * 64)

    assert client.engine.phase is Phase.DEAD
    assert first.error is None
    assert second.error is None
    assert isinstance(third.error, ProtocolViolation)
    for command in client.commands:
        assert client.completed_once(command)


def test_completion_of_a_reply_before_a_broken_one_may_submit_in_vain():
    client = connected("simple")
    engine = client.engine
    follower = commands.flush(engine.limits)
    follower.completion = client._completed
    first = commands.flush(engine.limits)
    first.completion = lambda _: engine.submit(follower)
    engine.submit(first)
    client.speak()

    client.hear(simple(first) + b"\xff" * 64)

    assert engine.phase is Phase.DEAD
    assert client.completed_once(follower)
    assert isinstance(follower.error, ProtocolViolation)


def test_end_of_the_connection_completes_everything_once_in_flight_queued_and_half_answered():
    client = connected("structured")
    limits = client.engine.limits
    read = commands.read(limits, 1 << 16, 0)
    client.submit(read, *flushes(client, 3))
    for command in flushes(client, 3):
        client.queue(command)
    client.hear(success("structured", read, bytes(1 << 16))[:1000])

    reason = Disconnected(0, "gone")
    client.engine.fail(reason)
    client.engine.fail(reason)
    client.engine.received_eof()

    for command in client.commands:
        assert client.completed_once(command)
        assert command.error is reason
    assert client.engine.pending == 0


def test_first_error_of_a_command_is_kept_when_the_connection_ends():
    client = connected("structured")
    (command,) = flushes(client, 1)
    client.submit(command).hear(error_chunk("structured", command, 28))
    client.engine.fail(Disconnected(0, "gone"))

    assert command.error.errno == 28
    assert client.completed_once(command)


def test_completion_may_not_submit_once_the_connection_has_ended():
    client = connected("structured")
    engine = client.engine
    refusals = []

    def again(_):
        with pytest.raises(Disconnected) as refusal:
            engine.submit(commands.flush(engine.limits))
        refusals.append(refusal.value)

    for command in flushes(client, 2):
        command.completion = again
        engine.submit(command)
    engine.fail(Disconnected(0, "gone"))

    assert len(refusals) == 2
    assert engine.pending == 0


def test_completion_may_end_the_connection():
    client = connected("simple")
    engine = client.engine
    reason = Disconnected(0, "enough")
    first, *others = flushes(client, 4)
    client.submit(*others)
    first.completion = lambda _: engine.fail(reason)
    engine.submit(first)
    client.speak()

    client.hear(simple(others[0]) + simple(first) + simple(others[1]))

    assert engine.phase is Phase.DEAD
    assert [command.error for command in (first, *others)] == [None, None, None, reason]
    for command in others:
        assert client.completed_once(command)


def test_completion_may_give_up_another_command():
    client = connected("simple")
    engine = client.engine
    first, second, third = flushes(client, 3)
    client.submit(second, third)
    reason = Disconnected(0, "enough")
    first.completion = lambda _: [engine.abandon(command, reason) for command in (second, third)]
    engine.submit(first)
    client.speak()

    client.hear(simple(first) + simple(second))

    assert second.error is None
    assert third.error is reason
    assert client.completed_once(second)
    assert client.completed_once(third)


class Mistake(Exception):
    """What a completion of ours raises."""


def fail_loudly(_):
    raise Mistake


@pytest.mark.parametrize("ending", ["replies", "violation", "fail"])
def test_completion_that_raises_keeps_no_other_from_running_and_is_heard_of(ending):
    client = connected("simple")
    engine = client.engine
    first, second, third = flushes(client, 3)
    client.submit(second, third)
    first.completion = fail_loudly
    engine.submit(first)
    client.speak()

    script = simple(first) + simple(second) + (simple(third) if ending == "replies" else b"\xff" * 64)
    with pytest.raises(Mistake):
        engine.fail(Disconnected(0, "gone")) if ending == "fail" else feed(engine, script)

    for command in (second, third):
        assert client.completed_once(command)
    assert engine.phase is (Phase.CONNECTED if ending == "replies" else Phase.DEAD)
    assert engine.pending == 0


def test_handshake_whose_completion_raises_is_over_all_the_same():
    client = newborn(structured_replies=False)
    client.exchange.completion = fail_loudly
    client.hear(greeting())

    with pytest.raises(Mistake):
        client.engine.fail(Disconnected(0, "gone"))

    assert client.exchange.done
    assert client.engine.phase is Phase.DEAD


def test_completion_of_the_handshake_may_submit():
    client = newborn(structured_replies=False)
    engine = client.engine
    client.exchange.completion = lambda _: engine.submit(commands.flush(engine.limits))
    client.hear(greeting() + export() + ack(Option.GO))

    assert list(engine.in_flight) == [1]
    client.hear(simple(1))
    assert engine.pending == 0


@all_modes
@pytest.mark.parametrize("place", [1, 9], ids=["by itself", "in a run"])
def test_exception_in_the_middle_of_decoding_loses_no_outcome(mode, place):
    """Ctrl-C may come anywhere; here it is memory that cannot be written to any more. Whoever moves bytes ends the connection."""
    client = connected(mode)
    reads = [commands.read(client.engine.limits, 8, 0, target=memoryview(bytearray(8))) for _ in range(12)]
    client.submit(*reads)
    reads[place].target.release()
    reason = Disconnected(0, "given up")

    with pytest.raises(ValueError, match="released"):
        client.hear(b"".join(success(mode, read, b"12345678") for read in reads))
    client.engine.fail(reason)

    for number, read in enumerate(reads):
        assert client.completed_once(read)
        assert read.error is (None if number < place else reason)
