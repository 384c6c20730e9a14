"""Sizes in bytes as people write and read them: 512M, 1G. The units are the powers of 1024."""

from __future__ import annotations

import re

import click

from nbdcore.protocol.constants import MAX_SIZE

__all__ = ["exact", "parsed", "rounded"]

_UNITS = "KMGTPE"
# Digits, then perhaps a unit, as in 64k, 64K, 64KB and 64KiB. No size has more digits than 2^63.
_WRITTEN = re.compile(r"([0-9]{1,19})(?:([KMGTPE])(?:I?B)?|B)?", re.IGNORECASE)


def parsed(text: str) -> int:
    """Return the number of bytes that a size on the command line means. Raises click's BadParameter."""
    found = _WRITTEN.fullmatch(text)
    if not found:
        raise click.BadParameter(f"{text!r} is no size: write a whole number of bytes, or one with a unit, such as 512M or 1G")
    size = int(found[1]) << 10 * (_UNITS.index(found[2].upper()) + 1 if found[2] else 0)
    if size > MAX_SIZE:
        raise click.BadParameter(f"{text!r} is more than the largest disk has, 2^63 - 1 bytes")
    return size


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
    unit = 1024**power
    if size % unit and round(size / unit, 1) == 1024:  # what is nearly one of the next unit rounds to one
        power, unit = power + 1, unit * 1024
    amount = f"{size / unit:.1f}" if size % unit else str(size // unit)
    return amount + (_UNITS[power - 1] if power else "")
