"""What a fork does to what threads share, and who is told of it.

The child of a fork has one thread, and a copy of everything. A lock that another thread held stays taken there for ever, and what
that thread had begun nobody ends: to wait for either would be to hang. So whatever threads share is told in the child, before
anything else happens there, and ends its copy if another thread was using it. The connection goes on in the parent.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from nbdcore.errors import Disconnected

__all__ = ["in_use_when_forked", "is_taken", "when_forked"]

Told = TypeVar("Told")

_told: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def when_forked(shared: Told, tell: Callable[[Told], None]) -> None:
    """Have `tell(shared)` called in every child that a fork makes, as long as there is `shared`, which is not kept alive."""
    _told[shared] = tell


def is_taken(lock: threading.RLock) -> bool:
    """Tell whether another thread has a lock."""
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def in_use_when_forked() -> Disconnected:
    """Return the error of calls on a copy that its child cannot use."""
    return Disconnected(
        errno.ENOTCONN,
        "another thread was using the connection when this process was forked, and it is the parent's; connect again here",
    )


def _tell() -> None:
    for shared, tell in [*_told.items()]:
        tell(shared)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
