"""What test_pages.py has the guest do; apart from it, since the guest imports slowly."""

from __future__ import annotations

import contextlib
import io


def run(source: str) -> str:
    """Run a program as printed, and return what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, "a page", "exec"), {"__name__": "__main__"})
    return output.getvalue()
