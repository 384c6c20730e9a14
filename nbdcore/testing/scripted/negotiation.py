"""The handshake of a sensible server, as one step of a script, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nbdcore.protocol import wire
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.testing.scripted.connection import ClientGone, Connection
from nbdcore.testing.scripted.messages import EVERYTHING, info_replies, option_reply

__all__ = ["Negotiation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiation:
    """Answers whatever options a sensible client asks, until it opens the export or says goodbye. The greeting has been sent.

    Attributes:
        size: of the export, whatever its name, in bytes.
        flags: its transmission flags.
        structured: structured replies are granted when asked for.
        extended: extended headers are granted when asked for.
        contexts: id -> name of the metadata contexts there are; a query finds the one that it names.
        exports: name -> description of what is listed.
        block_size: minimum, preferred and maximum in bytes; None: nothing is said of them.
        name: the export's canonical name, where it is told.
        description: its description, where it is told.
    """

    size: int = 1 << 20
    flags: int = EVERYTHING
    structured: bool = True
    extended: bool = False
    contexts: Mapping[int, str] = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    block_size: tuple[int, int, int] | None = None
    name: str | None = None
    description: str | None = None

    def __call__(self, connection: Connection) -> None:
        """Play it."""
        connection.receive(wire.CLIENT_FLAGS.size)
        option = 0
        while option not in (Option.GO, Option.ABORT, Option.EXPORT_NAME):
            option, asked = connection.receive_option()
            try:
                connection.send(self._reply(option, asked))
            except ClientGone:
                if option != Option.ABORT:  # a client need not wait for the answer to its goodbye
                    raise

    def _reply(self, option: int, asked: bytes) -> bytes:
        if option == Option.EXPORT_NAME:
            return wire.EXPORT_NAME_REPLY.pack(self.size, self.flags)
        if option in (Option.GO, Option.INFO):
            return info_replies(
                option, self.size, self.flags, block_size=self.block_size, name=self.name, description=self.description
            )
        if option == Option.LIST:
            entries = (wire.pack_counted_string(name) + text.encode() for name, text in self.exports.items())
            return _each(option, OptionReply.SERVER, entries)
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return _each(option, OptionReply.META_CONTEXT, self._contexts(option, asked))
        granted = {Option.STRUCTURED_REPLY: self.structured, Option.EXTENDED_HEADERS: self.extended, Option.ABORT: True}
        return option_reply(option, OptionReply.ACK if granted.get(Option(option)) else OptionReply.ERR_UNSUP)

    def _contexts(self, option: int, asked: bytes) -> Iterable[bytes]:
        _, queries = wire.unpack_meta_context_request(memoryview(asked))
        every = option == Option.LIST_META_CONTEXT and not queries
        return (wire.UINT32.pack(number) + name.encode() for number, name in self.contexts.items() if every or name in queries)


def _each(option: int, reply: int, payloads: Iterable[bytes]) -> bytes:
    return b"".join(option_reply(option, reply, payload) for payload in payloads) + option_reply(option)
