"""Numbers of the NBD specification (doc/proto.md), each class with the section it comes from.

Flags are IntFlag and IntEnum where users and readers meet them; hot paths use the plain integers behind them. Limits that the
specification leaves to the client stand at the end, each with its reason.
"""

from __future__ import annotations

import enum

# ---------------------------------------------------------------------------------------------- magic numbers

#: First eight bytes of every server, "NBDMAGIC" (section "Handshake").
NBD_MAGIC = 0x4E42444D41474943
#: Second magic of an oldstyle server, "cliserv_magic" (section "Oldstyle negotiation").
OLDSTYLE_MAGIC = 0x00420281861253
#: Second magic of a newstyle server, "IHAVEOPT", and the magic of every option request (section "Newstyle negotiation").
OPTION_MAGIC = 0x49484156454F5054
#: Magic of an option reply (section "Fixed newstyle negotiation").
OPTION_REPLY_MAGIC = 0x3E889045565A9
#: Magic of a compact request (section "Request message").
REQUEST_MAGIC = 0x25609513
#: Magic of an extended request (section "Extended request message").
EXTENDED_REQUEST_MAGIC = 0x21E41C71
#: Magic of a simple reply (section "Simple reply message").
SIMPLE_REPLY_MAGIC = 0x67446698
#: Magic of a structured reply chunk (section "Structured reply chunk message").
STRUCTURED_REPLY_MAGIC = 0x668E33EF
#: Magic of an extended reply chunk (section "Extended reply chunk message").
EXTENDED_REPLY_MAGIC = 0x6E8A278C

#: Zero bytes that end an oldstyle greeting, and the answer to EXPORT_NAME unless NO_ZEROES was agreed.
RESERVED_ZEROES = 124

# ---------------------------------------------------------------------------------------------- handshake


class HandshakeFlag(enum.IntFlag):
    """Handshake flags of the server; the client's flags (NBD_FLAG_C_*) have the same bits (section "Handshake flags")."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(enum.IntEnum):
    """NBD_OPT_*: what a client asks for while negotiating (section "Option types")."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """NBD_REP_*: what a server answers to an option (section "Option reply types")."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


#: Set in the type of every option reply that is an error.
OPTION_REPLY_ERROR = 1 << 31


class Info(enum.IntEnum):
    """NBD_INFO_*: pieces of information about an export (section "Option reply types", NBD_REP_INFO)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """NBD_FLAG_*: what an export can do (section "Transmission flags")."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


# ---------------------------------------------------------------------------------------------- transmission


class CommandType(enum.IntEnum):
    """NBD_CMD_* (section "Request types")."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """NBD_CMD_FLAG_* (section "Command flags")."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


#: NBD_REPLY_FLAG_DONE: the last chunk of a reply (section "Structured reply flags").
REPLY_FLAG_DONE = 1 << 0


class Chunk(enum.IntEnum):
    """NBD_REPLY_TYPE_*: kinds of reply chunk (section "Structured reply types")."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


#: Set in the type of every chunk that is an error.
CHUNK_ERROR = 1 << 15


class AllocationFlag(enum.IntFlag):
    """NBD_STATE_*: flags of an extent in the context base:allocation (section "base:allocation metadata context")."""

    HOLE = 1 << 0
    ZERO = 1 << 1


#: The metadata context that the specification itself defines.
BASE_ALLOCATION = "base:allocation"


class ErrorNumber(enum.IntEnum):
    """NBD_E*: error numbers on the wire, the same on every platform (section "Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# ---------------------------------------------------------------------------------------------- limits

#: Longest string in bytes (section "Conventions").
MAX_STRING = 4096
#: Largest option reply we accept. No legal reply comes near it: more is an attack on memory (CVE-2017-15119 is its mirror).
MAX_OPTION_REPLY = 64 << 20
#: Most replies of one kind we keep for one option: a server may otherwise send them for ever. A host with more exports than this
#: is not known; a million names would be a hundred megabytes.
MAX_OPTION_REPLIES = 1 << 16
#: Most bytes we listen to in replies to one option, kept or skipped, for the same reason.
MAX_OPTION_BYTES = 64 << 20
#: Largest payload of a read or write in one request: what servers in use accept (qemu and nbdkit: 32 and 64 MiB).
MAX_PAYLOAD = 64 << 20
#: What is safe with a server that names no maximum (section "Block size constraints").
DEFAULT_MAXIMUM = 32 << 20
#: Largest payload of a reply chunk: the data, and the offset before it.
MAX_CHUNK = MAX_PAYLOAD + 8
#: Largest size of an export in bytes that files, C programs and Python's own file objects can address.
MAX_SIZE = (1 << 63) - 1
#: Largest length in bytes of a request with a compact header.
MAX_COMPACT_LENGTH = (1 << 32) - 1
