"""What clients tell the logger `nbdcore`.

How connections begin and end is INFO; the steps in between and which attempts failed is DEBUG. A program that has not imported
logging hears nothing of it. Then nothing is told, and logging is not imported either, which would take a twentieth of the time in
which a short command starts and connects.
"""

from __future__ import annotations

import sys

__all__ = ["debug", "info"]


def info(message: str, *values: object) -> None:
    """Tell how a connection began or ended."""
    if "logging" in sys.modules:
        import logging

        logging.getLogger("nbdcore").info(message, *values, stacklevel=2)


def debug(message: str, *values: object) -> None:
    """Tell of a step in between."""
    if "logging" in sys.modules:
        import logging

        logging.getLogger("nbdcore").debug(message, *values, stacklevel=2)
