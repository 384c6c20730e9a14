"""The contracts, as checks that anyone can run: against a stream, a listener or a transport of one's own.

They need no test framework: each check returns when all is well, and raises ContractBroken, an AssertionError that names the
clause, when not. Every wait in them has a deadline.
"""

from __future__ import annotations

__all__ = ["ContractBroken", "require"]


class ContractBroken(AssertionError):
    """What was checked does not do what its contract says."""


def require(kept: object, clause: str) -> None:
    """Raise ContractBroken with the clause unless it was kept. Unlike an assert statement it also works under `python -O`."""
    if not kept:
        raise ContractBroken(clause)
