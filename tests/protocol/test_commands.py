"""Every check that the client makes before it sends anything, their order, and what each strict bit switches off."""

from __future__ import annotations

import errno
import itertools

import pytest

from nbdcore.errors import UsageError
from nbdcore.protocol.constants import CommandFlag, TransmissionFlag
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import ALL_STRICT, Limits, Strict

SIZE = 1 << 40
MEBIBYTE = 1 << 20
EVERYTHING = 0x1FFD
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = map(int, CommandFlag)  # the complement of an IntFlag is no good here


class Zeroes:
    """Something that has a length and is never looked at."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


BUILD = {
    "read": commands.read,
    "write": lambda limits, count, offset, **more: commands.write(limits, Zeroes(count), offset, **more),
    "trim": commands.trim,
    "zero": commands.zero,
    "cache": commands.cache,
    "block_status": commands.block_status,
}
ALLOWED = {
    "read": DF,
    "write": FUA | PAYLOAD_LEN,
    "trim": FUA,
    "zero": FUA | NO_HOLE | FAST_ZERO,
    "cache": 0,
    "block_status": REQ_ONE,
    "flush": 0,
}
WRITING = ("write", "trim", "zero")


def limits(*without, **different):
    """Limits of an export that can do everything, with these strict bits off."""
    usual = {"size": SIZE, "flags": EVERYTHING, "structured": True, "contexts": True, "payload": 32 * MEBIBYTE}
    strict = int(ALL_STRICT)
    for bit in without:
        strict &= ~int(bit)
    return Limits(**(usual | {"strict": strict} | different))


def build(call, given, count=512, offset=0, **more):
    if call == "flush":
        return commands.flush(given, **more)
    return BUILD[call](given, count, offset, **more)


def refused(number, call, given, *arguments, **more):
    with pytest.raises(UsageError) as refusal:
        build(call, given, *arguments, **more)
    assert refusal.value.errno == number, str(refusal.value)


every = pytest.mark.parametrize("call", [*BUILD, "flush"])
ranged = pytest.mark.parametrize("call", BUILD)


# ---------------------------------------------------------------------------------------------- flags


@every
@pytest.mark.parametrize("extended", [False, True])
def test_flag_is_taken_where_it_belongs_and_refused_elsewhere(call, extended):
    for flag in (1 << bit for bit in range(20)):
        if call == "write" and flag == PAYLOAD_LEN:
            continue  # set and cleared by itself, whatever was asked for: see below
        if flag & ALLOWED[call]:
            assert build(call, limits(extended=extended), flags=flag).flags & ~PAYLOAD_LEN == flag
        else:
            refused(errno.EINVAL, call, limits(extended=extended), flags=flag)


@every
def test_strange_flags_of_16_bits_pass_when_the_check_is_off(call):
    for flag in (1 << 6, 1 << 15):
        assert build(call, limits(Strict.FLAGS), flags=flag).flags & ~PAYLOAD_LEN == flag


@every
@pytest.mark.parametrize("flags", [1 << 16, 1 << 63, 1 << 64, -1, -(1 << 40)])
def test_flags_beyond_16_bits_are_refused_with_every_check_off(call, flags):
    refused(errno.EINVAL, call, limits(*Strict), flags=flags)


@pytest.mark.parametrize(
    ("call", "flag", "offer", "fits"),
    [
        ("write", FUA, TransmissionFlag.SEND_FUA, {}),
        ("trim", FUA, TransmissionFlag.SEND_FUA, {}),
        ("zero", FUA, TransmissionFlag.SEND_FUA, {}),
        ("read", DF, TransmissionFlag.SEND_DF, {}),
        ("zero", FAST_ZERO, TransmissionFlag.SEND_FAST_ZERO, {}),
    ],
)
def test_flag_that_the_export_does_not_offer_is_refused(call, flag, offer, fits):
    without = EVERYTHING & ~int(offer)

    refused(errno.EINVAL, call, limits(flags=without), flags=flag)
    assert build(call, limits(Strict.COMMANDS, flags=without), flags=flag).flags == flag
    assert build(call, limits(flags=without)).flags == 0


# ---------------------------------------------------------------------------------------------- what the export can do


@pytest.mark.parametrize(
    ("call", "offer"),
    [
        ("flush", TransmissionFlag.SEND_FLUSH),
        ("trim", TransmissionFlag.SEND_TRIM),
        ("zero", TransmissionFlag.SEND_WRITE_ZEROES),
        ("cache", TransmissionFlag.SEND_CACHE),
    ],
)
def test_command_that_the_export_does_not_offer_is_refused(call, offer):
    without = EVERYTHING & ~int(offer)

    refused(errno.EINVAL, call, limits(flags=without))
    assert build(call, limits(Strict.COMMANDS, flags=without))


@pytest.mark.parametrize("call", WRITING)
def test_read_only_export_is_not_written_to(call):
    read_only = EVERYTHING | TransmissionFlag.READ_ONLY

    refused(errno.EPERM, call, limits(flags=read_only))
    assert build(call, limits(Strict.COMMANDS, flags=read_only))


@pytest.mark.parametrize("lacking", ["structured", "contexts"])
def test_block_status_without_structured_replies_or_contexts_is_refused(lacking):
    refused(errno.ENOTSUP, "block_status", limits(**{lacking: False}))
    assert build("block_status", limits(Strict.COMMANDS, **{lacking: False}))


# ---------------------------------------------------------------------------------------------- the payload's flag


@pytest.mark.parametrize("asked", [0, PAYLOAD_LEN, FUA, FUA | PAYLOAD_LEN])
@pytest.mark.parametrize("extended", [False, True])
def test_payload_flag_of_a_write_follows_the_header_format_by_itself(asked, extended):
    command = build("write", limits(extended=extended), flags=asked)

    assert command.flags == asked & FUA | (PAYLOAD_LEN if extended else 0)


@pytest.mark.parametrize("extended", [False, True])
def test_payload_flag_that_does_not_fit_is_refused_when_the_caller_sees_to_it(extended):
    fitting, wrong = (PAYLOAD_LEN, 0) if extended else (0, PAYLOAD_LEN)

    assert build("write", limits(Strict.AUTO_FLAG, extended=extended), flags=fitting).flags == fitting
    refused(errno.EINVAL, "write", limits(Strict.AUTO_FLAG, extended=extended), flags=wrong)
    unchecked = limits(Strict.AUTO_FLAG, Strict.COMMANDS, extended=extended)
    assert build("write", unchecked, flags=wrong).flags == wrong


def test_filter_of_block_status_is_an_effect_length_and_context_numbers():
    command = build("block_status", limits(extended=True), 0x1_0000_0000, 0, context_ids=(1, 0xFFFFFFFE), flags=REQ_ONE)

    assert command.flags == REQ_ONE | PAYLOAD_LEN
    assert bytes(command.payload) == bytes.fromhex("0000000100000000 00000001 fffffffe")
    assert command.count == 1 << 32


def test_filter_of_no_contexts_is_the_effect_length_alone():
    assert bytes(build("block_status", limits(extended=True), context_ids=()).payload) == (512).to_bytes(8, "big")


@pytest.mark.parametrize("extended", [False, True])
def test_filter_that_the_server_does_not_offer_is_refused(extended):
    without = EVERYTHING & ~int(TransmissionFlag.BLOCK_STATUS_PAYLOAD)

    refused(errno.ENOTSUP, "block_status", limits(flags=without, extended=extended), context_ids=(1,))


def test_filter_without_extended_headers_is_refused_and_never_sent_as_bytes_behind_a_compact_header():
    refused(errno.ENOTSUP, "block_status", limits(), context_ids=(1,))

    command = build("block_status", limits(Strict.COMMANDS), context_ids=(1,))
    assert command.payload is None
    assert command.flags == 0


def test_filter_without_its_flag_is_refused_when_the_caller_sees_to_it():
    given = limits(Strict.AUTO_FLAG, extended=True)

    refused(errno.EINVAL, "block_status", given, context_ids=(1,))
    assert build("block_status", given, context_ids=(1,), flags=PAYLOAD_LEN).payload is not None
    assert build("block_status", limits(Strict.AUTO_FLAG, Strict.COMMANDS, extended=True), context_ids=(1,)).payload is None


# ---------------------------------------------------------------------------------------------- ranges


@ranged
def test_request_for_no_bytes_is_refused(call):
    refused(errno.EINVAL, call, limits(), 0, 0)
    assert build(call, limits(Strict.ZERO_SIZE), 0, SIZE).count == 0


@ranged
@pytest.mark.parametrize(
    ("count", "offset"), [(512, SIZE - 511), (512, SIZE), (1, SIZE), (512, (1 << 64) - 1), (512, (1 << 64) - 512)]
)
def test_request_past_the_end_is_refused(call, count, offset):
    refused(errno.ENOSPC if call in WRITING else errno.EINVAL, call, limits(), count, offset)
    assert build(call, limits(Strict.BOUNDS), count, offset).offset == offset


@ranged
def test_request_for_no_bytes_beyond_the_end_is_past_it_all_the_same(call):
    refused(errno.ENOSPC if call in WRITING else errno.EINVAL, call, limits(Strict.ZERO_SIZE), 0, SIZE + 1)


@ranged
def test_request_up_to_the_end_is_taken(call):
    assert build(call, limits(), 512, SIZE - 512)
    assert build(call, limits(size=512), 512, 0)
    refused(errno.ENOSPC if call in WRITING else errno.EINVAL, call, limits(size=511), 512, 0)


@ranged
@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_request_at_the_end_of_the_largest_exports_is_taken(call, size):
    assert build(call, limits(size=size), 1, size - 1).offset == size - 1


@ranged
@pytest.mark.parametrize(("count", "offset"), [(512, -1), (512, -512), (512, 1 << 64), (512, 1 << 200)])
def test_offset_that_is_no_number_of_64_bits_is_refused_with_every_check_off(call, count, offset):
    refused(errno.EINVAL, call, limits(*Strict), count, offset)
    refused(errno.EINVAL, call, limits(), count, offset)


@pytest.mark.parametrize("call", [call for call in BUILD if call != "write"])
@pytest.mark.parametrize("count", [-1, -(1 << 70)])
def test_negative_count_is_refused_with_every_check_off(call, count):
    refused(errno.EINVAL, call, limits(*Strict), count, 0)
    refused(errno.EINVAL, call, limits(), count, 0)


@pytest.mark.parametrize("call", [call for call in BUILD if call != "write"])
@pytest.mark.parametrize("count", [512.0, "512", None])
def test_count_that_is_no_integer_is_a_type_error_before_anything_is_queued(call, count):
    with pytest.raises(TypeError):
        build(call, limits(), count, 0)


@ranged
@pytest.mark.parametrize("offset", [0.0, "0", None])
def test_offset_that_is_no_integer_is_a_type_error_before_anything_is_queued(call, offset):
    with pytest.raises(TypeError):
        build(call, limits(), 512, offset)


def test_number_that_only_behaves_like_an_integer_is_taken_as_one():
    class Number:
        def __index__(self):
            return 512

    command = commands.read(limits(), Number(), Number())
    assert (type(command.count), type(command.offset)) == (int, int)
    assert (command.count, command.offset) == (512, 512)


@ranged
@pytest.mark.parametrize(("count", "offset"), [(511, 0), (512, 1), (4096, 256), (513, 512)])
def test_unaligned_request_is_refused_where_the_server_named_a_minimum(call, count, offset):
    refused(errno.EINVAL, call, limits(minimum=512), count, offset)
    assert build(call, limits(Strict.ALIGN, minimum=512), count, offset)
    assert build(call, limits(minimum=1), count, offset)


@ranged
def test_request_up_to_the_end_of_an_export_that_ends_within_a_block_is_made(call):
    assert build(call, limits(minimum=512, size=1000), 488, 512)
    assert build(call, limits(minimum=512, size=1000), 1000, 0)


@ranged
@pytest.mark.parametrize(("count", "offset"), [(487, 512), (488, 511), (100, 900), (1, 999)])
def test_request_within_the_last_partial_block_is_unaligned(call, count, offset):
    refused(errno.EINVAL, call, limits(minimum=512, size=1000), count, offset)


# ---------------------------------------------------------------------------------------------- lengths


def test_write_above_what_the_server_takes_is_refused():
    refused(errno.ERANGE, "write", limits(), 32 * MEBIBYTE + 1, 0)
    assert build("write", limits(), 32 * MEBIBYTE)
    assert build("write", limits(Strict.PAYLOAD), 64 * MEBIBYTE)


@pytest.mark.parametrize("call", ["read", "write"])
@pytest.mark.parametrize("extended", [False, True])
def test_more_than_64_mebibytes_of_data_are_refused_with_every_check_off(call, extended):
    refused(errno.ERANGE, call, limits(*Strict, extended=extended), 64 * MEBIBYTE + 1, 0)
    assert build(call, limits(*Strict, extended=extended), 64 * MEBIBYTE)


@pytest.mark.parametrize("extended", [False, True])
def test_read_beyond_the_advertised_maximum_is_the_servers_to_judge(extended):
    assert build("read", limits(extended=extended, maximum=MEBIBYTE), 64 * MEBIBYTE)


@pytest.mark.parametrize("call", ["trim", "zero", "cache", "block_status"])
def test_length_beyond_32_bits_needs_extended_headers(call):
    assert build(call, limits(), (1 << 32) - 1).count == 0xFFFFFFFF
    refused(errno.ERANGE, call, limits(), 1 << 32, 0)
    refused(errno.ERANGE, call, limits(*Strict), 1 << 32, 0)

    assert build(call, limits(extended=True), SIZE).count == SIZE
    assert build(call, limits(extended=True, size=(1 << 64) - 1), (1 << 64) - 1)
    refused(errno.ERANGE, call, limits(*Strict, extended=True), 1 << 64, 0)


# ---------------------------------------------------------------------------------------------- order

# Faults in the order in which they are noticed: what makes it, and its errno. Each one hides all that come after it.
READ_FAULTS = [
    ("flags", errno.EINVAL, {"flags": 1 << 9}),
    ("DF not offered", errno.EINVAL, {"flags": DF, "offers": EVERYTHING & ~0x80}),
    ("past the end", errno.EINVAL, {"offset": SIZE - 1}),
    ("unaligned", errno.EINVAL, {"minimum": 4096, "offset": 512}),
    ("too large", errno.ERANGE, {"count": 64 * MEBIBYTE + 4096}),
]
WORDS = {
    "flags": "do not belong",
    "DF not offered": "DF",
    "command not offered": "does not offer this command",
    "read-only": "read-only",
    "FUA not offered": "FUA",
    "no bytes": "no bytes",
    "past the end": "past the end",
    "unaligned": "multiples",
    "too large": "split it",
}
FAULTS = {
    "read": READ_FAULTS,
    "write": [
        ("flags", errno.EINVAL, {"flags": 1 << 9}),
        ("read-only", errno.EPERM, {"offers": EVERYTHING | 2}),
        ("FUA not offered", errno.EINVAL, {"flags": FUA, "offers": EVERYTHING & ~8}),
        ("past the end", errno.ENOSPC, {"offset": SIZE - 1}),
        ("unaligned", errno.EINVAL, {"minimum": 4096, "offset": 512}),
        ("too large", errno.ERANGE, {"count": 32 * MEBIBYTE + 4096}),
    ],
    "trim": [
        ("flags", errno.EINVAL, {"flags": 1 << 9}),
        ("command not offered", errno.EINVAL, {"offers": EVERYTHING & ~0x20}),
        ("read-only", errno.EPERM, {"offers": EVERYTHING | 2}),
        ("FUA not offered", errno.EINVAL, {"flags": FUA, "offers": EVERYTHING & ~8}),
        ("no bytes", errno.EINVAL, {"count": 0}),
        ("past the end", errno.ENOSPC, {"offset": SIZE - 1}),
        ("unaligned", errno.EINVAL, {"minimum": 4096, "offset": 512}),
        ("too large", errno.ERANGE, {"count": 1 << 32}),
    ],
}


def together(*faults):
    """One request with several faults."""
    merged = {"flags": 0, "offers": EVERYTHING, "offset": 0, "count": 4096, "minimum": 1}
    for _, _, fault in faults:
        for key, value in fault.items():
            if key == "flags":
                merged[key] |= value
            elif key == "offers" and value < EVERYTHING:
                merged[key] &= value | 2
            elif key == "offers":
                merged[key] |= 2
            else:
                merged[key] = value
    return merged


@pytest.mark.parametrize(
    ("call", "first", "second"),
    [(call, *pair) for call, faults in FAULTS.items() for pair in itertools.combinations(faults, 2)],
    ids=lambda part: part if isinstance(part, str) else part[0],
)
def test_checks_are_made_in_a_fixed_order(call, first, second):
    if {first[0], second[0]} == {"past the end", "unaligned"} or {first[0], second[0]} == {"no bytes", "too large"}:
        given = together(first, second) | ({"offset": SIZE - 1} if "past the end" in (first[0], second[0]) else {"count": 0})
    else:
        given = together(first, second)
    name, number, _ = first
    with pytest.raises(UsageError, match=WORDS[name]) as refusal:
        build(
            call,
            limits(flags=given["offers"], minimum=given["minimum"]),
            given["count"],
            given["offset"],
            flags=given["flags"],
        )
    assert refusal.value.errno == number


@every
def test_message_says_what_was_refused(call):
    with pytest.raises(UsageError) as refusal:
        build(call, limits(), flags=1 << 9)
    words = {"zero": "write zeroes", "block_status": "block status"}.get(call, call)
    assert words in str(refusal.value)
    if call != "flush":
        assert "512 bytes at offset 0" in str(refusal.value)
