"""What one client and the server have agreed on: the outcome of the handshake, and what the transmission phase goes by."""

from __future__ import annotations

from dataclasses import dataclass

from nbdcore.server.exports import ServedExport

__all__ = ["CONTEXT_ID", "Terms"]

#: What base:allocation is called once selected; any number will do.
CONTEXT_ID = 1


@dataclass(slots=True)
class Terms:
    """What a client has negotiated so far; complete once `export` is set.

    Attributes:
        structured: use structured replies.
        extended: use extended headers (implies structured).
        contexts_for: the export name that base:allocation was selected for, or None.
        export: what the client chose.
        allocation: whether base:allocation is active for the chosen export.
    """

    structured: bool = False
    extended: bool = False
    contexts_for: str | None = None
    export: ServedExport | None = None
    allocation: bool = False
