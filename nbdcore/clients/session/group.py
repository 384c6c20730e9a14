"""Several connections to one export, seen as one: which takes a command, which one has it, and which speaks for all.

A command goes to the connection with the fewest under way, and the end of one connection is the end of its own commands only. The
group is lost when the last connection is. It knows engines alone: who waits for their bytes is the front end's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from nbdcore.errors import Error, copied
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command

_OVER = (Phase.CLOSED, Phase.DEAD)
# One whose server shuts down comes last: it takes no more.
_PENDING = attrgetter("shutting_down", "pending")


class Group:
    """The engines of one or more connections to the same export.

    Args:
        engines: at least one.
    """

    __slots__ = ("engines",)

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines: Sequence[Engine] = engines

    @property
    def live(self) -> list[Engine]:
        """Those that have not ended."""
        return [engine for engine in self.engines if engine.phase not in _OVER]

    @property
    def speaker(self) -> Engine:
        """The one that speaks for all: one that has not ended, else one that this program ended, else any."""
        first = self.engines[0]
        if first.phase not in _OVER or len(self.engines) == 1:
            return first
        best = self.live or [engine for engine in self.engines if engine.ended_by_program]
        return best[0] if best else first

    @property
    def least(self) -> Engine:
        """The one with the fewest commands pending; where all have ended, any."""
        return min(self.live or self.engines, key=_PENDING)

    def owner(self, command: Command) -> Engine:
        """Return the one that knows a command; where it has finished, any."""
        if len(self.engines) > 1:
            for engine in self.engines:
                if engine.knows(command):
                    return engine
        return self.speaker

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that ended a connection, since others may be raising it as well."""
        return copied(error) if any(error is engine.error for engine in self.engines) else error
