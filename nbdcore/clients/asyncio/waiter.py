"""What a task of asyncio waits for until its command is done: a future with less to do. It knows no NBD.

asyncio lets a task wait for any object that looks like a future (`asyncio.isfuture`), and says how such a one behaves: it yields
itself, the task tells it whom to call, and is called when there is something to look at. A future of asyncio's own has the loop
make that call, later; that costs a third of a small read. Here whoever owns the waiter makes it, in a turn of the loop that is
its own already: so a dozen tasks that were answered together run at once, and what they ask next is sent together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol, TypeVar


class Tagged(Protocol):
    """Anything that a task waits for, with its waiter as the tag."""

    tag: Any


Item = TypeVar("Item", bound=Tagged)


class Waiter:
    """What one task waits for: the task's coroutine yields it once.

    It has no outcome but that the wait is over; what happened is to be read elsewhere.

    Args:
        loop: the task's.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_cancelled", "_context", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop  # looked at by tasks, as the next one
        self._asyncio_future_blocking = True
        self._callback: Callable[[Waiter], object] | None = None  # None until there is a task, and when it has been called

    def add_done_callback(self, callback: Callable[[Waiter], object], *, context: Context) -> None:
        """Take down whom to call, and in which context. Called by the task."""
        self._callback, self._context = callback, context
        self._cancelled: asyncio.CancelledError | None = None

    @staticmethod
    def wake_all(over: deque[Item]) -> None:
        """Let the tasks run, one after the other, whose waits are over: their waiters are the tags of these.

        Each is taken out when its turn comes; more may be put in meanwhile. Not to be called while a task runs. Raises what ends
        the program, with the rest still in there.
        """
        while over:
            waiter: Waiter = over.popleft().tag
            callback = waiter._callback
            if callback is not None:
                waiter._callback = None
                waiter._context.run(callback, waiter)

    def cancel(self, msg: Any = None) -> bool:
        """The task is cancelled: it runs in the loop's next turn. Returns False when it is about to run anyway."""
        callback = self._callback
        if callback is None:
            return False
        self._callback = None
        self._cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self._loop.call_soon(callback, self, context=self._context)
        return True

    def result(self) -> None:
        """Return when the wait is over, raise CancelledError when the task was cancelled. Called by the task."""
        cancelled = self._cancelled
        if cancelled is not None:
            self._cancelled = None  # its traceback leads to whatever the task holds
            raise cancelled
