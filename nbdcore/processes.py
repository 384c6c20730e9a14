"""What is asked of the system about processes, by all that start some."""

from __future__ import annotations

import os

__all__ = ["available_processors", "how_it_ended"]


def available_processors() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def how_it_ended(status: int | None) -> str:
    """Put a process's exit status into words, as behind its name: the number of a signal is negative."""
    return f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
