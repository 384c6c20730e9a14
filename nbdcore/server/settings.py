"""What the user says of exports: a back end each, how it is presented, and the rules that this must keep."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, TypeAlias

from nbdcore.errors import UsageError
from nbdcore.protocol.constants import DEFAULT_MAXIMUM, MAX_PAYLOAD, MAX_SIZE
from nbdcore.protocol.wire import encode_string
from nbdcore.server.backend import Backend

__all__ = [
    "BlockSizes",
    "ExportSettings",
    "Exported",
    "check_shareable",
    "checked_block_sizes",
    "checked_size",
    "checked_string",
    "named_settings",
]


class BlockSizes(NamedTuple):
    """Block size constraints in bytes (section "Block size constraints"); the default accepts every request up to 32 MiB."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = DEFAULT_MAXIMUM


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """A back end, and how it is presented to clients.

    Attributes:
        backend: what is exported.
        description: a line for humans, shown in lists.
        read_only: refuse to change it, whatever the back end can do.
        block_sizes: what requests must fit. With a minimum other than 1 clients that do not ask for block sizes are refused.
        multi_conn: whether a flush on one connection covers the writes of all: true of any back end that is one object.
        rotational: whether clients should schedule as for a spinning disk.
        require_tls: let only clients with TLS open it, or know that it exists; where the server allows others at all.
    """

    backend: Backend
    _: KW_ONLY
    description: str = ""
    read_only: bool = False
    block_sizes: BlockSizes | tuple[int, int, int] = field(default_factory=BlockSizes)
    multi_conn: bool = True
    rotational: bool = False
    require_tls: bool = False


#: What a server can be given: one export, or several by name.
Exported: TypeAlias = Backend | ExportSettings | Mapping[str, Backend | ExportSettings]


def named_settings(given: Exported) -> dict[str, ExportSettings]:
    """Return the settings of the exports that a server was given by name: one is called "". Raises UsageError for none."""
    named = given if isinstance(given, Mapping) else {"": given}
    if not named:
        raise UsageError(errno.EINVAL, "a server needs at least one export")
    return {name: one if isinstance(one, ExportSettings) else ExportSettings(one) for name, one in named.items()}


def check_shareable(workers: int, settings: Mapping[str, ExportSettings]) -> None:
    """Raise UsageError for a number of processes that cannot be, and for a back end that only one process can have."""
    if workers < 1:
        raise UsageError(errno.EINVAL, f"workers is {workers}: it must be at least 1")
    for name, one in settings.items():
        if not getattr(one.backend, "shareable", False):
            what = type(one.backend).__name__
            message = f"export {name!r} is a {what}, which only one process can have: use workers=1, FileDisk or SharedMemoryDisk"
            raise UsageError(errno.ENOTSUP, message)


# ---------------------------------------------------------------------------------------------- checks of what the user says


def checked_string(what: str, text: str) -> str:
    """Return a text that can be sent. Raises UsageError."""
    try:
        encode_string(text)
    except ValueError as problem:
        raise UsageError(errno.EINVAL, f"the {what} of an export cannot be sent: {problem}") from problem
    return text


def checked_size(name: str, size: object) -> int:
    """Return a size that a disk can have. Raises UsageError."""
    if not isinstance(size, int) or not 0 <= size <= MAX_SIZE:
        raise UsageError(errno.EINVAL, f"export {name!r}: the back end's size is {size!r}, not a number from 0 to {MAX_SIZE}")
    return size


def checked_block_sizes(name: str, sizes: BlockSizes, size: int) -> BlockSizes:
    """Hold the user to the rules of section "Block size constraints", and to what a server's memory allows."""
    minimum, preferred, maximum = sizes
    rules = {
        "the minimum must be a power of two from 1 to 65536": _power_of_two(minimum) and minimum <= 1 << 16,
        "the preferred size must be a power of two, no less than 512 and the minimum": _power_of_two(preferred)
        and preferred >= max(minimum, 512),
        "the maximum must be a multiple of the minimum": minimum > 0 and maximum % minimum == 0,
        "the maximum must be no less than the preferred size or the export's": maximum >= min(preferred, size),
        f"the maximum must be from 1 to {MAX_PAYLOAD}": 1 <= maximum <= MAX_PAYLOAD,
        f"the size of the export, {size}, must be a multiple of the minimum": minimum > 0 and size % minimum == 0,
    }
    for rule, kept in rules.items():
        if not kept:
            raise UsageError(errno.EINVAL, f"export {name!r}: block sizes {tuple(sizes)}: {rule}")
    return sizes


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
