"""The layouts of every NBD message, as Struct objects and pack/unpack pairs. Nothing here has state; client and server share it.

Each layout stands in the specification's own words beside it; all numbers are in network byte order. Functions that unpack what
a peer sent check each length against what is really there and raise ValueError with what is wrong; the caller says what that
means for the connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from nbdcore.protocol.constants import MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC

# ---------------------------------------------------------------------------------------------- handshake

#: 64 bits NBD_MAGIC, 64 bits second magic
GREETING = Struct(">QQ")
#: 64 bits size, 32 bits flags; 124 reserved bytes follow (oldstyle)
OLDSTYLE = Struct(">QI")
#: 16 bits handshake flags
HANDSHAKE_FLAGS = Struct(">H")
#: 32 bits client flags
CLIENT_FLAGS = Struct(">I")
#: 64 bits OPTION_MAGIC, 32 bits option, 32 bits length
OPTION_REQUEST = Struct(">QII")
#: 64 bits OPTION_REPLY_MAGIC, 32 bits option, 32 bits reply type, 32 bits length
OPTION_REPLY = Struct(">QIII")
#: 64 bits size, 16 bits transmission flags (the answer to EXPORT_NAME)
EXPORT_NAME_REPLY = Struct(">QH")
#: 16 bits information type, 64 bits size, 16 bits transmission flags
INFO_EXPORT = Struct(">HQH")
#: 16 bits information type, 32 bits minimum, preferred and maximum block size
INFO_BLOCK_SIZE = Struct(">HIII")

UINT16 = Struct(">H")
UINT32 = Struct(">I")
UINT64 = Struct(">Q")

# ---------------------------------------------------------------------------------------------- transmission

#: 32 bits magic, 16 bits command flags, 16 bits type, 64 bits cookie, 64 bits offset, 32 bits length
REQUEST = Struct(">IHHQQI")
#: the same with a length of 64 bits
EXTENDED_REQUEST = Struct(">IHHQQQ")
#: 32 bits magic, 32 bits error, 64 bits cookie
SIMPLE_REPLY = Struct(">IIQ")
#: 32 bits magic, 16 bits flags, 16 bits chunk type, 64 bits cookie, 32 bits length of payload
STRUCTURED_REPLY = Struct(">IHHQI")
#: 32 bits magic, 16 bits flags, 16 bits chunk type, 64 bits cookie, 64 bits offset of the request, 64 bits length of payload
EXTENDED_REPLY = Struct(">IHHQQQ")
#: the two above with 64 bits offset behind them: all of an OFFSET_DATA chunk but its data
STRUCTURED_DATA = Struct(">IHHQIQ")
EXTENDED_DATA = Struct(">IHHQQQQ")
#: 64 bits offset, 32 bits hole size (payload of OFFSET_HOLE)
HOLE = Struct(">QI")
#: 32 bits error, 16 bits message length (start of every error chunk's payload)
CHUNK_ERROR_HEAD = Struct(">IH")
#: 32 bits context id, 32 bits descriptor count (start of BLOCK_STATUS_EXT)
STATUS_EXT_HEAD = Struct(">II")


# ---------------------------------------------------------------------------------------------- strings


def encode_string(text: str) -> bytes:
    """Return `text` as the specification's string: UTF-8, no NUL, at most 4096 bytes. Raises ValueError otherwise.

    Surrogate escapes go out as the bytes they came from, so that a name that a server listed can be asked for as it is.
    """
    encoded = text.encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise ValueError("the string contains a NUL character")
    if len(encoded) > MAX_STRING:
        raise ValueError(f"the string has {len(encoded)} bytes; the protocol allows {MAX_STRING}")
    return encoded


def decode_string(data: bytes | bytearray | memoryview) -> str:
    """Return a peer's string; bytes that are not UTF-8 become surrogate escapes. Raises ValueError beyond 4096 bytes."""
    if len(data) > MAX_STRING:
        raise ValueError(f"a string of {len(data)} bytes; the protocol allows {MAX_STRING}")
    return bytes(data).decode("utf-8", "surrogateescape")


def pack_counted_string(text: str) -> bytes:
    """Return 32 bits of length, then the string."""
    encoded = encode_string(text)
    return UINT32.pack(len(encoded)) + encoded


def unpack_counted_string(data: memoryview) -> tuple[str, memoryview]:
    """Return a string that 32 bits of length precede, and the rest of `data`. Raises ValueError where it does not fit."""
    if len(data) < UINT32.size:
        raise ValueError("too short for the length of a string")
    (length,) = UINT32.unpack_from(data)
    rest = data[UINT32.size :]
    if length > len(rest):
        raise ValueError(f"a string of {length} bytes in {len(rest)} bytes")
    return decode_string(rest[:length]), rest[length:]


# ---------------------------------------------------------------------------------------------- options


def pack_option(option: int, data: bytes = b"") -> bytes:
    """Return an option request (section "Newstyle negotiation")."""
    return OPTION_REQUEST.pack(OPTION_MAGIC, option, len(data)) + data


def pack_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Return an option reply (section "Fixed newstyle negotiation")."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def pack_info_request(name: str, items: Iterable[int]) -> bytes:
    """Return the data of NBD_OPT_INFO and NBD_OPT_GO: counted export name, 16 bits count, 16 bits a wanted item."""
    wanted = list(items)
    return pack_counted_string(name) + UINT16.pack(len(wanted)) + b"".join(UINT16.pack(item) for item in wanted)


def unpack_info_request(data: memoryview) -> tuple[str, list[int]]:
    """Return export name and wanted items of NBD_OPT_INFO or NBD_OPT_GO. Raises ValueError on any wrong length."""
    name, rest = unpack_counted_string(data)
    if len(rest) < UINT16.size:
        raise ValueError("too short for the number of information requests")
    (count,) = UINT16.unpack_from(rest)
    if len(rest) != UINT16.size * (count + 1):
        raise ValueError(f"{count} information requests in {len(rest) - UINT16.size} bytes")
    return name, [item for (item,) in UINT16.iter_unpack(rest[UINT16.size :])]


def pack_meta_context_request(name: str, queries: Iterable[str]) -> bytes:
    """Return the data of NBD_OPT_LIST_META_CONTEXT and _SET_META_CONTEXT: export name, 32 bits count, counted queries."""
    wanted = list(queries)
    return pack_counted_string(name) + UINT32.pack(len(wanted)) + b"".join(map(pack_counted_string, wanted))


def unpack_meta_context_request(data: memoryview) -> tuple[str, list[str]]:
    """Return export name and queries of a meta context option. Raises ValueError on any wrong length."""
    name, rest = unpack_counted_string(data)
    if len(rest) < UINT32.size:
        raise ValueError("too short for the number of queries")
    (count,) = UINT32.unpack_from(rest)
    rest = rest[UINT32.size :]
    if count > len(rest) // UINT32.size:
        raise ValueError(f"{count} queries in {len(rest)} bytes")
    queries = []
    for _ in range(count):
        query, rest = unpack_counted_string(rest)
        queries.append(query)
    if rest:
        raise ValueError(f"{len(rest)} bytes after the last query")
    return name, queries
