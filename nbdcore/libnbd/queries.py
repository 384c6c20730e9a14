"""Calls that ask what is known of the connection and its export. None talks to the server."""

from __future__ import annotations

import errno

from nbdcore.errors import UsageError
from nbdcore.libnbd import arguments
from nbdcore.libnbd.calls import KNOWN, call
from nbdcore.libnbd.constants import SIZE_MAXIMUM, SIZE_MINIMUM, SIZE_PAYLOAD, SIZE_PREFERRED
from nbdcore.libnbd.core import Core
from nbdcore.protocol.constants import MAX_SIZE, TransmissionFlag
from nbdcore.protocol.handshake.agreement import ExportInfo


class ExportQueries(Core):
    """The export: its flags, size and names."""

    def _export(self, what: str = "flags") -> ExportInfo:
        export = self._connection.engine.agreement.export
        if export is None:
            raise UsageError(
                errno.EINVAL, f"server has not returned export {what}: connect to it first, or call opt_info or opt_go"
            )
        return export

    def _has(self, flag: TransmissionFlag) -> bool:
        return bool(self._export().flags & flag)

    @call("1.0", KNOWN)
    def is_read_only(self) -> bool:
        """Return whether writing is forbidden."""
        return self._has(TransmissionFlag.READ_ONLY)

    @call("1.0", KNOWN)
    def can_flush(self) -> bool:
        """Return whether `flush` works."""
        return self._has(TransmissionFlag.SEND_FLUSH)

    @call("1.0", KNOWN)
    def can_fua(self) -> bool:
        """Return whether CMD_FLAG_FUA works."""
        return self._has(TransmissionFlag.SEND_FUA)

    @call("1.0", KNOWN)
    def is_rotational(self) -> bool:
        """Return whether the export behaves like a rotating disk."""
        return self._has(TransmissionFlag.ROTATIONAL)

    @call("1.0", KNOWN)
    def can_trim(self) -> bool:
        """Return whether `trim` works."""
        return self._has(TransmissionFlag.SEND_TRIM)

    @call("1.0", KNOWN)
    def can_zero(self) -> bool:
        """Return whether `zero` works."""
        return self._has(TransmissionFlag.SEND_WRITE_ZEROES)

    @call("1.2", KNOWN)
    def can_fast_zero(self) -> bool:
        """Return whether CMD_FLAG_FAST_ZERO works."""
        return self._has(TransmissionFlag.SEND_FAST_ZERO)

    @call("1.18", KNOWN)
    def can_block_status_payload(self) -> bool:
        """Return whether `block_status_filter` works."""
        return self._has(TransmissionFlag.BLOCK_STATUS_PAYLOAD)

    @call("1.0", KNOWN)
    def can_df(self) -> bool:
        """Return whether CMD_FLAG_DF works."""
        return self._has(TransmissionFlag.SEND_DF)

    @call("1.0", KNOWN)
    def can_multi_conn(self) -> bool:
        """Return whether several connections see each other's writes."""
        return self._has(TransmissionFlag.CAN_MULTI_CONN)

    @call("1.0", KNOWN)
    def can_cache(self) -> bool:
        """Return whether `cache` works."""
        return self._has(TransmissionFlag.SEND_CACHE)

    @call("1.0", KNOWN)
    def can_meta_context(self, metacontext: str) -> bool:
        """Return whether a metadata context is selected. Raises Error (EINVAL) while those added have not been asked for."""
        wanted = arguments.text(metacontext, "metacontext")
        agreement = self._connection.engine.agreement
        if agreement.contexts_for is None and self._settings.meta_contexts:
            raise UsageError(errno.EINVAL, "no metadata context has been selected for this export yet")
        return wanted in agreement.contexts.values()

    @call("1.0", KNOWN)
    def get_size(self) -> int:
        """Return the size in bytes. Raises Error (EOVERFLOW) for one of 2**63 bytes and more."""
        size = self._export("size").size
        if size > MAX_SIZE:
            raise UsageError(errno.EOVERFLOW, f"server claims size {size} which does not fit in signed result")
        return size

    @call("1.4", KNOWN)
    def get_block_size(self, size_type: int) -> int:
        """Return a block size constraint in bytes; 0 where the server advertised none."""
        kind = arguments.enumerated(size_type, range(SIZE_MINIMUM, SIZE_PAYLOAD + 1), "size_type")
        block_size = self._export().block_size
        if kind == SIZE_PAYLOAD:
            return block_size.payload
        if not block_size.advertised:
            return 0
        return {
            SIZE_MINIMUM: block_size.minimum,
            SIZE_PREFERRED: block_size.preferred,
            SIZE_MAXIMUM: block_size.maximum,
        }[kind]

    @call("1.4", KNOWN)
    def get_canonical_export_name(self) -> str:
        """Return the server's own name for the export. Raises Error (ENOTSUP) where it gave none."""
        name = self._export().canonical_name
        if name is None:
            raise UsageError(errno.ENOTSUP, "server did not advertise a canonical name")
        return name

    @call("1.4", KNOWN)
    def get_export_description(self) -> str:
        """Return the server's description of the export. Raises Error (ENOTSUP) where it gave none."""
        description = self._export().description
        if description is None:
            raise UsageError(errno.ENOTSUP, "server did not advertise a description")
        return description


class ConnectionQueries(Core):
    """The connection: what was agreed on."""

    @call("1.2", KNOWN)
    def get_protocol(self) -> str:
        """Return the style of the handshake: "oldstyle", "newstyle" or "newstyle-fixed"."""
        return self._connection.engine.agreement.protocol

    @call("1.2", KNOWN)
    def get_tls_negotiated(self) -> bool:
        """Return whether the connection is encrypted."""
        return self._connection.engine.agreement.tls

    @call("1.2", KNOWN)
    def get_structured_replies_negotiated(self) -> bool:
        """Return whether structured replies were agreed on; extended headers imply them."""
        return self._connection.engine.agreement.structured

    @call("1.18", KNOWN)
    def get_extended_headers_negotiated(self) -> bool:
        """Return whether extended headers were agreed on."""
        return self._connection.engine.agreement.extended
