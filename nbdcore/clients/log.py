"""What clients tell the logger `nbdcore`.

How connections begin and end is INFO; the steps in between and which attempts failed is DEBUG. A program that has not imported
logging hears nothing of it. Then nothing is told, and logging is not imported either, which would take a twentieth of the time in
which a short command starts and connects.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

__all__ = ["debug", "info"]

# Asked for once: `logging.getLogger` takes a lock that all threads share, and an exception that a signal handler raises in there
# would leave it taken. Here already, where the program has imported logging before: then no handler can come in between.
_logger: logging.Logger | None = None


def info(message: str, *values: object) -> None:
    """Tell how a connection began or ended."""
    if (logger := _logger or _found()) is not None:
        logger.info(message, *values, stacklevel=2)


def debug(message: str, *values: object) -> None:
    """Tell of a step in between."""
    if (logger := _logger or _found()) is not None:
        logger.debug(message, *values, stacklevel=2)


def _found() -> logging.Logger | None:
    """Return the logger, where the program has imported logging."""
    global _logger  # noqa: PLW0603 (the one that there is)
    if "logging" in sys.modules:
        import logging

        _logger = logging.getLogger("nbdcore")
    return _logger


_found()
