"""The conversations of the handshake, each a small generator in the order of the wire.

A conversation yields what it needs and is sent what it asked for: an int is "this many bytes, please" and gets them; bytes are
"send these"; HANDOVER is "swap in TLS now". So it can be driven by anything that has bytes, and it never sees a byte beyond the
ones it asked for: what a man in the middle slips in after STARTTLS is left for TLS to choke on. Opt mode runs them one at a time;
automatic mode is a chain of the same ones.

`_ask` is the one choke point of TLSPolicy.REQUIRE: without TLS no option but STARTTLS gets past it. What makes TLS impossible (a
refusal, a handshake that has none) is told by the same rule as soon as it is known. A refusal raises NegotiationError, a broken
rule ProtocolViolation.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Generator, Iterable
from typing import TypeVar

from nbdcore.errors import NegotiationError, ProtocolViolation, TLSError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    MAX_OPTION_BYTES,
    MAX_OPTION_REPLIES,
    MAX_OPTION_REPLY,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_ERROR,
    OPTION_REPLY_MAGIC,
    RESERVED_ZEROES,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)
from nbdcore.protocol.handshake import options
from nbdcore.protocol.handshake.agreement import Agreement, BlockSize, Export, ExportInfo, Settings, TLSPolicy

# Bytes of an over-long reply read at a time while it is skipped: enough to be quick, too little to matter.
_DRAIN_STEP = 1 << 16

# What to try where TLS is required of a server that has none. In parentheses, since the server's own words may follow.
_WITHOUT_TLS = (
    "(ask its owner for TLS, or, if what is sent may be read and changed on the way, connect without: "
    "nbd:// in place of nbds://, or no tls=)"
)

T = TypeVar("T")


class Handover(enum.Enum):
    """What a conversation yields to have the plain stream replaced."""

    TLS = "tls"


HANDOVER = Handover.TLS
Conversation = Generator[int | bytes | Handover, bytes, T]

# ---------------------------------------------------------------------------------------------- the greeting


def greeting(agreement: Agreement, settings: Settings) -> Conversation[None]:
    """Read the server's greeting and answer it (section "Handshake"). An oldstyle server's greeting is all there is."""
    first, second = wire.GREETING.unpack((yield wire.GREETING.size))
    if first != NBD_MAGIC:
        raise ProtocolViolation(0, f"this is no NBD server: it greets with {first:#018x}, not with NBDMAGIC")
    if second == OLDSTYLE_MAGIC:
        yield from _oldstyle(agreement, settings)
    elif second == OPTION_MAGIC:
        yield from _newstyle(agreement, settings)
    else:
        raise ProtocolViolation(0, f"the server greets with an unknown style of handshake, {second:#018x}")


def _oldstyle(agreement: Agreement, settings: Settings) -> Conversation[None]:
    """Read the rest of an oldstyle greeting: size, flags and reserved zeroes."""
    size, flags = wire.OLDSTYLE.unpack((yield wire.OLDSTYLE.size))
    yield RESERVED_ZEROES
    if flags >> 16:
        raise ProtocolViolation(errno.EPROTO, f"an oldstyle server set handshake flags ({flags >> 16:#x}), which it must not")
    _check_flags(flags)
    agreement.protocol = "oldstyle"
    _require_tls(agreement, settings, f"the server speaks the oldstyle handshake, which has no TLS {_WITHOUT_TLS}")
    agreement.export = ExportInfo("", size, agreement.usable_flags(flags))


def _newstyle(agreement: Agreement, settings: Settings) -> Conversation[None]:
    """Read the handshake flags and answer with the client's."""
    (offered,) = wire.HANDSHAKE_FLAGS.unpack((yield wire.HANDSHAKE_FLAGS.size))
    agreed = HandshakeFlag(offered & settings.handshake_flags & 0b11)
    yield wire.CLIENT_FLAGS.pack(agreed)
    agreement.handshake_flags = agreed
    agreement.protocol = "newstyle-fixed" if agreed & HandshakeFlag.FIXED_NEWSTYLE else "newstyle"


# ---------------------------------------------------------------------------------------------- asking


def _require_tls(agreement: Agreement, settings: Settings, why: str, server_text: str = "") -> None:
    if settings.tls is TLSPolicy.REQUIRE and not agreement.tls:
        raise TLSError(errno.ENOTSUP, f"TLS is required, and {why}", server_text=server_text)


def _ask(agreement: Agreement, settings: Settings, option: Option, data: bytes = b"") -> Conversation[None]:
    """Send an option, if it may be sent."""
    if option is not Option.STARTTLS:
        _require_tls(agreement, settings, "it has not been started")
    if not agreement.fixed and option is not Option.EXPORT_NAME:
        raise NegotiationError(errno.ENOTSUP, f"the server does not speak fixed newstyle: it knows no option {option.name}")
    yield wire.pack_option(option, data)


def _reply(option: Option) -> Conversation[tuple[int, bytes, int]]:
    """Read one reply to `option`: its type, the part of its payload that can carry meaning, and its true length in bytes."""
    magic, answered, reply, length = wire.OPTION_REPLY.unpack((yield wire.OPTION_REPLY.size))
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolViolation(0, f"the server answers an option with {magic:#x}, which is no option reply")
    if answered != option:
        raise ProtocolViolation(0, f"the server answers option {answered}, and {option.name} was asked")
    if length > MAX_OPTION_REPLY:
        raise ProtocolViolation(0, f"the server announces an option reply of {length} bytes; nothing legal is that long")
    if reply == OptionReply.ACK and length:
        raise ProtocolViolation(errno.EPROTO, f"the server acknowledges {option.name} with {length} bytes of data")
    kept = min(length, options.LARGEST_MEANINGFUL)
    payload = (yield kept) if kept else b""
    left = length - kept
    while left:
        left -= len((yield min(left, _DRAIN_STEP)))
    return reply, payload, length


def _replies(option: Option, expected: OptionReply, name: str | None) -> Conversation[list[bytes]]:
    """Read replies of the expected type until the server acknowledges.

    Exports and information too long to mean anything are left out; a context of that length is for its parser to refuse.
    """
    collected: list[bytes] = []
    seen = heard = 0
    while True:
        reply, payload, length = yield from _reply(option)
        if reply == OptionReply.ACK:
            return collected
        if reply & OPTION_REPLY_ERROR:
            raise options.refusal(option, reply, options.error_text(payload), name)
        if reply != expected:
            raise ProtocolViolation(errno.EPROTO, f"the server answers {option.name} with a reply of type {reply}")
        seen += 1
        heard += length
        if seen > MAX_OPTION_REPLIES or heard > MAX_OPTION_BYTES:
            raise ProtocolViolation(errno.EPROTO, f"the server's answer to {option.name} does not end ({seen} replies so far)")
        if length == len(payload) or expected is OptionReply.META_CONTEXT:
            collected.append(payload)


def _refusal(option: Option) -> Conversation[NegotiationError | None]:
    """Read the answer to an option that is granted or refused; a refusal is an ordinary answer, and returned."""
    reply, payload, _ = yield from _reply(option)
    if reply == OptionReply.ACK:
        return None
    if reply & OPTION_REPLY_ERROR:
        return options.refusal(option, reply, options.error_text(payload), None)
    raise ProtocolViolation(errno.EPROTO, f"the server answers {option.name} with a reply of type {reply}")


def _granted(option: Option) -> Conversation[bool]:
    """Read the answer to an option that is granted or refused. Raises the refusal of a server that shuts down."""
    refusal = yield from _refusal(option)
    if refusal is not None and refusal.reply == OptionReply.ERR_SHUTDOWN:
        raise refusal
    return refusal is None


# ---------------------------------------------------------------------------------------------- one option at a time


def starttls(agreement: Agreement, settings: Settings) -> Conversation[bool]:
    """Ask for TLS (NBD_OPT_STARTTLS) and hand the stream over to it. Returns whether this was granted.

    Where TLS is required a refusal is the end; TLS that is on already stays on.
    """
    yield from _ask(agreement, settings, Option.STARTTLS)
    refusal = yield from _refusal(Option.STARTTLS)
    if refusal is not None:
        passes = refusal.reply == OptionReply.ERR_SHUTDOWN
        why = refusal.message if passes else f"{refusal.message} {_WITHOUT_TLS}"
        _require_tls(agreement, settings, why, refusal.server_text)
        if passes:
            raise refusal
        return False
    if agreement.tls:
        raise ProtocolViolation(errno.EPROTO, "the server agrees to start TLS a second time")
    yield HANDOVER
    agreement.secure()
    return True


def structured_reply(agreement: Agreement, settings: Settings) -> Conversation[bool]:
    """Ask for structured replies (NBD_OPT_STRUCTURED_REPLY). Returns whether they were granted."""
    yield from _ask(agreement, settings, Option.STRUCTURED_REPLY)
    granted = yield from _granted(Option.STRUCTURED_REPLY)
    agreement.structured |= granted
    return granted


def extended_headers(agreement: Agreement, settings: Settings) -> Conversation[bool]:
    """Ask for extended headers (NBD_OPT_EXTENDED_HEADERS), which imply structured replies. Returns whether they were granted."""
    yield from _ask(agreement, settings, Option.EXTENDED_HEADERS)
    granted = yield from _granted(Option.EXTENDED_HEADERS)
    agreement.extended |= granted
    agreement.structured |= granted
    return granted


def list_exports(agreement: Agreement, settings: Settings) -> Conversation[list[Export]]:
    """Ask which exports there are (NBD_OPT_LIST)."""
    yield from _ask(agreement, settings, Option.LIST)
    return [options.parse_server(payload) for payload in (yield from _replies(Option.LIST, OptionReply.SERVER, None))]


def list_meta_context(agreement: Agreement, settings: Settings, name: str, queries: Iterable[str]) -> Conversation[list[str]]:
    """Ask which metadata contexts match (NBD_OPT_LIST_META_CONTEXT); without queries, which there are."""
    option = Option.LIST_META_CONTEXT
    yield from _ask(agreement, settings, option, options.meta_context_request(name, queries))
    payloads = yield from _replies(option, OptionReply.META_CONTEXT, name)
    return [options.parse_meta_context(payload)[1] for payload in payloads]


def set_meta_context(agreement: Agreement, settings: Settings, name: str, queries: Iterable[str]) -> Conversation[list[str]]:
    """Select metadata contexts for block status (NBD_OPT_SET_META_CONTEXT); what was selected before is gone either way."""
    option = Option.SET_META_CONTEXT
    request = options.meta_context_request(name, queries)
    agreement.forget_contexts()
    yield from _ask(agreement, settings, option, request)
    selected: dict[int, str] = {}
    for payload in (yield from _replies(option, OptionReply.META_CONTEXT, name)):
        number, context = options.parse_meta_context(payload)
        selected.setdefault(number, context)
    agreement.select(name, selected)
    return list(selected.values())


def info(agreement: Agreement, settings: Settings, name: str) -> Conversation[ExportInfo]:
    """Ask about an export without opening it (NBD_OPT_INFO)."""
    return (yield from _describe(agreement, settings, Option.INFO, name))


def go(agreement: Agreement, settings: Settings, name: str) -> Conversation[None]:
    """Open an export and leave the handshake (NBD_OPT_GO, or NBD_OPT_EXPORT_NAME where the server does not know GO)."""
    if agreement.fixed:
        try:
            yield from _describe(agreement, settings, Option.GO, name)
        except NegotiationError as refused:
            # After extended headers were agreed on, EXPORT_NAME must not be sent (section NBD_OPT_EXTENDED_HEADERS).
            if refused.reply != OptionReply.ERR_UNSUP or agreement.extended:
                raise
        else:
            return
    yield from _export_name(agreement, settings, name)


def abort(agreement: Agreement, settings: Settings) -> Conversation[None]:
    """Say goodbye (NBD_OPT_ABORT), where it may be said, without waiting for an answer that not every server sends."""
    if agreement.fixed and (agreement.tls or settings.tls is not TLSPolicy.REQUIRE):
        yield wire.pack_option(Option.ABORT)


def _describe(agreement: Agreement, settings: Settings, option: Option, name: str) -> Conversation[ExportInfo]:
    """Send INFO or GO and take in the answers."""
    request = options.info_request(name, block_size=settings.block_size, full=settings.full_info)
    agreement.forget_export()
    if agreement.contexts_for != name:
        agreement.forget_contexts()
    yield from _ask(agreement, settings, option, request)
    try:
        payloads = yield from _replies(option, OptionReply.INFO, name)
    except NegotiationError as refused:
        if refused.reply != OptionReply.ERR_UNSUP:  # a server that does not know the option did nothing, and keeps the selection
            agreement.forget_contexts()
        raise
    agreement.export = described = _export_info(agreement, name, payloads)
    return described


def _export_info(agreement: Agreement, name: str, payloads: Iterable[bytes]) -> ExportInfo:
    """Put the pieces together; the last of a kind counts, unknown kinds are ignored."""
    size_and_flags: tuple[int, int] | None = None
    block_size = BlockSize()
    texts: dict[int, str] = {}
    for payload in payloads:
        kind = options.info_kind(payload)
        if kind == Info.EXPORT:
            size_and_flags = options.parse_info_export(payload)
        elif kind == Info.BLOCK_SIZE:
            block_size = options.parse_info_block_size(payload)
        elif kind in (Info.NAME, Info.DESCRIPTION):
            texts[kind] = options.parse_info_text(payload)
    if size_and_flags is None:
        raise ProtocolViolation(errno.EPROTO, "the server accepts the export without its size and flags (NBD_INFO_EXPORT)")
    size, flags = size_and_flags
    _check_flags(flags)
    usable = agreement.usable_flags(flags)
    return ExportInfo(name, size, usable, block_size, texts.get(Info.NAME), texts.get(Info.DESCRIPTION))


def _check_flags(flags: int) -> None:
    # Some bit must be set: NBD_FLAG_HAS_FLAGS always is. An export without any flag is how a broken server looks.
    if not flags:
        raise ProtocolViolation(errno.EINVAL, "the export has no transmission flags, and NBD_FLAG_HAS_FLAGS must always be set")


def _export_name(agreement: Agreement, settings: Settings, name: str) -> Conversation[None]:
    """Open an export the old way; a server that does not have it hangs up."""
    request = options.export_name(name)
    agreement.forget_export()
    if agreement.contexts_for != name:
        agreement.forget_contexts()
    yield from _ask(agreement, settings, Option.EXPORT_NAME, request)
    size, flags = wire.EXPORT_NAME_REPLY.unpack((yield wire.EXPORT_NAME_REPLY.size))
    if not agreement.handshake_flags & HandshakeFlag.NO_ZEROES:
        yield RESERVED_ZEROES
    _check_flags(flags)
    agreement.export = ExportInfo(name, size, agreement.usable_flags(flags))


# ---------------------------------------------------------------------------------------------- automatic mode


def handshake(agreement: Agreement, settings: Settings) -> Conversation[bool]:
    """Run the handshake as the settings ask. Returns whether the transmission phase is reached; opt mode stops before it."""
    yield from greeting(agreement, settings)
    if agreement.protocol == "oldstyle":
        return True
    yield from _improve(agreement, settings)
    if settings.opt_mode:
        return False
    yield from enter(agreement, settings, settings.export)
    return True


def _improve(agreement: Agreement, settings: Settings) -> Conversation[None]:
    """Agree on what lasts for the connection: TLS first, so that nothing said in the clear counts, then the reply format."""
    if not agreement.fixed:
        _require_tls(agreement, settings, f"the server speaks an old newstyle handshake, which has no TLS {_WITHOUT_TLS}")
    else:
        if settings.tls is not TLSPolicy.DISABLE:
            yield from starttls(agreement, settings)
        if settings.structured_replies:
            if settings.extended_headers:
                yield from extended_headers(agreement, settings)
            if not agreement.structured:
                yield from structured_reply(agreement, settings)


def enter(agreement: Agreement, settings: Settings, name: str, *, anew: bool = False) -> Conversation[None]:
    """Select the wanted metadata contexts, and open the export. `anew`: whatever is selected for it already."""
    yield from _select(agreement, settings, name, anew=anew)
    yield from go(agreement, settings, name)


def inspect(agreement: Agreement, settings: Settings, name: str) -> Conversation[ExportInfo]:
    """Select the wanted metadata contexts, and ask about the export without opening it: a rehearsal of `enter`."""
    yield from _select(agreement, settings, name, anew=True)
    return (yield from info(agreement, settings, name))


def _select(agreement: Agreement, settings: Settings, name: str, *, anew: bool) -> Conversation[None]:
    """Select the wanted metadata contexts, unless some are selected for the export.

    A refusal is no reason to fail, unless the server shuts down.
    """
    if not settings.request_contexts or (agreement.contexts_for == name and not anew):
        return
    if settings.contexts and agreement.structured:
        try:
            yield from set_meta_context(agreement, settings, name, settings.contexts)
        except NegotiationError as refused:
            if refused.reply == OptionReply.ERR_SHUTDOWN:
                raise
            agreement.select(name, {})
    else:
        agreement.select(name, {})
