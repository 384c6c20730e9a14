"""Exports: what a client can choose, with what, and under which name.

`ServedExport` joins what the user says (`settings`) to the back end, works out what can be offered, and guards the back end:
its errors become refusals with the wire's numbers, what it returns is checked, what it lacks is done in another way. Nothing
here knows sockets or messages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from nbdcore.errors import printable
from nbdcore.logs import server_log
from nbdcore.protocol.constants import ErrorNumber, TransmissionFlag
from nbdcore.server.backend import Backend, Refusal, error_number
from nbdcore.server.ranges import aligned, clipped, merged
from nbdcore.server.settings import (
    BlockSizes,
    Exported,
    ExportSettings,
    checked_block_sizes,
    checked_size,
    checked_string,
    named_settings,
)

__all__ = ["ServedExport", "ServedExports", "exports_of"]

# Zeroes written in place of a zeroing that the back end cannot do: one shared piece, so that a request over the whole disk costs
# no memory, and a stop need not wait for its end.
_ZEROES = memoryview(bytes(1 << 20))
# Errors that whoever runs the server wants to know of: the client is not to blame, and the next one will meet them too.
_STORAGE_TROUBLE = frozenset({ErrorNumber.EPERM, ErrorNumber.EIO, ErrorNumber.ENOMEM, ErrorNumber.ENOSPC})
# What they can do about it.
_ADVICE = {ErrorNumber.ENOSPC: "; make room where it is, or raise its limit (a quota, ulimit -f), and clients can write again"}
# Extents looked at for one request: enough for a fragmented file, little enough that a client cannot keep a thread busy.
_MAX_EXTENTS = 8192
# Extents have multiples of this where they can (section "NBD_CMD_BLOCK_STATUS").
_SECTOR = 512


class ServedExport:
    """One export as clients see it, safe from several threads as far as its back end is.

    The methods that act on the back end take ranges that were checked, and raise Refusal.
    """

    def __init__(self, name: str, settings: ExportSettings, *, read_only: bool = False) -> None:
        """Work out what can be offered. Raises UsageError for a name, size, description or block sizes that cannot be."""
        backend = settings.backend
        self.name: str = checked_string("name", name)
        self.description: str = checked_string("description", settings.description)
        self.size: int = checked_size(name, backend.size)
        self.block_sizes: BlockSizes = checked_block_sizes(name, BlockSizes(*settings.block_sizes), self.size)
        self.read_only: bool = (
            read_only or settings.read_only or getattr(backend, "read_only", False) or not hasattr(backend, "pwrite")
        )
        self.require_tls: bool = settings.require_tls
        self._settings = settings
        self._pread = backend.pread
        self._pwrite = self._optional("pwrite", writing=True)
        self._flush = self._optional("flush", writing=True)
        self._trim = self._optional("trim", writing=True)
        self._zero = self._optional("zero", writing=True)
        self._cache = self._optional("cache")
        self._extents = self._optional("extents")
        self._reported: set[tuple[str, object]] = set()
        disk = getattr(backend, "name", "")
        self._shown = f"export {name!r}" + (f" ({printable(disk)})" if isinstance(disk, str) and disk else "")

    def flags(self, *, structured: bool, filters: bool = False) -> TransmissionFlag:
        """Return the transmission flags for a client that negotiated structured replies or not (section "Transmission flags").

        `filters`: block status may be asked about some of the contexts that were selected.
        """
        flag = TransmissionFlag
        offered = {
            flag.HAS_FLAGS: True,
            flag.READ_ONLY: self.read_only,
            flag.SEND_FLUSH: self._flush,
            flag.SEND_FUA: self._flush,
            flag.ROTATIONAL: self._settings.rotational,
            flag.SEND_TRIM: self._trim,
            flag.SEND_WRITE_ZEROES: self._pwrite,
            flag.SEND_DF: structured,
            flag.CAN_MULTI_CONN: self._settings.multi_conn,
            flag.SEND_CACHE: self._cache,
            flag.SEND_FAST_ZERO: self._pwrite,
            flag.BLOCK_STATUS_PAYLOAD: filters,
        }
        return flag(sum(bit for bit, offer in offered.items() if offer))

    @property
    def backend(self) -> Backend:
        """The back end."""
        return self._settings.backend

    @property
    def knows_holes(self) -> bool:
        """Whether asking for extents can tell anything."""
        return self._extents is not None

    # ------------------------------------------------------------------------------------------ what clients do

    def read(self, count: int, offset: int) -> bytes:
        """Return `count` bytes that nobody changes any more."""
        try:  # as `_guarded` does, without a call for each read
            data = self._pread(count, offset)
        except Exception as problem:
            raise self._refusal("pread", self._pread, (count, offset), problem) from problem
        if type(data) is not bytes:
            # A copy, since the back end may use its buffer for the next client; bytes() alone would make zeroes of a number.
            data = self._guarded("pread", lambda: bytes(memoryview(data)))
        if len(data) != count:
            raise self._fault("pread", f"returned {len(data)} bytes where {count} were asked for")
        return data

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`."""
        assert self._pwrite is not None  # as in `_guarded`
        try:
            self._pwrite(data, offset)
        except Exception as problem:
            raise self._refusal("pwrite", self._pwrite, (data, offset), problem) from problem

    def flush(self) -> None:
        """Return when what was written is on permanent storage."""
        self._guarded("flush", self._flush)

    def trim(self, count: int, offset: int) -> None:
        """Give up the contents of a range."""
        self._guarded("trim", self._trim, count, offset)

    def cache(self, count: int, offset: int) -> None:
        """Prepare for reading a range."""
        self._guarded("cache", self._cache, count, offset)

    def zero(self, count: int, offset: int, *, may_trim: bool, fast: bool, interrupted: Callable[[], bool]) -> None:
        """Make a range read as zeroes: by the back end's own means, else in pieces, unless it must be `fast`.

        `interrupted` is asked between pieces; when it says yes the rest is refused with NBD_ESHUTDOWN.
        """
        if self._zero is not None:
            try:
                self._guarded("zero", self._zero, count, offset, may_trim=may_trim)
            except Refusal as refusal:
                if fast or refusal.number != ErrorNumber.ENOTSUP:
                    raise
            else:
                return
        if fast:
            raise Refusal(ErrorNumber.ENOTSUP, "zeroing this range is no faster than writing zeroes")
        end = offset + count
        while offset < end:
            if interrupted():
                raise Refusal(ErrorNumber.ESHUTDOWN, "the server is being shut down; part of the range was zeroed")
            piece = _ZEROES[: end - offset]
            self.write(piece, offset)
            offset += len(piece)

    def extents(self, count: int, offset: int, limit: int = _MAX_EXTENTS) -> list[tuple[int, int]]:
        """Return at least one and at most `limit` (length, flags), consecutive from `offset` on, none past the range.

        Neighbours differ, and all lengths fit the minimum block size.
        """
        if self._extents is None:
            return [(count, 0)]
        found: list[tuple[int, int]] = self._guarded("extents", self._look_up, count, offset, limit)
        if not found:
            raise self._fault("extents", f"knows nothing at offset {offset}")
        return found

    def close(self) -> None:
        """Close the back end, where it can be closed. An error is logged."""
        close = getattr(self._settings.backend, "close", None)
        if close is not None:
            try:
                self._guarded("close", close)
            except Refusal as refusal:
                server_log.warning("%s could not be closed: %s", self._shown, refusal.text)

    # ------------------------------------------------------------------------------------------ guarding the back end

    def _optional(self, name: str, *, writing: bool = False) -> Callable[..., Any] | None:
        return None if writing and self.read_only else getattr(self._settings.backend, name, None)

    def _look_up(self, count: int, offset: int, limit: int) -> list[tuple[int, int]]:
        assert self._extents is not None
        told = islice(self._extents(count, offset), _MAX_EXTENTS)
        return list(islice(merged(self._aligned(clipped(told, count), offset)), limit))

    def _aligned(self, extents: Iterable[tuple[int, int]], offset: int) -> Iterator[tuple[int, int]]:
        minimum = self.block_sizes.minimum
        return aligned(extents, max(minimum, _SECTOR), minimum=minimum, start=offset)

    def _guarded(self, what: str, function: Callable[..., Any] | None, *arguments: Any, **options: Any) -> Any:
        """Call the back end; whatever it raises becomes a refusal."""
        assert function is not None, what  # the flags offered, and the checks that follow them, leave out what is missing
        try:
            return function(*arguments, **options)
        except Exception as problem:
            raise self._refusal(what, function, arguments, problem) from problem

    def _refusal(self, what: str, function: object, arguments: tuple[Any, ...], problem: Exception) -> Refusal:
        """Return what a client hears of an exception of the back end, and log what whoever runs the server should hear."""
        if not isinstance(problem, OSError):  # a back end is anybody's code, and its faults must not end the connection
            self._report(what, type(problem), f"raised {type(problem).__name__}", trace=True)
            return Refusal(ErrorNumber.EIO, "the back end of this export failed; the server's log says why")
        text = str(problem.strerror or type(problem).__name__)  # as in `error_number`
        number = error_number(problem)
        if number == ErrorNumber.ENOTSUP and function is not self._zero:
            number = ErrorNumber.EINVAL  # on the wire, ENOTSUP says that zeroing is not fast, and nothing else
        if number in _STORAGE_TROUBLE:
            self._report(what, number, f"failed: {text}{_ADVICE.get(number, '')}")
        else:
            server_log.debug("export %r: %s%r failed", self.name, what, arguments[-2:], exc_info=True)
        return Refusal(number, text)

    def _fault(self, what: str, problem: str) -> Refusal:
        self._report(what, Refusal, problem)
        return Refusal(ErrorNumber.EIO, f"the back end of this export failed: {what} {problem}")

    def _report(self, what: str, kind: object, problem: str, *, trace: bool = False) -> None:
        """Log trouble of the back end, loudly the first time only: clients decide how often it happens."""
        level = logging.DEBUG if (what, kind) in self._reported else logging.ERROR
        self._reported.add((what, kind))
        server_log.log(level, "%s: the back end's %s %s", self._shown, what, problem, exc_info=trace)


class ServedExports:
    """All exports of a server by name; the empty name chooses the only one."""

    def __init__(self, exports: Iterable[ServedExport]) -> None:
        self._named = {export.name: export for export in exports}
        self._unnamed = next(iter(self._named.values())) if len(self._named) == 1 else None

    def __iter__(self) -> Iterator[ServedExport]:
        return iter(self._named.values())

    def find(self, name: str) -> ServedExport | None:
        """Return the export of that name, or None."""
        return self._named.get(name) or (self._unnamed if name == "" else None)

    def close(self) -> None:
        """Close each back end once, also one that has several names. Errors are logged."""
        for export in {id(export.backend): export for export in self}.values():
            export.close()

    def public(self) -> ServedExports:
        """Return those that do not require TLS, each found as it is here; all of them are `self`."""
        public = ServedExports(export for export in self if not export.require_tls)
        if len(public._named) == len(self._named):
            return self
        # One that is left over is not the only one, and a client must not see how many there are.
        public._unnamed = None
        return public


def exports_of(given: Exported, *, read_only: bool) -> ServedExports:
    """Return the exports that a server was given. Raises UsageError."""
    return ServedExports(ServedExport(name, one, read_only=read_only) for name, one in named_settings(given).items())
