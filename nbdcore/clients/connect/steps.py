"""What a generator that connects may ask of whoever drives it: to wait, or to make a call that blocks. It does neither itself.

So connecting is written once, for threads and event loops alike. A driver answers each request by sending its outcome into the
generator, or by throwing what went wrong, such as a KeyboardInterrupt while it waited; it closes the generator when it gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from nbdcore.streams.base import AnyOf

__all__ = ["AnyOf", "Blocking", "Steps", "WaitingSteps"]

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Blocking:
    """A call that may take a while: its result is the answer. A thread makes it at once, an event loop leaves it to a thread."""

    call: Callable[[], Any]


#: A generator in steps: each yields a request, and is sent the answer.
Steps = Generator[AnyOf | Blocking, Any, Result]
#: One that only waits.
WaitingSteps = Generator[AnyOf, Any, Result]
