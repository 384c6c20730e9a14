"""Bursts: plain replies of one shape, one right behind the other. One unpacker takes all of them apart, a step for each.

A busy server sends dozens of replies at once that differ in nothing but cookie, offset and data. Where two in a row were alike,
the decoder guesses that more of the same follow, and hands the bytes over to a function here. The first reply that is not a plain
one of that shape ends the burst. Nothing of it has been used: the decoder knows all kinds, and goes on there.

Each function is given as many bytes as whole replies fill. It finishes the commands of the plain replies, in their order, and
raises KeyError at a reply that nobody waits for.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

from nbdcore.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    CommandType,
)
from nbdcore.protocol.transmission.commands import Command

#: Where fewer could follow, each is taken by itself: to begin a burst costs as much as it saves for two.
SHORTEST = 4
#: Flags and type of a chunk that is the whole answer to a read, and of one that is the answer to a command that gets no data.
DATA_DONE = REPLY_FLAG_DONE << 16 | Chunk.OFFSET_DATA
DONE = REPLY_FLAG_DONE << 16 | Chunk.NONE

_READ = int(CommandType.READ)
_ACKNOWLEDGEMENT = Struct(">IIQ")
_shape = lru_cache(maxsize=64)(Struct)


def acknowledgements(in_flight: dict[int, Command], completed: list[Command], replies: memoryview) -> None:
    """Take simple replies without error to commands that get no data."""
    for magic, error, cookie in _ACKNOWLEDGEMENT.iter_unpack(replies):
        command = in_flight[cookie]
        if magic != SIMPLE_REPLY_MAGIC or error or command.type == _READ:
            break
        del in_flight[cookie]
        command.done = True
        completed.append(command)


def simple_reads(in_flight: dict[int, Command], completed: list[Command], replies: memoryview, count: int) -> None:
    """Take simple replies without error to reads of `count` bytes."""
    for magic, error, cookie, data in _shape(f">IIQ{count}s").iter_unpack(replies):
        command = in_flight[cookie]
        if (
            magic != SIMPLE_REPLY_MAGIC
            or error
            or command.count != count
            or command.type != _READ
            or command.error is not None
            or command.on_chunk is not None
        ):
            break
        target = command.target
        if target is None:
            command.data = data
        else:
            target[:] = data
        del in_flight[cookie]
        command.done = True
        completed.append(command)


def data_chunks(
    in_flight: dict[int, Command], completed: list[Command], replies: memoryview, count: int, *, extended: bool
) -> None:
    """Take replies of one chunk to reads of `count` bytes."""
    # Magic, flags and type, cookie, offset of the request (which only extended headers have), length, offset of the data, data.
    shape, expected = (">IIQQQQ", EXTENDED_REPLY_MAGIC) if extended else (">IIQ0sIQ", STRUCTURED_REPLY_MAGIC)
    whole = count + 8
    for magic, word, cookie, asked, length, offset, data in _shape(f"{shape}{count}s").iter_unpack(replies):
        command = in_flight[cookie]
        if (
            magic != expected
            or word != DATA_DONE
            or length != whole
            or command.count != count
            or command.offset != offset
            or asked != (offset if extended else b"")
            or command.type != _READ
            or command.received
            or command.error is not None
            or command.on_chunk is not None
        ):
            break
        target = command.target
        if target is None:
            command.data = data
        else:
            target[:] = data
        del in_flight[cookie]
        command.done = True
        completed.append(command)


def empty_chunks(in_flight: dict[int, Command], completed: list[Command], replies: memoryview, *, extended: bool) -> None:
    """Take replies of one chunk without a payload to commands that get no data."""
    shape, expected = (">IIQQQ", EXTENDED_REPLY_MAGIC) if extended else (">IIQ0sI", STRUCTURED_REPLY_MAGIC)
    for magic, word, cookie, asked, length in _shape(shape).iter_unpack(replies):
        command = in_flight[cookie]
        if magic != expected or word != DONE or length or command.type == _READ or (extended and asked != command.offset):
            break
        del in_flight[cookie]
        command.done = True
        completed.append(command)
