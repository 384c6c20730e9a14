"""Bursts of replies change nothing but the speed: random answers, good and broken, end alike with and without, however cut.

The examples are the same in every run; `NBDCORE_EXAMPLES` searches further.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdcore.errors import Error
from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import Chunk, CommandType
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission import decoder as replies
from tests.protocol.harness import (
    MODES,
    broken_off,
    chunk,
    connected,
    data_chunk,
    described,
    error_chunk,
    feed,
    hole_chunk,
    none,
    said,
    simple,
    status_chunk,
    success,
)
from tests.protocol.test_properties import searching

NOBODY = 4711
CONTEXTS = ((3, b"base:allocation"),)
KINDS = ("read", "read", "read", "into", "watched", "write", "flush", "trim", "status")
COUNTS = (1, 16, 40, 300, 5000, replies.LARGE)


class Raised(Exception):
    """What a callback under test raises."""


@st.composite
def plans(draw):
    """What is asked and how each is answered: alike in groups, so that bursts come about, and now and then something odd."""
    mode = draw(st.sampled_from(MODES))
    plan = []
    for _ in range(draw(st.integers(1, 4))):
        kind, count = draw(st.sampled_from(KINDS)), draw(st.sampled_from(COUNTS))
        many = draw(st.integers(1, 3 if count == replies.LARGE else 14))
        plan += [[kind, count, "good", None] for _ in range(many)]
    for number in draw(st.lists(st.integers(0, len(plan) - 1), max_size=3, unique=True)):
        plan[number][2] = draw(st.sampled_from(sorted(ODD)))
    for number in draw(st.lists(st.integers(0, len(plan) - 1), max_size=3, unique=True)):
        plan[number][3] = draw(st.sampled_from(["given up", "raises", "submits"]))
    return mode, plan, draw(st.integers(0, 2**32)), draw(st.booleans())


def content(command):
    return bytes((command.offset + number) % 251 for number in range(command.count))


def good(mode, command):
    if command.type == CommandType.BLOCK_STATUS:
        return status_chunk(mode, command, 3, [(command.count, 1)], done=True)
    return success(mode, command, content(command) if command.type == CommandType.READ else b"")


def halves(mode, command):
    if mode == "simple" or command.type != CommandType.READ:
        return good(mode, command)
    data, half = content(command), command.count // 2
    rest = data_chunk(mode, command, command.offset + half, data[half:], done=True)
    return (data_chunk(mode, command, command.offset, data[:half]) if half else b"") + rest


def elsewhere(mode, command):
    """An answer whose header says another offset than the request did, which only extended headers can."""
    payload = struct.pack(">Q", command.offset) + content(command) if command.type == CommandType.READ else b""
    kind = Chunk.OFFSET_DATA if payload else Chunk.NONE
    header = constants.EXTENDED_REPLY_MAGIC, 1, kind, command.cookie, command.offset + 1, len(payload)
    return wire.EXTENDED_REPLY.pack(*header) + payload


def another_magic(mode, command):
    """A good answer in the format that was not agreed on."""
    return good({"simple": "structured", "structured": "extended", "extended": "structured"}[mode], command)


ODD = {
    "twice": lambda mode, command: good(mode, command) * 2,
    "nobody's first": lambda mode, command: (
        good(mode, command).replace(struct.pack(">Q", command.cookie), struct.pack(">Q", NOBODY), 1) + good(mode, command)
    ),
    "the first command's": lambda mode, command: good(mode, command).replace(
        struct.pack(">Q", command.cookie), struct.pack(">Q", 1), 1
    ),
    "refused": lambda mode, command: broken_off(mode, command, 5),
    "refused in two chunks": lambda mode, command: error_chunk(mode, command, 5, b"why") + none(mode, command),
    "simple": lambda _, command: simple(command, data=content(command) if command.type == CommandType.READ else b""),
    "simple without data": lambda _, command: simple(command),
    "simple error": lambda _, command: simple(command, 5),
    "only its end": none,
    "never ends": lambda mode, command: data_chunk(mode, command, command.offset, content(command)),
    "its end apart": lambda mode, command: data_chunk(mode, command, command.offset, content(command)) + none(mode, command),
    "data": lambda mode, command: data_chunk(mode, command, command.offset, content(command), done=True),
    "too little": lambda mode, command: data_chunk(mode, command, command.offset, content(command)[1:], done=True),
    "too much": lambda mode, command: data_chunk(mode, command, command.offset, content(command) + b"?", done=True),
    "no data": lambda mode, command: data_chunk(mode, command, command.offset, b"", done=True),
    "data beside it": lambda mode, command: data_chunk(mode, command, command.offset + 1, content(command), done=True),
    "hole": lambda mode, command: hole_chunk(mode, command, command.offset, command.count, done=True),
    "data too short for an offset": lambda mode, command: chunk(mode, command, Chunk.OFFSET_DATA, b"?", done=True),
    "end with a payload": lambda mode, command: chunk(mode, command, Chunk.NONE, b"???", done=True),
    "end that does not end": lambda mode, command: chunk(mode, command, Chunk.NONE) + good(mode, command),
    "unknown": lambda mode, command: chunk(mode, command, 77, bytes(command.count), done=True),
    "lies about its length": lambda mode, command: chunk(
        mode, command, Chunk.OFFSET_DATA, bytes(8), done=True, length=constants.MAX_CHUNK + 1
    ),
    "halves": halves,
    "elsewhere": elsewhere,
    "another magic": another_magic,
    "no magic": lambda mode, command: b"?" + good(mode, command)[1:],
    "zeroes": lambda mode, command: bytes(len(good(mode, command))),
    "silence": lambda *_: b"",
}
#: What cannot be told from a good answer where nothing but a cookie says whose data these are.
LIES = ("simple without data", "the first command's")


class Conversation:
    """One client that is asked what a plan says, and everything that can be seen of what becomes of it."""

    def __init__(self, mode, plan):
        self.client = connected(mode, contexts=() if mode == "simple" else CONTEXTS)
        self.engine = self.client.engine
        self.order = []
        self.told = []
        self.raised = []
        self.after = {number: action for number, (_, _, _, action) in enumerate(plan)}
        self.commands = [self._build(kind, count, 4096 * number) for number, (kind, count, _, _) in enumerate(plan)]
        self.own = len(self.commands)
        for command in self.commands:
            self.engine.submit(command)
        said(self.engine)
        for command, action in zip(self.commands, self.after.values(), strict=True):
            if action == "given up":
                self.engine.abandon(command, Error(0, "given up"))

    def _build(self, kind, count, offset):
        limits = self.engine.limits
        if kind == "write":
            command = commands.write(limits, bytes(count), offset)
        elif kind == "flush":
            command = commands.flush(limits)
        elif kind == "trim":
            command = commands.trim(limits, count, offset)
        elif kind == "status" and self.engine.agreement.structured:
            command = commands.block_status(limits, count, offset)
        else:
            target = memoryview(bytearray(b"?" * count)) if kind == "into" else None
            command = commands.read(limits, count, offset, target=target)
            command.on_chunk = self._chunk if kind == "watched" else None
        command.tag = command.target
        command.completion = self._completed
        return command

    def _chunk(self, command, *told):
        self.told.append((command.cookie, *told))
        if self.after.get(command.cookie - 1) == "raises":
            raise Raised

    def _completed(self, command):
        assert command.done
        self.order.append(command.cookie)
        action = self.after.get(command.cookie - 1) if command.cookie <= self.own else None
        if action == "submits":
            another = commands.read(self.engine.limits, 7, 0)
            another.completion = self._completed
            self.engine.submit(another)
            self.commands.append(another)
        elif action == "raises":
            raise Raised

    def hear(self, piece):
        """Receive, as a session does whose callbacks may raise."""
        while piece:
            room = self.engine.room()
            if not len(room):
                return
            take = piece[: len(room)]
            piece = piece[len(take) :]
            self._guarded(lambda take=take: feed(self.engine, take))

    def end(self):
        self._guarded(self.engine.received_eof)

    def _guarded(self, call):
        try:
            call()
        except (Raised, Error) as exc:
            self.raised.append(exc)

    def outcome(self):
        engine = self.engine
        return {
            "phase": engine.phase,
            "error": described(engine.error),
            "chunks": engine.traffic.chunks_received,
            "order": self.order,
            "told": self.told,
            "in flight": sorted(engine.in_flight),
            "queued": [command.cookie for command in engine.queue],
            "large": engine._incoming and engine._incoming.large,
            "between": engine.between_replies,
            "commands": [
                (command.cookie, command.done, described(command.error), seen(command), command.chunks)
                for command in self.commands
            ],
        }


def seen(command):
    """The data of a read that went well: what there is of others is undefined."""
    if command.type != CommandType.READ or not command.done or command.error is not None:
        return None
    return bytes(command.result() if command.tag is None else command.tag)


def ways(script, chance):
    """Whole; cut anywhere; cut in pieces of one size."""
    yield [script]
    cuts = sorted({chance.randrange(len(script) + 1) for _ in range(chance.randrange(1, 9))})
    yield [script[begin:after] for begin, after in itertools.pairwise([0, *cuts, len(script)])]
    size = chance.choice([1, 19, 41, 333, 4096]) if len(script) < 20_000 else 9999
    yield [script[at : at + size] for at in range(0, len(script), size)]


def outcomes(mode, plan, pieces, *, bursts):
    with pytest.MonkeyPatch.context() as patch:
        if not bursts:
            patch.setattr(replies, "SHORTEST", 1 << 60)
        conversation = Conversation(mode, plan)
        for piece in pieces:
            conversation.hear(piece)
        open_still = conversation.outcome()
        conversation.end()
        return open_still, conversation.outcome(), Counter(map(type, conversation.raised)), conversation


def answers(mode, plan, chance, mixed):
    pairs = list(zip(Conversation(mode, plan).commands, plan, strict=True))
    if mixed:
        chance.shuffle(pairs)
    return b"".join((good if how == "good" else ODD[how])(mode, command) for command, (_, _, how, _) in pairs)


@searching
@given(plans())
def test_answers_end_alike_with_bursts_and_without_however_they_are_cut(case):
    mode, plan, seed, mixed = case
    chance = random.Random(seed)
    script = answers(mode, plan, chance, mixed)
    first = None
    for pieces in ways(script, chance):
        *fast, raised_fast, conversation = outcomes(mode, plan, pieces, bursts=True)
        *slow, raised_slow, _ = outcomes(mode, plan, pieces, bursts=False)
        assert fast == slow
        assert raised_fast == raised_slow
        first = first or fast
        assert fast == first
        check(conversation, believable=mode != "simple" or not any(how in LIES for _, _, how, _ in plan))


def check(conversation, *, believable):
    """What must hold of every outcome."""
    told = Counter(conversation.order)
    assert set(told.values()) <= {1}
    assert conversation.engine.phase in (Phase.CLOSED, Phase.DEAD)
    for command in conversation.commands:
        assert command.done
        assert told[command.cookie] == 1
        if believable and command.error is None and command.type == CommandType.READ:
            assert seen(command) in (content(command), bytes(command.count))  # it may have been a hole
