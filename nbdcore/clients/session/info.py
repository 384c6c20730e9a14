"""What is known of a connection and its export, for every front end alike: questions that the engine answers without waiting."""

from __future__ import annotations

import errno

from nbdcore.errors import UsageError
from nbdcore.protocol import state
from nbdcore.protocol.constants import MAX_SIZE, TransmissionFlag
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.handshake.agreement import BlockSize, ExportInfo
from nbdcore.protocol.state import Phase


class Info:
    """Answers about the connection. Base of every front end.

    A question about the export raises UsageError before it is known: while newly created or connecting, and in opt mode until
    `opt_info` or `opt_go` succeeded. After the connection was closed the answers stay; of a dead one nothing is believed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def phase(self) -> Phase:
        """Where the connection stands."""
        return self._engine.phase

    def _legal(self, call: str) -> None:
        engine = self._engine
        state.check(call, engine.phase, why=engine.error, lost=engine.lost)

    def _export(self, call: str) -> ExportInfo:
        self._legal(call)
        export = self._engine.agreement.export
        if export is None:
            raise UsageError(errno.EINVAL, f"{call}: nothing is known of an export yet; opt_info or opt_go asks the server")
        return export

    # ------------------------------------------------------------------------------------------ the export

    @property
    def size(self) -> int:
        """Size of the export in bytes. Raises UsageError (EOVERFLOW) beyond 2**63 - 1, which no file can address."""
        size = self._export("size").size
        if size > MAX_SIZE:
            raise UsageError(errno.EOVERFLOW, f"the export claims {size} bytes; no more than {MAX_SIZE} can be addressed")
        return size

    @property
    def flags(self) -> TransmissionFlag:
        """What the export can do (section "Transmission flags"), without what was not agreed on."""
        return self._export("flags").flags

    @property
    def block_size(self) -> BlockSize:
        """Block size constraints in bytes; the specification's defaults where the server named none."""
        return self._export("block_size").block_size

    @property
    def export_name(self) -> str:
        """The server's own name for the export, where it gave one, else the name asked for."""
        export = self._export("export_name")
        return export.name if export.canonical_name is None else export.canonical_name

    @property
    def description(self) -> str:
        """The server's description of the export, "" where it gave none."""
        return self._export("description").description or ""

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of the selected metadata contexts, those that block status reports."""
        self._legal("contexts")
        return tuple(self._engine.agreement.contexts.values())

    @property
    def read_only(self) -> bool:
        """Whether writing is forbidden."""
        return bool(self.flags & TransmissionFlag.READ_ONLY)

    @property
    def rotational(self) -> bool:
        """Whether the export behaves like a rotating disk."""
        return bool(self.flags & TransmissionFlag.ROTATIONAL)

    @property
    def can_flush(self) -> bool:
        """Whether `flush` works."""
        return bool(self.flags & TransmissionFlag.SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        """Whether `fua=True` works."""
        return bool(self.flags & TransmissionFlag.SEND_FUA)

    @property
    def can_trim(self) -> bool:
        """Whether `trim` works."""
        return bool(self.flags & TransmissionFlag.SEND_TRIM)

    @property
    def can_zero(self) -> bool:
        """Whether `zero` works."""
        return bool(self.flags & TransmissionFlag.SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        """Whether `zero(fast_zero=True)` works."""
        return bool(self.flags & TransmissionFlag.SEND_FAST_ZERO)

    @property
    def can_cache(self) -> bool:
        """Whether `cache` works."""
        return bool(self.flags & TransmissionFlag.SEND_CACHE)

    @property
    def can_df(self) -> bool:
        """Whether `pread(df=True)` works."""
        return bool(self.flags & TransmissionFlag.SEND_DF)

    @property
    def can_multi_conn(self) -> bool:
        """Whether several connections to the export see each other's writes, and one flush covers all."""
        return bool(self.flags & TransmissionFlag.CAN_MULTI_CONN)

    @property
    def can_block_status_payload(self) -> bool:
        """Whether block status can be asked for some of the contexts only."""
        return bool(self.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD)

    # ------------------------------------------------------------------------------------------ the connection

    @property
    def protocol(self) -> str:
        """The handshake: "oldstyle", "newstyle" or "newstyle-fixed"."""
        self._legal("protocol")
        return self._engine.agreement.protocol

    @property
    def structured_replies(self) -> bool:
        """Whether structured replies were agreed on; extended headers imply them."""
        self._legal("protocol")
        return self._engine.agreement.structured

    @property
    def extended_headers(self) -> bool:
        """Whether extended headers (64-bit lengths) were agreed on."""
        self._legal("protocol")
        return self._engine.agreement.extended

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        self._legal("protocol")
        return self._engine.agreement.tls
