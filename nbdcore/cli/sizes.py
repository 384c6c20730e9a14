"""Sizes in bytes as people write and read them: 512M, 1G. The units are the powers of 1024."""

from __future__ import annotations

import re

import click

from nbdcore.protocol.constants import MAX_SIZE

__all__ = ["SIZE", "exact", "rounded"]

_UNITS = "KMGTPE"
# Digits, then perhaps a unit, as in 64k, 64K, 64KB and 64KiB. No size has more digits than 2^63.
_WRITTEN = re.compile(r"([0-9]{1,19})(?:([KMGTPE])(?:I?B)?|B)?", re.IGNORECASE)


class _Size(click.ParamType[int]):
    """A size on the command line."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        found = _WRITTEN.fullmatch(value)
        if not found:
            self.fail(f"{value!r} is no size: write a whole number of bytes, or one with a unit, such as 512M or 1G", param, ctx)
        size = int(found[1]) << 10 * (_UNITS.index(found[2].upper()) + 1 if found[2] else 0)
        if size > MAX_SIZE:
            self.fail(f"{value!r} is more than the largest disk has, 2^63 - 1 bytes", param, ctx)
        return size


SIZE = _Size()


def exact(size: int) -> str:
    """Return a size in the largest unit that divides it: 1M, 1536M, and 1000 for a thousand bytes."""
    unit = ""
    for larger in _UNITS:
        if not size or size % 1024:
            break
        size, unit = size // 1024, larger
    return f"{size}{unit}"


def rounded(size: int) -> str:
    """Return a size in the largest unit of which it has one, to a decimal where that loses something: 1M, 1.5G, 117.7M."""
    power = min((size.bit_length() - 1) // 10, len(_UNITS)) if size else 0
    amount = size / 1024**power
    unit = _UNITS[power - 1] if power else ""
    return f"{amount:.0f}{unit}" if amount == int(amount) else f"{amount:.1f}{unit}"
