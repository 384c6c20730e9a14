"""Options: requests encoded, replies parsed into frozen dataclasses, refusals turned into errors.

Pure functions; the conversations in `negotiation` say when each is used. A reply that the specification forbids is a
ProtocolViolation, since a client that misread one option cannot trust what follows.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from nbdcore.errors import NegotiationError, ProtocolViolation, UsageError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import MAX_STRING, Info, Option, OptionReply
from nbdcore.protocol.handshake.agreement import BlockSize, Export

# "There is no maximum" (section "Block size constraints").
_NO_MAXIMUM = 0xFFFFFFFF
#: Most bytes of an option reply's payload that carry meaning: a counted name and a description. What is longer is skipped.
LARGEST_MEANINGFUL = 4 + 2 * MAX_STRING

# ---------------------------------------------------------------------------------------------- requests


def export_name(name: str) -> bytes:
    """Return the data of EXPORT_NAME. Raises UsageError for a name that the protocol cannot carry; so do the next two."""
    try:
        return wire.encode_string(name)
    except ValueError as exc:
        raise UsageError(errno.EINVAL, f"export name {name!r} cannot be sent: {exc}") from exc


def info_request(name: str, *, block_size: bool, full: bool) -> bytes:
    """Return the data of INFO and GO; NBD_INFO_EXPORT comes unasked."""
    items = [Info.BLOCK_SIZE] if block_size else []
    if full:
        items += [Info.NAME, Info.DESCRIPTION]
    export_name(name)
    return wire.pack_info_request(name, items)


def meta_context_request(name: str, queries: Iterable[str]) -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    wanted = list(queries)
    export_name(name)
    try:
        return wire.pack_meta_context_request(name, wanted)
    except ValueError as exc:
        raise UsageError(errno.EINVAL, f"metadata contexts {wanted!r} cannot be asked for: {exc}") from exc


# ---------------------------------------------------------------------------------------------- refusals

# What a refusal means, in errno's terms and in words.
_REFUSALS: dict[int, tuple[int, str]] = {
    OptionReply.ERR_UNSUP: (errno.ENOTSUP, "the server does not know this option"),
    OptionReply.ERR_POLICY: (errno.EPERM, "the server's policy forbids it"),
    OptionReply.ERR_INVALID: (errno.EINVAL, "the server calls the request invalid"),
    OptionReply.ERR_PLATFORM: (errno.ENOTSUP, "the server's platform cannot do it"),
    OptionReply.ERR_TLS_REQD: (errno.ENOTSUP, "the server requires TLS"),
    OptionReply.ERR_UNKNOWN: (errno.ENOENT, "the server has no such export"),
    OptionReply.ERR_SHUTDOWN: (getattr(errno, "ESHUTDOWN", errno.EINVAL), "the server is shutting down"),
    OptionReply.ERR_BLOCK_SIZE_REQD: (errno.EINVAL, "the server requires a client that obeys its block sizes"),
    OptionReply.ERR_TOO_BIG: (errno.EINVAL, "the request or its reply is too large for the server"),
    OptionReply.ERR_EXT_HEADER_REQD: (errno.ENOTSUP, "the server requires extended headers"),
}

# Option -> what the client was about to do.
_PURPOSES: dict[int, str] = {
    Option.LIST: "listing exports",
    Option.STARTTLS: "starting TLS",
    Option.INFO: "asking about export",
    Option.GO: "opening export",
    Option.STRUCTURED_REPLY: "asking for structured replies",
    Option.LIST_META_CONTEXT: "listing metadata contexts of export",
    Option.SET_META_CONTEXT: "selecting metadata contexts of export",
    Option.EXTENDED_HEADERS: "asking for extended headers",
}


def refusal(option: int, reply: int, text: str, name: str | None) -> NegotiationError:
    """Return the error for a server's refusal of `option`; `text` is the server's own explanation, `name` the export's."""
    number, words = _REFUSALS.get(reply, (0, f"the server answered with error {reply:#x}"))
    purpose = _PURPOSES[option]
    if name is not None:
        purpose = f"{purpose} {name!r}" if name else purpose.replace("export", "the default export")
    return NegotiationError(number, f"{purpose} failed: {words}", server_text=text, reply=reply)


def error_text(payload: bytes) -> str:
    """Return the human text of an error reply; a text beyond the specification's limit was cut before it came here."""
    return payload[:MAX_STRING].decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------- replies


def parse_server(payload: bytes) -> Export:
    """Parse NBD_REP_SERVER: a counted export name, and perhaps a description."""
    try:
        name, rest = wire.unpack_counted_string(memoryview(payload))
        return Export(name, wire.decode_string(rest))
    except ValueError as exc:
        raise ProtocolViolation(errno.EPROTO, f"the server's export list has a broken entry: {exc}") from exc


def parse_meta_context(payload: bytes) -> tuple[int, str]:
    """Parse NBD_REP_META_CONTEXT: 32 bits id, then a name, which is never empty."""
    if len(payload) <= wire.UINT32.size:
        raise ProtocolViolation(errno.EPROTO, f"the server named a metadata context in {len(payload)} bytes")
    (number,) = wire.UINT32.unpack_from(payload)
    try:
        return number, wire.decode_string(memoryview(payload)[wire.UINT32.size :])
    except ValueError as exc:
        raise ProtocolViolation(errno.EPROTO, f"the server named a metadata context with {exc}") from exc


def info_kind(payload: bytes) -> int:
    """Return the information type of NBD_REP_INFO."""
    if len(payload) < wire.UINT16.size:
        raise ProtocolViolation(errno.EPROTO, f"the server sent export information of {len(payload)} bytes")
    kind: int = wire.UINT16.unpack_from(payload)[0]
    return kind


def parse_info_export(payload: bytes) -> tuple[int, int]:
    """Parse NBD_INFO_EXPORT: size in bytes and transmission flags."""
    if len(payload) != wire.INFO_EXPORT.size:
        raise ProtocolViolation(
            errno.EPROTO, f"the server sent NBD_INFO_EXPORT of {len(payload)} bytes, not {wire.INFO_EXPORT.size}"
        )
    _, size, flags = wire.INFO_EXPORT.unpack(payload)
    return size, flags


def parse_info_text(payload: bytes) -> str:
    """Parse NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
    try:
        return wire.decode_string(memoryview(payload)[wire.UINT16.size :])
    except ValueError as exc:
        raise ProtocolViolation(errno.EPROTO, f"the server described the export with {exc}") from exc


def parse_info_block_size(payload: bytes) -> BlockSize:
    """Parse NBD_INFO_BLOCK_SIZE. Constraints that contradict each other or the specification are ignored as a whole.

    A maximum may be no multiple of the minimum: it is taken as the multiple below, since no request can be larger.
    """
    if len(payload) != wire.INFO_BLOCK_SIZE.size:
        raise ProtocolViolation(
            errno.EPROTO, f"the server sent NBD_INFO_BLOCK_SIZE of {len(payload)} bytes, not {wire.INFO_BLOCK_SIZE.size}"
        )
    _, minimum, preferred, maximum = wire.INFO_BLOCK_SIZE.unpack(payload)
    sound = (
        1 <= minimum <= 1 << 16
        and _power_of_two(minimum)
        and preferred >= 1 << 9
        and _power_of_two(preferred)
        and minimum <= preferred <= maximum
    )
    if not sound:
        return BlockSize()
    if maximum != _NO_MAXIMUM:
        maximum -= maximum % minimum
    return BlockSize(minimum, preferred, maximum, advertised=True)


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
