"""Properties: random legal conversations equal a model, and no bytes whatever from a server get more than an error out of it.

The examples are the same in every run; raise EXAMPLES to search further.
"""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
from array import array

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdcore.errors import Error
from nbdcore.protocol.constants import CommandType, Option, OptionReply
from nbdcore.protocol.handshake import negotiation
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import StatusChunk
from tests.protocol.harness import (
    MODES,
    Client,
    ack,
    block_size,
    chunk,
    connected,
    context,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    export,
    export_name_reply,
    feed,
    greeting,
    hole_chunk,
    info,
    newborn,
    none,
    oldstyle,
    refused,
    reply,
    server,
    simple,
    status_chunk,
    success,
)

EXAMPLES = int(os.environ.get("NBDCORE_EXAMPLES", "300"))
searching = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

#: What the model's export holds: holes are zeroes, every other block tells where it is.
BLOCK = 64
BLOCKS = 1024
CONTENT = b"".join(bytes(BLOCK) if index % 5 == 0 else struct.pack(">I", index) * (BLOCK // 4) for index in range(BLOCKS))
SIZE = len(CONTENT)
CONTEXTS = ((3, b"base:allocation"), (70_000, b"x:y"))
NAMES = {number: name.decode() for number, name in CONTEXTS}


# ---------------------------------------------------------------------------------------------- legal conversations


@st.composite
def requests(draw, mode):
    """One command: its kind, offset and count, and whether the caller brings memory."""
    kinds = ["read", "read", "read", "write", "flush", "trim"] + ([] if mode == "simple" else ["status"])
    kind = draw(st.sampled_from(kinds))
    count = draw(st.integers(1, 200) | st.sampled_from([4096, 40_000]))
    offset = draw(st.integers(0, SIZE - count))
    return kind, count, offset, draw(st.booleans())


def build(client, request):
    kind, count, offset, own = request
    limits = client.engine.limits
    if kind == "read":
        return commands.read(limits, count, offset, target=memoryview(bytearray(b"?" * count)) if own else None)
    if kind == "write":
        return commands.write(limits, memoryview(CONTENT)[offset : offset + count], offset)
    if kind == "trim":
        return commands.trim(limits, count, offset)
    return commands.flush(limits) if kind == "flush" else commands.block_status(limits, count, offset)


def split(draw, count):
    """Cut a range into a few pieces, in any order."""
    edges = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=4))})
    return draw(st.permutations(list(itertools.pairwise(edges))))


def read_messages(draw, mode, command):
    """A good answer to a read, in pieces; what is all zeroes may come as a hole."""
    begin, count = command.offset, command.count
    if mode == "simple":
        return [simple(command, data=CONTENT[begin : begin + count])]
    messages = []
    for first, last in split(draw, count):
        data = CONTENT[begin + first : begin + last]
        if not any(data) and draw(st.booleans()):
            messages.append((hole_chunk, (begin + first, last - first)))
        else:
            messages.append((data_chunk, (begin + first, data)))
    end = draw(st.booleans())
    pieces = [
        make(mode, command, *arguments, done=end and index == len(messages) - 1)
        for index, (make, arguments) in enumerate(messages)
    ]
    return pieces if end else [*pieces, none(mode, command)]


def status_messages(draw, mode, command):
    """A good answer to block status, and what it says."""
    expected, messages = [], []
    for number in draw(st.permutations(list(NAMES))):
        room = SIZE - command.offset
        extents = []
        for _ in range(draw(st.integers(1, 4))):
            if not room:
                break
            length = draw(st.integers(1, room))
            extents.append((length, draw(st.integers(0, (1 << (64 if mode == "extended" else 32)) - 1))))
            room -= length
        messages.append(status_chunk(mode, command, number, extents))
        expected.append(StatusChunk(NAMES[number], array("Q", [e[0] for e in extents]), array("Q", [e[1] for e in extents])))
    return [*messages, none(mode, command)], expected


def error_messages(draw, mode, command):
    """A refusal, perhaps after some of the data."""
    number = draw(st.sampled_from([1, 5, 12, 22, 28]))
    if mode == "simple":
        return [simple(command, number)], number
    messages = []
    if command.type == CommandType.READ and draw(st.booleans()):
        half = command.count // 2
        messages.append(data_chunk(mode, command, command.offset, CONTENT[command.offset : command.offset + half]))
    text = draw(st.binary(max_size=50))
    if draw(st.booleans()):
        messages.append(error_offset_chunk(mode, command, number, command.offset, text, done=True))
    else:
        messages += [error_chunk(mode, command, number, text), none(mode, command)]
    return messages, number


def interleave(draw, streams):
    """Mix the messages of several answers, each answer's own in order."""
    streams = [list(stream) for stream in streams]
    script = b""
    while streams := [stream for stream in streams if stream]:
        script += streams[draw(st.integers(0, len(streams) - 1))].pop(0)
    return script


def pieces_of(draw, script):
    cuts = sorted(set(draw(st.lists(st.integers(0, len(script)), max_size=12))))
    edges = [0, *cuts, len(script)]
    return [script[begin:end] for begin, end in itertools.pairwise(edges)]


@searching
@given(st.data())
def test_legal_conversations_equal_the_model(data):
    draw = data.draw
    mode = draw(st.sampled_from(MODES))
    client = connected(mode, size=SIZE, contexts=() if mode == "simple" else CONTEXTS)
    wanted = draw(st.lists(requests(mode), min_size=1, max_size=8))
    client.submit(*(build(client, request) for request in wanted))
    answers = [answer_to(draw, mode, command) for command in client.commands]
    given_up = draw(st.sets(st.integers(0, len(wanted) - 1), max_size=2))
    pieces = pieces_of(draw, interleave(draw, [messages for messages, _ in answers]))
    when = draw(st.integers(0, len(pieces)))

    abandoned = set()
    for index, piece in enumerate([*pieces, b""]):
        if index == when:
            abandoned = {number for number in given_up if not client.commands[number].done}
            for number in abandoned:
                client.engine.abandon(client.commands[number], Error(0, "given up"))
        client.hear(piece)

    assert client.engine.phase is Phase.CONNECTED, client.engine.error
    assert client.engine.in_flight == {}
    for number, (command, (_, expected)) in enumerate(zip(client.commands, answers, strict=True)):
        assert client.completed_once(command)
        assert outcome_of(command) == ("given up" if number in abandoned else expected)


def answer_to(draw, mode, command):
    """A good answer or a refusal, in messages, and the outcome that it must have."""
    if draw(st.integers(0, 5)) == 0:
        return error_messages(draw, mode, command)
    if command.type == CommandType.READ:
        return read_messages(draw, mode, command), CONTENT[command.offset : command.offset + command.count]
    if command.type == CommandType.BLOCK_STATUS:
        return status_messages(draw, mode, command)
    return [success(mode, command)], None


def outcome_of(command):
    """The data of a read, the extents of block status, an error's number; what a command was given up with."""
    if command.error is not None:
        return command.error.errno or command.error.message
    if command.type == CommandType.READ:
        return command.result()
    return command.chunks if command.type == CommandType.BLOCK_STATUS else None


# ---------------------------------------------------------------------------------------------- arbitrary bytes

INTERESTING = [0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF]


@st.composite
def corrupted(draw, script):
    """A legal script with a few bytes changed, left out, put in or repeated; or bytes of no sense at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    damaged = bytearray(script)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(damaged)))
        how = draw(st.sampled_from(["change", "change", "change", "number", "cut", "insert", "repeat", "end"]))
        if how == "change" and at < len(damaged):
            damaged[at] = draw(st.sampled_from(INTERESTING) | st.integers(0, 255))
        elif how == "number":
            width = draw(st.sampled_from([2, 4, 8]))
            number = draw(st.sampled_from([0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, 1 << 4 * width, 4096, 4097]))
            damaged[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "big")
        elif how == "cut":
            del damaged[at : at + draw(st.integers(1, 40))]
        elif how == "insert":
            damaged[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif how == "repeat":
            damaged[at:at] = damaged[at : at + draw(st.integers(1, 80))] * draw(st.integers(1, 20))
        elif how == "end":
            del damaged[at:]
    return bytes(damaged)


def check_survives(client, script, draw):
    """Whatever the bytes: no exception, one outcome for everything, and nothing pending after the end."""
    for piece in pieces_of(draw, script):
        client.hear(piece)
        if client.engine.wants_tls:
            client.engine.tls_started()
            client.speak()
    client.engine.received_eof()
    check_over(client)


def check_over(client):
    engine = client.engine
    assert engine.phase in (Phase.CLOSED, Phase.DEAD)
    assert isinstance(engine.error, Error)
    assert engine.pending == 0
    assert not len(engine.room()), "nothing is received after the end"
    for subject in (*client.exchanges, *client.commands):
        assert subject.done
        assert client.completed_once(subject)
        assert subject.error is None or isinstance(subject.error, Error)


HANDSHAKES = [
    oldstyle(),
    greeting(0) + export_name_reply(zeroes=True),
    greeting()
    + ack(Option.EXTENDED_HEADERS)
    + context(3, b"base:allocation")
    + ack(Option.SET_META_CONTEXT)
    + export()
    + block_size(512, 4096, 1 << 25)
    + info(b"\0\1name")
    + info(b"\0\2description")
    + ack(Option.GO),
    greeting() + refused(Option.EXTENDED_HEADERS, text=b"no") + refused(Option.STRUCTURED_REPLY) + refused(Option.GO),
    greeting() + ack(Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + refused(Option.GO) + export_name_reply(),
    greeting() + ack(Option.STARTTLS, Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + export() + ack(Option.GO),
]


@searching
@given(st.data())
def test_any_bytes_during_the_handshake_end_in_one_outcome(data):
    script = data.draw(corrupted(data.draw(st.sampled_from(HANDSHAKES))))
    client = newborn(tls=data.draw(st.sampled_from(TLSPolicy)), opt_mode=data.draw(st.booleans()))

    check_survives(client, script, data.draw)


OPTIONS = [
    (negotiation.list_exports, (), server(b"a", b"b") + server(b"") + ack(Option.LIST)),
    (negotiation.info, ("x",), export(option=Option.INFO) + info(b"\0\1n", Option.INFO) + ack(Option.INFO)),
    (negotiation.go, ("x",), export() + block_size(1, 512, 512) + ack(Option.GO)),
    (negotiation.enter, ("x",), context(1, b"a:b") + ack(Option.SET_META_CONTEXT) + export() + ack(Option.GO)),
    (negotiation.starttls, (), ack(Option.STARTTLS)),
    (negotiation.structured_reply, (), refused(Option.STRUCTURED_REPLY, OptionReply.ERR_POLICY, b"no")),
    (negotiation.extended_headers, (), ack(Option.EXTENDED_HEADERS)),
    (
        negotiation.list_meta_context,
        ("x", ()),
        context(0, b"a:b", Option.LIST_META_CONTEXT) * 3 + ack(Option.LIST_META_CONTEXT),
    ),
    (negotiation.set_meta_context, ("x", ("a:b",)), context(1, b"a:b") + reply(Option.SET_META_CONTEXT, 1 << 31)),
]


@searching
@given(st.data())
def test_any_bytes_in_answer_to_an_option_end_in_one_outcome(data):
    conversation, arguments, answer = data.draw(st.sampled_from(OPTIONS))
    client = newborn(opt_mode=True).hear(greeting() + ack(Option.EXTENDED_HEADERS))
    engine = client.engine
    enters = conversation in (negotiation.go, negotiation.enter)
    client.follow(engine.option(conversation(engine.agreement, engine.settings, *arguments), enters=enters))

    check_survives(client, data.draw(corrupted(answer)), data.draw)


def busy(mode):
    """A client with a bit of everything in flight, the caller's memory under watch, and a legal answer to all of it."""
    client = connected(mode, size=SIZE, contexts=() if mode == "simple" else CONTEXTS)
    limits = client.engine.limits
    client.around = bytearray(b"\xee" * 400)
    target = memoryview(client.around)[100:300]
    wanted = [
        commands.read(limits, 200, 1000, target=target),
        commands.read(limits, 64, 0),
        commands.write(limits, memoryview(bytes(5000)), 0),
        commands.flush(limits),
        commands.zero(limits, 512, 512),
    ]
    if mode != "simple":
        wanted.append(commands.block_status(limits, 4096, 0))
    client.submit(*wanted)
    read, small, write, flush, zero, *status = client.commands
    if mode == "simple":
        script = simple(small, data=b"s" * 64) + simple(write) + simple(read, data=b"r" * 200) + simple(zero, 28) + simple(flush)
    else:
        script = (
            data_chunk(mode, read, 1100, b"r" * 100)
            + status_chunk(mode, status[0], 3, [(4096, 0), (512, 3)])
            + data_chunk(mode, small, 0, b"s" * 64, done=True)
            + hole_chunk(mode, read, 1000, 100)
            + error_chunk(mode, write, 28, b"full", done=True)
            + none(mode, flush)
            + status_chunk(mode, status[0], 70_000, [(100, 1)] * 3, done=True)
            + chunk(mode, 99, 1, bytes(30))
            + error_offset_chunk(mode, zero, 5, 600, done=True)
            + none(mode, read)
        )
    return client, script


@searching
@given(st.data())
def test_any_bytes_in_the_transmission_phase_end_in_one_outcome_and_stay_in_their_place(data):
    client, script = busy(data.draw(st.sampled_from(MODES)))

    check_survives(client, data.draw(corrupted(script)), data.draw)

    assert set(client.around[:100] + client.around[300:]) == {0xEE}
    assert len(client.around) == 400


@settings(searching, max_examples=min(EXAMPLES, 100))
@given(st.data())
def test_any_bytes_take_a_bounded_amount_of_memory(data):
    mode = data.draw(st.sampled_from(MODES))
    script = data.draw(corrupted(busy(mode)[1])) * 3
    tracemalloc.start()
    try:
        client, _ = busy(mode)
        feed(client.engine, script)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    client.engine.fail(Error(0, "over"))

    # The largest control payload is 2**20 extents of 16 bytes; the scratch buffer and the script are small beside it.
    assert peak < 24 << 20
    check_over(client)


@searching
@given(st.integers(0, (1 << 64) - 1), st.integers(0, 300), st.integers(1, 200), st.integers(0, 1000), st.sampled_from(MODES[1:]))
def test_data_land_inside_the_read_or_kill_the_connection(offset, length, count, begin, mode):
    for at in (offset, begin + offset % 400 - 100):
        if at < 0:
            continue
        client = connected(mode)
        memory = bytearray(b"\xee" * (count + 200))
        command = commands.read(client.engine.limits, count, begin, target=memoryview(memory)[100 : 100 + count])
        client.submit(command).hear(data_chunk(mode, command, at, b"\xaa" * length))

        inside = begin <= at and at + length <= begin + count
        assert client.engine.phase is (Phase.CONNECTED if inside else Phase.DEAD)
        expected = bytearray(b"\xee" * (count + 200))
        if inside:
            expected[100 + at - begin : 100 + at - begin + length] = b"\xaa" * length
        assert memory == expected


def test_client_under_test_counts_completions():
    client = connected()
    assert isinstance(client, Client)
    command = commands.flush(client.engine.limits)
    client.submit(command)
    assert not client.completed_once(command)
    client.hear(none("structured", command))
    client._completed(command)
    assert not client.completed_once(command), "a second completion would be seen"
