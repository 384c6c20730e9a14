"""What a client asks of a connection, and what it and the server have agreed on so far.

Settings are fixed before connecting. An Agreement starts empty and is filled by the conversations of `negotiation`; what
each event wipes is decided by its methods and nowhere else. Nothing in it comes from before STARTTLS (section "TLS support").
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from nbdcore.protocol.constants import BASE_ALLOCATION, DEFAULT_MAXIMUM, MAX_PAYLOAD, HandshakeFlag, TransmissionFlag

_NO_FLAGS = HandshakeFlag(0)
# A single write may always carry so many bytes: section "Block size constraints" asks servers for a maximum of 1 MiB at least.
_SMALLEST_CAP = 1 << 20


class TLSPolicy(enum.Enum):
    """Whether the client asks for TLS: never, if the server offers it, or not at all without it."""

    DISABLE = 0
    ALLOW = 1
    REQUIRE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the client asks for.

    Attributes:
        export: name of the export; "" is the server's default one.
        contexts: metadata contexts to select for block status; empty selects none.
        request_contexts: select `contexts` by itself before the export is opened; False leaves it to opt mode's own call.
        opt_mode: pause before choosing an export, so that options can be sent one at a time.
        tls: whether TLS is asked for.
        structured_replies: ask for structured replies; without them there is no block status.
        extended_headers: ask for extended headers (lengths of 64 bits).
        block_size: ask for the server's block size constraints, and so promise to obey them.
        full_info: ask for the canonical name and the description of the export.
        handshake_flags: client flags that may be agreed on; fewer only to test old servers.
    """

    export: str = ""
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    request_contexts: bool = True
    opt_mode: bool = False
    tls: TLSPolicy = TLSPolicy.DISABLE
    structured_replies: bool = True
    extended_headers: bool = True
    block_size: bool = True
    full_info: bool = True
    handshake_flags: HandshakeFlag = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Block size constraints in bytes (section "Block size constraints").

    Attributes:
        minimum: every offset and count must be a multiple of it.
        preferred: multiples of it are efficient.
        maximum: largest read or write in one request; 0xffffffff is no limit.
        advertised: whether the server named them; otherwise these are the specification's defaults.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = DEFAULT_MAXIMUM
    advertised: bool = False

    @property
    def payload(self) -> int:
        """Most bytes that a single write may carry."""
        return min(max(self.maximum, _SMALLEST_CAP), MAX_PAYLOAD) if self.advertised else DEFAULT_MAXIMUM


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the server says of an export (sections NBD_OPT_INFO and "Transmission flags").

    Attributes:
        name: the name asked for.
        size: bytes.
        flags: what it can do.
        block_size: constraints on requests.
        canonical_name: the server's own name for it, where it gave one.
        description: for humans, where it gave one.
    """

    name: str
    size: int
    flags: TransmissionFlag
    block_size: BlockSize = BlockSize()
    canonical_name: str | None = None
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """One entry of a server's list (NBD_OPT_LIST): the name to connect to, and a description, "" where there is none."""

    name: str
    description: str = ""


@dataclass(slots=True)
class Traffic:
    """What has gone over the wire, counted as libnbd counts it.

    Attributes:
        bytes_sent, bytes_received: of the protocol, handshake included; under TLS those inside it.
        chunks_sent: requests, of options and of commands.
        chunks_received: the greeting, and the headers of replies to commands.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    chunks_sent: int = 0
    chunks_received: int = 0


@dataclass(slots=True)
class Agreement:
    """What has been agreed on, or learnt, so far.

    Attributes:
        protocol: "oldstyle", "newstyle" or "newstyle-fixed"; "" before the greeting.
        handshake_flags: the flags that both sides set.
        tls: the connection is encrypted.
        structured: structured replies are on (extended headers imply them).
        extended: extended headers are on.
        export: what is known of the current export.
        contexts: id -> name of the selected metadata contexts; the first of two equal ids counts.
        contexts_for: export name that the contexts were selected for; None when no selection is in force.
    """

    protocol: str = ""
    handshake_flags: HandshakeFlag = _NO_FLAGS
    tls: bool = False
    structured: bool = False
    extended: bool = False
    export: ExportInfo | None = None
    contexts: dict[int, str] = field(default_factory=dict)
    contexts_for: str | None = None

    @property
    def fixed(self) -> bool:
        """Whether options other than EXPORT_NAME may be sent."""
        return self.protocol == "newstyle-fixed"

    def select(self, name: str, contexts: dict[int, str]) -> None:
        """Take note of the metadata contexts selected for an export."""
        self.contexts = contexts
        self.contexts_for = name

    def forget_contexts(self) -> None:
        """No selection is in force: SET_META_CONTEXT was sent and not answered well, or another export was asked about."""
        self.contexts = {}
        self.contexts_for = None

    def forget_export(self) -> None:
        """INFO or GO was sent: what was known before counts no more, whatever the answer."""
        self.export = None

    def secure(self) -> None:
        """TLS is on: everything learnt in the clear is forgotten (section "TLS support", CVE-2021-3716)."""
        self.tls = True
        self.structured = False
        self.extended = False
        self.forget_export()
        self.forget_contexts()

    def usable_flags(self, flags: int) -> TransmissionFlag:
        """Return the export's flags without those that what was agreed on rules out."""
        ruled_out = 0
        if not self.structured:
            ruled_out |= TransmissionFlag.SEND_DF
        if not self.extended:
            ruled_out |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        if not flags & TransmissionFlag.SEND_WRITE_ZEROES:
            ruled_out |= TransmissionFlag.SEND_FAST_ZERO
        return TransmissionFlag(flags & ~int(ruled_out))  # the complement of an IntFlag would drop bits that it has no name for
