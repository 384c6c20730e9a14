"""NBD_CMD_READ: how the data of a range reach the client, with no more memory than there is for it.

Where replies have chunks, a large read leaves in pieces, and holes as holes. Where all data must be in one piece (simple replies,
and NBD_CMD_FLAG_DF), they are read at once if the server's memory budget allows that. If not, the reply is begun, and its data
are read and sent piece after piece.
"""

from __future__ import annotations

from collections.abc import Iterator

from nbdcore.protocol.constants import AllocationFlag, CommandFlag
from nbdcore.server.backend import Refusal
from nbdcore.server.budget import PIECE, MemoryBudget
from nbdcore.server.channel import QUEUE, Channel, ConnectionOver
from nbdcore.server.exports import ServedExport
from nbdcore.server.replies import ChunkedReplies, Replies

__all__ = ["Reader"]

# Reads from this size on are looked up for holes first: below, the looking up costs more than sending zeroes.
_WORTH_HOLES = 64 << 10
# The shortest hole worth a chunk of its own, since each chunk costs both sides about a small read's work.
_SHORTEST_HOLE = 4 << 10
# Data up to this size need nothing of the budget: they are in the channel's queue, or leave as soon as they would be.
_FREE = QUEUE
# Chunks begin and end at multiples of this, where the request itself does not say otherwise.
_SECTOR = 512
# What completes a reply whose data cannot be read any more.
_PADDING = bytes(64 << 10)

_DF = int(CommandFlag.DF)


class Reader:
    """Answers one client's reads."""

    def __init__(self, channel: Channel, export: ServedExport, replies: Replies, budget: MemoryBudget) -> None:
        self._channel = channel
        self._export = export
        self._replies = replies
        self._chunked = replies if isinstance(replies, ChunkedReplies) else None
        self._budget = budget

    def read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """Answer a read of a range that was checked. Raises Refusal where it fails and the client is still to hear of it."""
        chunked = self._chunked
        if length == 0:  # unspecified, but no reason to disconnect; a content chunk may not be empty
            self._replies.success(cookie, offset)
        elif length < _WORTH_HOLES:
            self._replies.whole(cookie, offset, self._export.read(length, offset))
        elif chunked is None or flags & _DF:
            self._unfragmented(cookie, offset, length)
        else:
            self._fragmented(chunked, cookie, offset, length)

    # ------------------------------------------------------------------------------------------ in one piece

    def _unfragmented(self, cookie: int, offset: int, length: int) -> None:
        with self._budget.share(length, _FREE) as count:
            if count == length:
                self._replies.whole(cookie, offset, self._export.read(length, offset))
                return
        self._one_after_the_other(cookie, offset, length)

    def _one_after_the_other(self, cookie: int, offset: int, length: int) -> None:
        """Send one reply, whose data are never in memory all at once."""
        done = 0
        try:
            while done < length:
                done += self._piece(cookie, offset, length, done)
        except Refusal as refusal:
            if not done:
                raise
            if self._chunked is None:
                raise ConnectionOver(f"a read failed inside its reply: {refusal.text}") from refusal
            self._pad(length - done)
            refusal.at = offset + done
            raise
        self._replies.end(cookie, offset)

    def _piece(self, cookie: int, offset: int, length: int, done: int) -> int:
        """Read and send the next piece, the first one behind the reply's head. Returns its size."""
        with self._budget.share(min(PIECE, length - done), _FREE) as count:
            data = self._export.read(count, offset + done)
            if not done:
                self._replies.begin(cookie, offset, length)
            self._channel.queue(data)
            return count

    def _pad(self, count: int) -> None:
        while count > 0:
            self._channel.queue(_PADDING[:count])
            count -= len(_PADDING)

    # ------------------------------------------------------------------------------------------ in chunks

    def _fragmented(self, chunked: ChunkedReplies, cookie: int, offset: int, length: int) -> None:
        end = offset + length
        for at, count, hole in self._layout(offset, length):
            if hole:
                chunked.hole(cookie, offset, at, count, last=at + count == end)
                continue
            done = 0
            while done < count:
                done += self._chunk(chunked, cookie, offset, at + done, at + count, end)

    def _chunk(self, chunked: ChunkedReplies, cookie: int, offset: int, at: int, stop: int, end: int) -> int:
        """Send one chunk of the data from `at` on, at most to `stop`. Returns its size."""
        over = at % _SECTOR
        with self._budget.share(min(PIECE - over, stop - at), _FREE - over) as count:
            try:
                data = self._export.read(count, at)
            except Refusal as refusal:
                refusal.at = at
                raise
            chunked.data(cookie, offset, at, data, last=at + count == end)
            return count

    def _layout(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, whether a hole) of the parts of a range, consecutive."""
        end = offset + length
        start = offset  # of data not yet yielded
        if self._export.knows_holes:
            for count, state in self._holes(offset, length):
                if state & AllocationFlag.ZERO and count >= _SHORTEST_HOLE:
                    if start < offset:
                        yield start, offset - start, False
                    yield offset, count, True
                    start = offset + count
                offset += count
        if start < end:
            yield start, end - start, False

    def _holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        try:
            return self._export.extents(length, offset)
        except Refusal:  # not knowing the holes is no reason not to read; the export has logged what there is to log
            return []
