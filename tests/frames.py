"""How many functions of Python's a call goes through: each costs, and nobody notices when one more is added."""

from __future__ import annotations

import sys
from collections.abc import Callable


def fewest_frames(call: Callable[[], object]) -> list[str]:
    """Return the functions that a call enters, itself left out: the fewest of several counts.

    The first calls do what is done once. Where an answer is not there at the first look, a few functions more are entered.
    """
    for _ in range(20):
        call()
    return min((_frames(call) for _ in range(20)), key=len)


def _frames(call: Callable[[], object]) -> list[str]:
    entered: list[str] = []

    def note(frame: object, event: str, _: object) -> None:
        if event == "call":
            entered.append(frame.f_code.co_name)  # type: ignore[attr-defined]

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]
