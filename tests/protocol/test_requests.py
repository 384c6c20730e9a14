"""Requests on the wire: golden bytes of every command, bursts, payloads in place and apart, and sends that stop anywhere."""

from __future__ import annotations

import pytest

from nbdcore.errors import Disconnected, UsageError
from nbdcore.protocol.constants import CommandFlag
from nbdcore.protocol.engine import INLINE_PAYLOAD, Engine
from nbdcore.protocol.handshake.agreement import Settings
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from tests.protocol.harness import SIZE, connected, greeting, newborn, none, oldstyle, simple

CONTEXTS = ((1, b"base:allocation"), (2, b"x:y"))
OFFSET = 0x10200
ALL_FLAGS = {
    "read": CommandFlag.DF,
    "write": CommandFlag.FUA,
    "trim": CommandFlag.FUA,
    "zero": CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    "cache": 0,
    "status": CommandFlag.REQ_ONE,
    "filtered": CommandFlag.REQ_ONE,
    "flush": 0,
}
BUILD = {
    "read": lambda limits, **flags: commands.read(limits, 0x600, OFFSET, **flags),
    "write": lambda limits, **flags: commands.write(limits, memoryview(b"abc"), OFFSET, **flags),
    "trim": lambda limits, **flags: commands.trim(limits, 0x600, OFFSET, **flags),
    "zero": lambda limits, **flags: commands.zero(limits, 0x600, OFFSET, **flags),
    "cache": lambda limits, **flags: commands.cache(limits, 0x600, OFFSET, **flags),
    "status": lambda limits, **flags: commands.block_status(limits, 0x600, OFFSET, **flags),
    "filtered": lambda limits, **flags: commands.block_status(limits, 0x600, OFFSET, context_ids=(2,), **flags),
    "flush": commands.flush,
    "disconnect": lambda _limits: commands.disconnect(),
}
# magic, flags, type, cookie, offset, length; then the payload
COMPACT = {
    "read": "25609513 0004 0000 0000000000000001 0000000000010200 00000600",
    "write": "25609513 0001 0001 0000000000000001 0000000000010200 00000003 616263",
    "trim": "25609513 0001 0004 0000000000000001 0000000000010200 00000600",
    "zero": "25609513 0013 0006 0000000000000001 0000000000010200 00000600",
    "cache": "25609513 0000 0005 0000000000000001 0000000000010200 00000600",
    "status": "25609513 0008 0007 0000000000000001 0000000000010200 00000600",
    "flush": "25609513 0000 0003 0000000000000001 0000000000000000 00000000",
    "disconnect": "25609513 0000 0002 0000000000000001 0000000000000000 00000000",
}
EXTENDED = {
    "read": "21e41c71 0004 0000 0000000000000001 0000000000010200 0000000000000600",
    "write": "21e41c71 0021 0001 0000000000000001 0000000000010200 0000000000000003 616263",
    "trim": "21e41c71 0001 0004 0000000000000001 0000000000010200 0000000000000600",
    "zero": "21e41c71 0013 0006 0000000000000001 0000000000010200 0000000000000600",
    "cache": "21e41c71 0000 0005 0000000000000001 0000000000010200 0000000000000600",
    "status": "21e41c71 0008 0007 0000000000000001 0000000000010200 0000000000000600",
    "filtered": "21e41c71 0028 0007 0000000000000001 0000000000010200 000000000000000c 0000000000000600 00000002",
    "flush": "21e41c71 0000 0003 0000000000000001 0000000000000000 0000000000000000",
    "disconnect": "21e41c71 0000 0002 0000000000000001 0000000000000000 0000000000000000",
}
GOLDEN = [("structured", call, golden) for call, golden in COMPACT.items()] + [
    ("extended", call, golden) for call, golden in EXTENDED.items()
]


def build(client, call, *, flags=None):
    limits = client.engine.limits
    flags = ALL_FLAGS.get(call, 0) if flags is None else flags
    return BUILD[call](limits, **({"flags": flags} if flags else {}))


@pytest.mark.parametrize(("mode", "call", "golden"), GOLDEN, ids=lambda part: part if len(part) < 20 else "")
def test_request_is_these_bytes(mode, call, golden):
    client = connected(mode, contexts=CONTEXTS)

    client.submit(build(client, call))

    assert bytes(client.said) == bytes.fromhex(golden)


@pytest.mark.parametrize(("mode", "call", "golden"), GOLDEN, ids=lambda part: part if len(part) < 20 else "")
def test_request_is_the_same_when_the_stream_takes_one_byte_at_a_time(mode, call, golden):
    client = connected(mode, contexts=CONTEXTS)
    client.queue(build(client, call))

    sent = bytearray()
    while parts := client.engine.outgoing():
        sent += parts[0][:1]
        client.engine.sent(1)

    assert bytes(sent) == bytes.fromhex(golden)
    assert not client.engine.has_outgoing


def test_length_of_64_bits_fills_its_field():
    client = connected("extended", size=(1 << 64) - 1)
    client.submit(commands.zero(client.engine.limits, (1 << 64) - 1, 0))

    assert bytes(client.said[-16:]) == bytes(8) + b"\xff" * 8


def test_cookies_count_up():
    client = connected()
    cookies = [client.engine.submit(commands.flush(client.engine.limits)) for _ in range(300)]

    assert cookies == list(range(1, 301))
    assert set(client.engine.in_flight) == set()
    client.speak()
    assert list(client.engine.in_flight) == cookies


def test_burst_of_small_requests_is_one_part():
    client = connected()
    for call in ("read", "flush", "write", "trim", "cache"):
        client.queue(build(client, call))

    parts = client.engine.outgoing()

    assert len(parts) == 1
    assert len(parts[0]) == 5 * 28 + 3


def test_nothing_is_packed_until_it_is_to_be_sent_and_nothing_twice():
    client = connected()
    client.queue(build(client, "flush"))
    assert client.engine.has_outgoing

    first = client.engine.outgoing()
    assert client.engine.outgoing() is first
    client.engine.sent(28)

    assert client.engine.outgoing() == []
    assert not client.engine.has_outgoing


@pytest.mark.parametrize(("length", "parts"), [(1, 1), (INLINE_PAYLOAD, 1), (INLINE_PAYLOAD + 1, 2), (1 << 20, 2)])
def test_large_payload_is_a_part_of_its_own_and_the_callers_memory(length, parts):
    client = connected()
    memory = bytearray(length)
    client.queue(commands.write(client.engine.limits, memoryview(memory), 0))

    outgoing = client.engine.outgoing()

    assert len(outgoing) == parts
    assert sum(map(len, outgoing)) == 28 + length
    assert (outgoing[-1].obj is memory) == (parts == 2)


def mixed_burst(client):
    """Requests of every size, and what they must be on the wire."""
    limits = client.engine.limits
    payloads = [bytes([65 + index]) * length for index, length in enumerate((10, 5000, 4096, 4097, 1))]
    for payload in payloads:
        client.queue(commands.flush(limits))
        client.queue(commands.write(limits, memoryview(payload), 0))
    expected = b""
    for index, payload in enumerate(payloads):
        expected += bytes.fromhex("25609513 0000 0003") + (2 * index + 1).to_bytes(8, "big") + bytes(12)
        expected += bytes.fromhex("25609513 0000 0001") + (2 * index + 2).to_bytes(8, "big") + bytes(8)
        expected += len(payload).to_bytes(4, "big") + payload
    return expected


def test_send_that_stops_anywhere_is_taken_up_there():
    expected = mixed_burst(connected())
    edges = {0, 28, 56, 66, 94, 122}  # between headers and payloads; then everywhere around the large ones, and here and there
    for at in sorted({*edges, *range(60, 200), *range(5100, 5300), *range(0, len(expected), 41), len(expected)}):
        client = connected()
        mixed_burst(client)
        first = b"".join(client.engine.outgoing())[:at]
        client.engine.sent(at)

        assert first + client.speak() == expected, at


@pytest.mark.parametrize("step", [1, 7, 28, 4096, 5000])
def test_many_partial_sends_make_the_whole(step):
    client = connected()
    expected = mixed_burst(client)

    sent = bytearray()
    while parts := client.engine.outgoing():
        taken = b"".join(parts)[:step]
        sent += taken
        client.engine.sent(len(taken))

    assert bytes(sent) == expected


def test_nothing_sent_changes_nothing():
    client = connected()
    expected = mixed_burst(client)
    client.engine.outgoing()
    client.engine.sent(0)

    assert client.speak() == expected


def test_long_queue_is_packed_in_bursts_that_one_sendmsg_takes():
    client = connected()
    payload = memoryview(bytes(INLINE_PAYLOAD + 1))
    for _ in range(600):
        client.queue(commands.write(client.engine.limits, payload, 0))

    counts = []
    while parts := client.engine.outgoing():
        counts.append(len(parts))
        client.engine.sent(sum(map(len, parts)))

    assert counts == [512, 512, 176]
    assert client.engine.pending == 600


def test_request_submitted_while_others_are_half_sent_comes_after_them():
    client = connected()
    client.queue(build(client, "write"))
    client.engine.outgoing()
    client.engine.sent(5)
    client.queue(build(client, "flush"))

    rest = client.speak()

    assert rest[:26] == bytes.fromhex(COMPACT["write"])[5:]
    assert rest[26:34] == bytes.fromhex("25609513 0000 0003")


# ---------------------------------------------------------------------------------------------- disconnecting


def test_nothing_may_be_submitted_after_a_disconnect():
    client = connected()
    client.submit(build(client, "flush"), commands.disconnect())

    for call in ("read", "write", "flush", "disconnect"):
        with pytest.raises(UsageError):
            client.engine.submit(build(client, call))

    assert client.engine.pending == 1


def test_disconnect_is_done_when_it_is_sent_and_completes_once():
    client = connected()
    goodbye = client.queue(commands.disconnect())
    assert not goodbye.done
    assert not client.engine.finished_sending

    client.speak()

    assert goodbye.done
    assert client.completed_once(goodbye)
    assert client.engine.finished_sending
    assert client.engine.pending == 0


def test_commands_before_the_disconnect_are_answered_still():
    client = connected()
    flush = build(client, "flush")
    client.submit(flush, commands.disconnect()).hear(none("structured", flush))

    assert client.completed_once(flush)
    assert flush.error is None
    client.engine.received_eof()
    assert client.engine.phase is Phase.CLOSED


def test_disconnect_that_was_never_sent_completes_with_the_connections_end():
    client = connected()
    goodbye = client.queue(commands.disconnect())
    client.engine.fail(Disconnected(0, "gone"))

    assert client.completed_once(goodbye)
    assert isinstance(goodbye.error, Disconnected)


# ---------------------------------------------------------------------------------------------- wrong phases


@pytest.mark.parametrize(
    "client",
    [
        newborn(),
        newborn().hear(greeting()),
        newborn(opt_mode=True, structured_replies=False).hear(greeting()),
    ],
    ids=["greeting", "option under way", "opt mode"],
)
def test_command_before_the_transmission_phase_is_refused_and_never_sent(client):
    with pytest.raises(UsageError):
        client.engine.submit(commands.disconnect())

    assert client.speak() == b""
    assert client.engine.pending == 0


def test_command_before_connecting_is_refused():
    with pytest.raises(UsageError):
        Engine(Settings()).submit(commands.disconnect())


@pytest.mark.parametrize("phase", [Phase.CLOSED, Phase.DEAD])
def test_command_on_a_connection_that_has_ended_is_refused_with_the_reason(phase):
    client = connected()
    limits = client.engine.limits
    reason = Disconnected(0, "the cable was cut")
    client.engine.fail(reason, phase=phase)

    with pytest.raises(Disconnected, match="the cable was cut") as refusal:
        client.engine.submit(commands.read(limits, 512, 0))

    assert refusal.value.__cause__ is reason
    assert client.speak() == b""
    assert client.engine.pending == 0


def test_command_is_taken_as_soon_as_the_export_is_open():
    client = newborn().hear(oldstyle(SIZE))
    client.submit(commands.read(client.engine.limits, 3, 0)).hear(simple(1, data=b"abc"))

    assert client.commands[0].result() == b"abc"


# ---------------------------------------------------------------------------------------------- what may be waited for


def queue_large_write(client, count):
    command = commands.write(client.engine.limits, memoryview(bytearray(count)), 0)
    client.queue(command)
    return command


def of(*wanted):
    return lambda command: command in wanted


def test_large_payload_may_be_waited_for_a_part_at_a_time():
    client = connected(size=1 << 24)
    command = queue_large_write(client, 5 << 19)
    whole = b"".join(client.engine.outgoing())

    sent, counts = b"", []
    while parts := client.engine.large_payload(of(command)):
        sent += b"".join(parts)
        counts.append(sum(map(len, parts)))
        client.engine.sent(counts[-1])

    assert sent == whole
    assert counts == [1 << 20, 1 << 20, (1 << 19) + 28]


@pytest.mark.parametrize("sent", [0, 10, 28, 1000])
def test_only_the_caller_whose_payload_it_is_may_wait_for_it(sent):
    """Another one could still be sending it when the call is over, and the memory is used for something else."""
    client = connected(size=1 << 24)
    one, other = queue_large_write(client, 1 << 20), queue_large_write(client, 1 << 20)
    assert client.engine.outgoing()
    if sent:
        client.engine.sent(sent)
    assert client.engine.large_payload(of(other)) == []
    assert client.engine.large_payload(of(other, one))
    client.engine.sent(28 + (1 << 20) - sent)
    assert client.engine.large_payload(of(one)) == []
    assert client.engine.large_payload(of(other))


def test_small_payload_is_not_waited_for():
    client = connected()
    command = queue_large_write(client, 1 << 16)
    client.engine.outgoing()
    assert client.engine.large_payload(of(command)) == []


@pytest.mark.parametrize("call", ["read", "status"])
def test_nobody_waits_to_send_while_a_large_answer_may_be_due(call):
    client = connected(size=1 << 24, contexts=CONTEXTS)
    client.queue(build(client, call))
    client.speak()
    command = queue_large_write(client, 1 << 20)
    assert client.engine.outgoing()
    assert client.engine.large_payload(of(command)) == []


def test_small_answers_that_are_due_keep_nobody_from_waiting_to_send():
    client = connected(size=1 << 24)
    client.queue(build(client, "flush"))
    client.speak()
    command = queue_large_write(client, 1 << 20)
    assert client.engine.outgoing()
    assert client.engine.large_payload(of(command))
