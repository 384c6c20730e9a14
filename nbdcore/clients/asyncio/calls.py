"""What every client for asyncio does with an export that is open; see `blocking.calls`. Here every call is a coroutine.

A thin skin, like the blocking one: commands and their checks come from the protocol core and `requests`, `loop` moves the bytes,
`connecting` connects. What is left here is the shape of the calls, which are the same on one connection and on several.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable
from operator import attrgetter
from typing import Any, Self, TypeVar, overload

from nbdcore.clients.asyncio.connecting import AsyncConnectMethods
from nbdcore.clients.asyncio.many import Many
from nbdcore.clients.asyncio.pipeline import run_pieces
from nbdcore.clients.connect.methods import Connected
from nbdcore.clients.extents.columns import CombinedExtentColumns, ExtentColumns
from nbdcore.clients.extents.walking import CombinedExtent, Extent, ExtentWalk, extents_by_context
from nbdcore.clients.requests import batches
from nbdcore.clients.requests import single as requests
from nbdcore.clients.requests.arguments import Buffer, deadline_after, texts, whole_numbers
from nbdcore.clients.requests.batches import DEPTH
from nbdcore.clients.requests.single import Pieces, Request
from nbdcore.errors import Error
from nbdcore.protocol.constants import BASE_ALLOCATION, CommandFlag
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command, Limits

# Seconds that leaving an `async with` block waits for the server to hang up after the goodbye; what was written is not at stake.
_GOODBYE = 5.0

_OFFSET = attrgetter("offset")
_CONNECTED = Phase.CONNECTED  # looked up once: to find a member costs as much as a call

Item = TypeVar("Item")


class AsyncCalls(AsyncConnectMethods[Connected]):
    """The calls of an open export, and the end of the connection. Base of `AsyncClient` and `AsyncPool`."""

    # ------------------------------------------------------------------------------------------ ending

    async def disconnect(self, *, timeout: float | None = None) -> None:
        """Say goodbye (NBD_CMD_DISC), wait until the server has hung up, and close. In opt mode, say NBD_OPT_ABORT and close.

        It does not wait for commands of other tasks, and it does not flush. Does nothing on a connection that has ended.
        """
        deadline = deadline_after(timeout)
        try:
            if self._shared is not None and self.phase is Phase.CONNECTED:
                await self._session().take_leave(deadline)
        finally:
            self._close()

    async def close(self) -> None:
        """Close the connection now. Never raises and never waits; may be called twice. Waiting calls of other tasks end."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._close()
            return
        try:
            await self.disconnect(timeout=_GOODBYE)
        except Error:
            # The server did not take leave in time, or broke off: every call before this one has had its own outcome.
            self._close()

    # ------------------------------------------------------------------------------------------ reading and writing

    async def pread(self, count: int, offset: int, *, df: bool = False, timeout: float | None = None) -> bytes:
        """Read `count` bytes at `offset` (section NBD_CMD_READ).

        A count larger than the server's maximum is split, unless `df` asks for an answer in one piece.
        """
        live = self._shared
        if live is None or live.engine.phase is not _CONNECTED:
            self._legal("pread")
            live = self._session()
        limits = live.engine.limits
        if count.__class__ is not int or offset.__class__ is not int:  # as a rule they are, which saves a call
            count, offset = whole_numbers("pread", count, offset)
        if not count:
            await self._run(requests.read_nothing(limits, offset, df=df), timeout)
            return b""
        if count <= limits.data or df:
            command = commands.read(limits, count, offset, flags=CommandFlag.DF if df else 0)
            await live.run(command, self._command_timeout if timeout is None else timeout)
            data = command.data
            return command.result() if data is None else data
        memory = requests.memory_for(limits, count, offset)
        view = memory.view()
        try:
            await self.pread_into(view, offset, timeout=timeout)
        finally:
            view.release()  # an error's traceback may keep it, in a circle with the memory
        return memory.take()

    async def pread_into(self, buffer: Buffer, offset: int, *, df: bool = False, timeout: float | None = None) -> int:
        """Read into a writable, contiguous buffer, as much as it holds, without a copy. Returns the number of bytes.

        After an error the buffer's contents are undefined; nothing is written to it once the call has ended, however it ended.
        """
        count, request = requests.read_into(self._connected("pread_into"), buffer, offset, df=df)
        await self._run(request, timeout)
        return count

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False, timeout: float | None = None) -> None:
        """Write any bytes-like object at `offset` (section NBD_CMD_WRITE). `fua`: return once it is on stable storage.

        Data larger than the server's maximum are split. Do not change them before the call has ended.
        """
        await self._run(requests.write(self._connected("pwrite"), data, offset, fua=fua), timeout)

    async def flush(self, *, timeout: float | None = None) -> None:
        """Wait until every write that was answered before is on stable storage (section NBD_CMD_FLUSH)."""
        await self._run(commands.flush(self._connected("flush")), timeout)

    async def trim(self, count: int, offset: int, *, fua: bool = False, timeout: float | None = None) -> None:
        """Tell the server that a range is no longer needed (section NBD_CMD_TRIM); what it reads as afterwards is undefined."""
        await self._run(requests.trim(self._connected("trim"), count, offset, fua=fua), timeout)

    async def zero(
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
        await self._run(request, timeout)

    async def cache(self, count: int, offset: int, *, timeout: float | None = None) -> None:
        """Tell the server that a range will be needed soon (section NBD_CMD_CACHE)."""
        await self._run(requests.cache(self._connected("cache"), count, offset), timeout)

    # ------------------------------------------------------------------------------------------ many at a time

    def pread_many(
        self, ranges: Iterable[tuple[int, int]], *, depth: int = DEPTH, timeout: float | None = None
    ) -> Many[tuple[int, bytes]]:
        """Read many ranges: `async for offset, data in disk.pread_many([(offset, count), ...])`, as they come in.

        Less costly than a task for each. Up to `depth` requests are under way at a time, and no more than that are ahead of the
        loop, which consumes `ranges` bit by bit. After an error the rest is waited for and yielded, then the error is raised.
        Leaving the loop gives up what is under way. `timeout` is for each step.
        """
        fresh = batches.reads(self._connected("pread"), ranges)
        return self._many("pread_many", fresh, lambda done: (done.offset, done.result()), depth, timeout)

    def pread_into_many(
        self, items: Iterable[tuple[int, Buffer]], *, depth: int = DEPTH, timeout: float | None = None
    ) -> Many[int]:
        """Read into many (offset, buffer) pairs; yields the offset of each buffer that has been filled. See `pread_many`."""
        return self._many("pread_into_many", batches.reads_into(self._connected("pread_into"), items), _OFFSET, depth, timeout)

    def pwrite_many(
        self,
        items: Iterable[tuple[int, Buffer]],
        *,
        fua: bool = False,
        depth: int = DEPTH,
        timeout: float | None = None,
    ) -> Many[int]:
        """Write many (offset, data) pairs; yields the offset of each that has been written. See `pread_many`."""
        fresh = batches.writes(self._connected("pwrite"), items, fua=fua)
        return self._many("pwrite_many", fresh, _OFFSET, depth, timeout)

    def zero_many(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast_zero: bool = False,
        depth: int = DEPTH,
        timeout: float | None = None,
    ) -> Many[int]:
        """Write zeroes to many (offset, count) ranges; yields the offset of each that is done. See `zero` and `pread_many`."""
        fresh = batches.zeroes(self._connected("zero"), ranges, fua=fua, no_hole=no_hole, fast_zero=fast_zero)
        return self._many("zero_many", fresh, _OFFSET, depth, timeout)

    def trim_many(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        fua: bool = False,
        depth: int = DEPTH,
        timeout: float | None = None,
    ) -> Many[int]:
        """Trim many (offset, count) ranges; yields the offset of each that is done. See `trim` and `pread_many`."""
        return self._many("trim_many", batches.trims(self._connected("trim"), ranges, fua=fua), _OFFSET, depth, timeout)

    # ------------------------------------------------------------------------------------------ block status

    async def block_status(
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
        await self._run(command, timeout)
        found = extents_by_context(command)
        return found if wanted is None else {name: found[name] for name in wanted.values() if name in found}

    @overload
    def extents(
        self, context: str = ..., /, *, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> AsyncIterator[Extent]: ...

    @overload
    def extents(
        self, context: str, /, *more: str, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> AsyncIterator[CombinedExtent]: ...

    def extents(
        self,
        context: str = BASE_ALLOCATION,
        /,
        *more: str,
        offset: int = 0,
        count: int | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Extent | CombinedExtent]:
        """Walk the extents of a range, by default of the whole export, with `async for`.

        One by one, as the server describes them: asked for in as many requests as it takes, clipped to the range, neighbours of
        equal status merged. With several contexts extents end wherever any of them changes, and have one status for each.
        `timeout` is for each request.
        """
        deadline_after(timeout)  # a wrong one shows now, not at the first step
        walk = requests.walk(self._connected("extents"), self._engine.agreement, (context, *more), offset, count)
        return self._walk(walk, timeout)

    @overload
    async def extent_columns(
        self, context: str = ..., /, *, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> ExtentColumns: ...

    @overload
    async def extent_columns(
        self, context: str, /, *more: str, offset: int = ..., count: int | None = ..., timeout: float | None = ...
    ) -> CombinedExtentColumns: ...

    async def extent_columns(
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
            await self._run(command, timeout)
            walk.take_in(command)
        return walk.columns()

    async def _walk(self, walk: ExtentWalk, timeout: float | None) -> AsyncIterator[Extent | CombinedExtent]:
        while walk.position < walk.end:
            command = requests.next_of_walk(self._connected("extents"), walk)
            await self._run(command, timeout)
            for extent in walk.feed(command):
                yield extent

    # ------------------------------------------------------------------------------------------ running

    def _connected(self, call: str) -> Limits:
        if self._engine.phase is not _CONNECTED:
            self._legal(call)
        return self._engine.limits

    def _many(
        self, call: str, fresh: Generator[Command], pick: Callable[[Any], Item], depth: int, timeout: float | None
    ) -> Many[Item]:
        seconds = deadline_after(self._command_timeout if timeout is None else timeout).remaining()
        return Many(self._session(), fresh, pick, depth=batches.checked_depth(call, depth), seconds=seconds, held=self)

    async def _run(self, request: Request, timeout: float | None) -> None:
        """Run a request, in as many pieces as it takes."""
        timeout = self._command_timeout if timeout is None else timeout
        if isinstance(request, Pieces):
            await run_pieces(self._session(), request, deadline_after(timeout))
        elif not request.done:  # one for no bytes is done already
            await self._session().run(request, timeout)
