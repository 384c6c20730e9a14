"""The handshake, server side: fixed newstyle, from the greeting to an export chosen (section "Newstyle negotiation").

Options come one at a time and each is answered before the next is looked at; what a client declares is checked before memory is
given to it. The outcome is its `Terms`, or none when the client has left.

A client begins without TLS, with the public part of what the server offers. Once it has started TLS it has all of that, and must
begin anew: nothing is kept that was agreed in the clear, where anybody in the middle could have said it (CVE-2021-3716).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nbdcore.errors import printable
from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    BASE_ALLOCATION,
    MAX_STRING,
    NBD_MAGIC,
    OPTION_MAGIC,
    RESERVED_ZEROES,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)
from nbdcore.server.channel import Channel, ConnectionOver
from nbdcore.server.exports import ServedExport
from nbdcore.server.offer import Offer
from nbdcore.server.replies import encoded_text
from nbdcore.server.shutdown import Shutdown
from nbdcore.server.terms import CONTEXT_ID, Terms

__all__ = ["negotiate"]

# The data of an option that is read: a name, and a dozen queries of the longest kind. Real ones have under a hundred bytes.
_MAX_DATA = 64 << 10
# The data of an option that is skipped, to be able to answer; beyond it the client is cut off rather than listened to.
_MAX_DRAIN = 1 << 20


class _Declined(Exception):  # an answer, not an error: one option is refused, the next may come
    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(reply, text)
        self.reply = reply
        self.text = text


def negotiate(channel: Channel, offer: Offer, shutdown: Shutdown, chosen: Callable[[], None]) -> Terms | None:
    """Carry a client through the handshake. Returns None when it said goodbye; raises ConnectionOver and OSError.

    `chosen` is called when the client has chosen its export, before it is told so; what it raises ends the handshake.
    """
    return _Negotiation(channel, offer, shutdown, chosen).run()


class _Negotiation:
    def __init__(self, channel: Channel, offer: Offer, shutdown: Shutdown, chosen: Callable[[], None]) -> None:
        self._chosen = chosen
        self._channel = channel
        self._offer = offer
        self._exports = offer.public
        self._shutdown = shutdown
        self._terms = Terms()
        self._no_zeroes = False
        self._option = 0
        self._answers: dict[int, Callable[[memoryview], None]] = {
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_meta_context,
            Option.SET_META_CONTEXT: self._set_meta_context,
            Option.EXTENDED_HEADERS: self._extended_headers,
        }

    def run(self) -> Terms | None:
        fixed = self._greet()
        while self._terms.export is None:
            option, length = self._next_option()
            if option == Option.EXPORT_NAME:
                self._export_name(length)
            elif not fixed:
                raise ConnectionOver(f"option {option} from a client that knows only EXPORT_NAME", violation=True)
            elif option == Option.ABORT:
                self._abort(length)
                return None
            else:
                self._answer(option, length)
        self._channel.flush()
        return self._terms

    # ------------------------------------------------------------------------------------------ messages

    def _greet(self) -> bool:
        """Exchange greeting and flags; return whether the client speaks fixed newstyle."""
        offered = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)  # inverting a flag leaves unknown bits out
        self._channel.queue(wire.GREETING.pack(NBD_MAGIC, OPTION_MAGIC) + wire.HANDSHAKE_FLAGS.pack(offered))
        start = self._channel.need(wire.CLIENT_FLAGS.size, between=True)
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._channel.buffer, start)
        if flags & ~offered:
            raise ConnectionOver(f"unknown client flags {flags:#x}", violation=True)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        return bool(flags & HandshakeFlag.FIXED_NEWSTYLE)

    def _next_option(self) -> tuple[int, int]:
        """Return number and data length of the next option."""
        start = self._channel.need(wire.OPTION_REQUEST.size, between=True)
        magic, option, length = wire.OPTION_REQUEST.unpack_from(self._channel.buffer, start)
        if magic != OPTION_MAGIC:
            raise ConnectionOver(f"an option with magic {magic:#x}", violation=True)
        self._option = option
        return option, length

    def _answer(self, option: int, length: int) -> None:
        """Answer an option, exactly one final reply whatever it says."""
        if refusal := self._refusal(option, length):
            self._drain(length)
            self._decline(*refusal)
            return
        data = self._channel.payload(length)
        try:
            self._refuse_at_shutdown()
            self._answers[option](data)
        except _Declined as declined:
            self._decline(declined.reply, declined.text)
            return
        self._reply(OptionReply.ACK)
        if option == Option.STARTTLS:
            self._start_tls()

    def _refusal(self, option: int, length: int) -> tuple[OptionReply, str] | None:
        """Return why an option is refused whatever its data are, or None."""
        if self._shutdown.requested:
            return OptionReply.ERR_SHUTDOWN, "the server is being shut down"
        if self._offer.forced and not self._channel.secure and option != Option.STARTTLS:
            return OptionReply.ERR_TLS_REQD, "this server does nothing without TLS"
        if option not in self._answers:
            return OptionReply.ERR_UNSUP, f"option {option} is not known here"
        if length > _MAX_DATA:
            return OptionReply.ERR_TOO_BIG, f"{length} bytes of data; at most {_MAX_DATA} are read"
        return None

    def _refuse_at_shutdown(self) -> None:
        if self._shutdown.requested:
            raise _Declined(OptionReply.ERR_SHUTDOWN, "the server is being shut down")

    def _decline(self, reply: OptionReply, text: str) -> None:
        self._reply(reply, encoded_text(text))

    def _reply(self, reply: int, data: bytes = b"") -> None:
        self._channel.queue(wire.pack_option_reply(self._option, reply, data))

    def _drain(self, length: int) -> None:
        if length > _MAX_DRAIN:
            raise ConnectionOver(f"option {self._option} with {length} bytes of data", violation=True)
        self._channel.drain(length)

    # ------------------------------------------------------------------------------------------ options that end it

    def _export_name(self, length: int) -> None:
        """Enter transmission the old way, which cannot say no but by hanging up."""
        if length > MAX_STRING:
            raise ConnectionOver(f"an export name of {length} bytes", violation=True)
        name = wire.decode_string(self._channel.payload(length))
        export = self._exports.find(name)
        if self._shutdown.requested:
            raise ConnectionOver("the server is being shut down")
        if export is None:
            raise ConnectionOver(f"no export is called {printable(name)!r}{self._without_tls()}")
        if self._terms.extended:
            raise ConnectionOver("EXPORT_NAME after extended headers were agreed", violation=True)
        if export.block_sizes.minimum != 1:
            raise ConnectionOver(f"export {printable(name)!r} needs a client that asks for block sizes")
        self._choose(name, export)
        flags = export.flags(structured=self._terms.structured)
        self._channel.queue(wire.EXPORT_NAME_REPLY.pack(export.size, flags))
        if not self._no_zeroes:
            self._channel.queue(bytes(RESERVED_ZEROES))

    def _abort(self, length: int) -> None:
        self._drain(length)
        self._reply(OptionReply.ACK)
        self._channel.flush()

    def _go(self, data: memoryview) -> None:
        name, export = self._describe(data, opens=True)
        self._choose(name, export)

    def _choose(self, name: str, export: ServedExport) -> None:
        self._chosen()
        self._terms = dataclasses.replace(self._terms, export=export, allocation=self._terms.contexts_for == name)

    # ------------------------------------------------------------------------------------------ options that ask

    def _list(self, data: memoryview) -> None:
        self._no_data(data)
        for export in self._exports:
            description = wire.encode_string(export.description)
            self._reply(OptionReply.SERVER, wire.pack_counted_string(export.name) + description)

    def _starttls(self, data: memoryview) -> None:
        self._no_data(data)
        if self._channel.secure:
            raise _Declined(OptionReply.ERR_INVALID, "TLS was started already")
        if self._offer.start_tls is None:
            raise _Declined(OptionReply.ERR_POLICY, "this server does not offer TLS")

    def _start_tls(self) -> None:
        """Start what was acknowledged, and begin anew."""
        assert self._offer.start_tls is not None
        self._channel.start_tls(self._offer.start_tls)
        self._terms = Terms()
        self._exports = self._offer.exports

    def _info(self, data: memoryview) -> None:
        self._describe(data, opens=False)

    def _describe(self, data: memoryview, *, opens: bool) -> tuple[str, ServedExport]:
        """Answer INFO, and GO, which `opens` it, with everything asked for; return the name asked for, and its export."""
        try:
            name, wanted = wire.unpack_info_request(data)
        except ValueError as problem:
            raise _Declined(OptionReply.ERR_INVALID, str(problem)) from problem
        export = self._find(name)
        sizes = wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *export.block_sizes)
        if export.block_sizes.minimum != 1 and Info.BLOCK_SIZE not in wanted:
            self._reply(OptionReply.INFO, sizes)
            raise _Declined(OptionReply.ERR_BLOCK_SIZE_REQD, "this export needs a client that asks for block sizes")
        terms = self._terms
        # INFO tells of filters that a client could have: it has not chosen contexts yet.
        filters = terms.extended and (not opens or terms.contexts_for == name)
        flags = export.flags(structured=terms.structured, filters=filters)
        self._reply(OptionReply.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, export.size, flags))
        if Info.NAME in wanted:
            self._reply(OptionReply.INFO, wire.UINT16.pack(Info.NAME) + wire.encode_string(export.name))
        if Info.DESCRIPTION in wanted and export.description:
            self._reply(OptionReply.INFO, wire.UINT16.pack(Info.DESCRIPTION) + wire.encode_string(export.description))
        if Info.BLOCK_SIZE in wanted:
            self._reply(OptionReply.INFO, sizes)
        return name, export

    # ------------------------------------------------------------------------------------------ options that set

    def _structured_reply(self, data: memoryview) -> None:
        self._no_data(data)
        if self._terms.extended:
            raise _Declined(OptionReply.ERR_EXT_HEADER_REQD, "extended headers were agreed on, and imply structured replies")
        self._terms.structured = True

    def _extended_headers(self, data: memoryview) -> None:
        self._no_data(data)
        self._terms.structured = self._terms.extended = True

    def _list_meta_context(self, data: memoryview) -> None:
        _, queries = self._meta_context_request(data)
        if not queries or "base:" in queries or BASE_ALLOCATION in queries:
            self._reply(OptionReply.META_CONTEXT, wire.UINT32.pack(0) + BASE_ALLOCATION.encode())

    def _set_meta_context(self, data: memoryview) -> None:
        self._terms.contexts_for = None  # also when this fails
        name, queries = self._meta_context_request(data)
        if BASE_ALLOCATION in queries:
            self._terms.contexts_for = name
            self._reply(OptionReply.META_CONTEXT, wire.UINT32.pack(CONTEXT_ID) + BASE_ALLOCATION.encode())

    def _meta_context_request(self, data: memoryview) -> tuple[str, list[str]]:
        """Return export name and queries; those of namespaces not known here are the caller's to pass over."""
        if not self._terms.structured:
            raise _Declined(OptionReply.ERR_INVALID, "structured replies must be negotiated first")
        try:
            name, queries = wire.unpack_meta_context_request(data)
        except ValueError as problem:
            raise _Declined(OptionReply.ERR_INVALID, str(problem)) from problem
        self._find(name)
        return name, queries

    # ------------------------------------------------------------------------------------------ what several need

    def _find(self, name: str) -> ServedExport:
        export = self._exports.find(name)
        if export is None:
            # Before TLS the answer must not tell whether there is one. The options about contexts have no such answer.
            secret = self._exports is not self._offer.exports and self._option in (Option.INFO, Option.GO)
            reply = OptionReply.ERR_TLS_REQD if secret else OptionReply.ERR_UNKNOWN
            raise _Declined(reply, f"no export is called {printable(name)!r}{self._without_tls()}")
        return export

    def _without_tls(self) -> str:
        return "" if self._exports is self._offer.exports else " where a client has not started TLS"

    def _no_data(self, data: memoryview) -> None:
        if len(data):
            raise _Declined(OptionReply.ERR_INVALID, f"{len(data)} bytes of data where there must be none")
