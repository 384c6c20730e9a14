"""What every blocking client does with an export that is open: reading and writing, block status, and taking leave.

A thin skin: commands and their checks come from the protocol core and `requests`, `threads` waits, `extents` does the arithmetic.
What is left here is the shape of the calls, which are the same on one connection and on several.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Self, overload

from nbdcore.clients.blocking.connecting import BlockingConnectMethods
from nbdcore.clients.blocking.many import ManyCalls
from nbdcore.clients.blocking.pipeline import run_pieces
from nbdcore.clients.blocking.several import Shared
from nbdcore.clients.connect.methods import Connected
from nbdcore.clients.extents.columns import CombinedExtentColumns, ExtentColumns
from nbdcore.clients.extents.walking import CombinedExtent, Extent, ExtentWalk, extents_by_context
from nbdcore.clients.requests import single as requests
from nbdcore.clients.requests.arguments import Buffer, deadline_after, texts, whole_numbers
from nbdcore.clients.requests.single import Request
from nbdcore.errors import Error, UsageError
from nbdcore.protocol.constants import BASE_ALLOCATION, CommandFlag
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import NEVER

# Seconds that leaving a `with` block waits for the server to hang up after the goodbye; what was written is not at stake.
_GOODBYE = 5.0
_CONNECTED, _DF = Phase.CONNECTED, CommandFlag.DF


class BlockingCalls(ManyCalls, BlockingConnectMethods[Connected]):
    """The calls of an open export, and the end of the connection. Base of `Client` and `Pool`."""

    # ------------------------------------------------------------------------------------------ ending

    def disconnect(self, *, timeout: float | None = None) -> None:
        """Say goodbye (NBD_CMD_DISC), wait until the server has hung up, and close. In opt mode, say NBD_OPT_ABORT and close.

        It does not wait for commands of other threads, and it does not flush. Does nothing on a connection that has ended.
        """
        deadline = deadline_after(timeout)
        try:
            if self._shared is not None and self.phase is Phase.CONNECTED and not self._shared.inherited:
                self._shared.take_leave(deadline)
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close()
            return
        try:
            self.disconnect(timeout=_GOODBYE)
        except Error:
            # The server did not take leave in time, or broke off: every call before this one has had its own outcome.
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_shared", None) is not None:
            self.close()

    # ------------------------------------------------------------------------------------------ reading and writing

    def pread(self, count: int, offset: int, *, df: bool = False, timeout: float | None = None) -> bytes:
        """Read `count` bytes at `offset` (section NBD_CMD_READ).

        A count larger than the server's maximum is split, unless `df` asks for an answer in one piece.
        """
        engine = self._engine
        limits = engine.limits if engine.phase is _CONNECTED else self._connected("pread")
        if count.__class__ is not int or offset.__class__ is not int:  # as a rule they are, which saves a call
            count, offset = whole_numbers("pread", count, offset)
        if not count:
            self._run(requests.read_nothing(limits, offset, df=df), timeout)
            return b""
        if count <= limits.data or df:
            command = commands.read(limits, count, offset, flags=_DF if df else 0)
            if timeout is None and self._command_timeout is None and self._shared is not None:
                self._shared.run_command(command, NEVER)  # as `_run` does, with a call less
            else:
                self._run(command, timeout)
            return command.result() if command.data is None else command.data
        memory = requests.memory_for(limits, count, offset)
        view = memory.view()
        try:
            self.pread_into(view, offset, timeout=timeout)
        finally:
            view.release()  # an error's traceback may keep it, in a circle with the memory
        return memory.take()

    def pread_into(self, buffer: Buffer, offset: int, *, df: bool = False, timeout: float | None = None) -> int:
        """Read into a writable, contiguous buffer, as much as it holds, without a copy. Returns the number of bytes.

        After an error the buffer's contents are undefined; nothing is written to it once the call has ended.
        """
        count, request = requests.read_into(self._connected("pread_into"), buffer, offset, df=df)
        self._run(request, timeout)
        return count

    def pwrite(self, data: Buffer, offset: int, *, fua: bool = False, timeout: float | None = None) -> None:
        """Write any bytes-like object at `offset` (section NBD_CMD_WRITE). `fua`: return once it is on stable storage.

        Data larger than the server's maximum are split. Do not change them from another thread before the call has ended.
        """
        engine = self._engine
        limits = engine.limits if engine.phase is _CONNECTED else self._connected("pwrite")
        self._run(requests.write(limits, data, offset, fua=fua), timeout)

    def flush(self, *, timeout: float | None = None) -> None:
        """Wait until every write that was answered before is on stable storage (section NBD_CMD_FLUSH)."""
        self._run(commands.flush(self._connected("flush")), timeout)

    def trim(self, count: int, offset: int, *, fua: bool = False, timeout: float | None = None) -> None:
        """Tell the server that a range is no longer needed (section NBD_CMD_TRIM); what it reads as afterwards is undefined."""
        self._run(requests.trim(self._connected("trim"), count, offset, fua=fua), timeout)

    def zero(
        self,
        count: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast_zero: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Write zeroes without sending them (section NBD_CMD_WRITE_ZEROES).

        `no_hole`: storage must stay allocated. `fast_zero`: fail with CommandError (ENOTSUP) where it would be no faster than
        writing.
        """
        limits = self._connected("zero")
        request = requests.zero(limits, count, offset, fua=fua, no_hole=no_hole, fast_zero=fast_zero)
        self._run(request, timeout)

    def cache(self, count: int, offset: int, *, timeout: float | None = None) -> None:
        """Tell the server that a range will be needed soon (section NBD_CMD_CACHE)."""
        self._run(requests.cache(self._connected("cache"), count, offset), timeout)

    # ------------------------------------------------------------------------------------------ block status

    def block_status(
        self,
        count: int,
        offset: int,
        *,
        contexts: Iterable[str] | None = None,
        req_one: bool = False,
        timeout: float | None = None,
    ) -> dict[str, list[Extent]]:
        """Ask once what the metadata contexts say of a range (section NBD_CMD_BLOCK_STATUS). Returns extents by context.

        The server may describe less than was asked, or, at its end, more; contexts need not cover the same range. `extents`
        hides all that. `contexts` limits the answer to some of the selected ones; `req_one` to one extent a context. A count too
        large for one request is cut down to what fits, as if the server had described less.
        """
        limits = self._connected("block_status")
        wanted = None if contexts is None else requests.selected(self._engine.agreement, texts("contexts", contexts))
        command = requests.block_status(limits, count, offset, wanted=wanted, req_one=req_one)
        self._run(command, timeout)
        found = extents_by_context(command)
        return found if wanted is None else {name: found[name] for name in wanted.values() if name in found}

    @overload
    def extents(
        self, context: str = ..., /, *, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> Iterator[Extent]: ...

    @overload
    def extents(
        self, context: str, /, *more: str, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> Iterator[CombinedExtent]: ...

    def extents(
        self,
        context: str = BASE_ALLOCATION,
        /,
        *more: str,
        offset: int = 0,
        count: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[Extent | CombinedExtent]:
        """Walk the extents of a range, by default of the whole export.

        Asks the server as often as needed, clips to the range, and merges neighbours of equal status. With several contexts the
        extents end wherever any of them changes, and have one status for each. `timeout` is for each request.
        """
        deadline_after(timeout)  # a wrong one shows now, not at the first step
        walk = requests.walk(self._connected("extents"), self._engine.agreement, (context, *more), offset, count)
        return chain.from_iterable(self._walk(walk, timeout))

    @overload
    def extent_columns(
        self, context: str = ..., /, *, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> ExtentColumns: ...

    @overload
    def extent_columns(
        self, context: str, /, *more: str, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> CombinedExtentColumns: ...

    def extent_columns(
        self,
        context: str = BASE_ALLOCATION,
        /,
        *more: str,
        offset: int = 0,
        count: int | None = None,
        timeout: float | None = None,
    ) -> ExtentColumns | CombinedExtentColumns:
        """Return the extents of a range as columns: arrays of offsets, lengths and flags, numpy's where numpy is installed.

        What `extents` yields, all at once, in 24 bytes an extent, and 8 for each more context, where objects take 128. A server
        decides how many there are, so bound an untrusted one by `count`. `timeout` is for each request.
        """
        deadline_after(timeout)  # as above
        limits = self._connected("extents")
        walk = requests.walk(limits, self._engine.agreement, (context, *more), offset, count, columns=True)
        while walk.position < walk.end:
            command = requests.next_of_walk(self._connected("extents"), walk)
            self._run(command, timeout)
            walk.take_in(command)
        return walk.columns()

    def _walk(self, walk: ExtentWalk, timeout: float | None) -> Iterator[Iterator[Extent | CombinedExtent]]:
        while walk.position < walk.end:
            command = requests.next_of_walk(self._connected("extents"), walk)
            self._run(command, timeout)
            yield walk.feed(command)

    # ------------------------------------------------------------------------------------------ running

    def _connected(self, call: str) -> commands.Limits:
        engine = self._engine
        if engine.phase is not _CONNECTED:
            self._legal(call)
        return engine.limits

    def _run(self, request: Request, timeout: float | None) -> None:
        """Run a request, in as many pieces as it takes."""
        if timeout is None:
            timeout = self._command_timeout
        deadline = NEVER if timeout is None else deadline_after(timeout)
        shared = self._shared or self._session()
        if isinstance(request, Command):
            if not request.done:  # one for no bytes is done already
                shared.run_command(request, deadline)
        else:
            run_pieces(shared, request, deadline)

    def _session(self) -> Shared:
        if self._shared is None:
            raise UsageError(errno.ENOTCONN, "not connected")
        return self._shared
