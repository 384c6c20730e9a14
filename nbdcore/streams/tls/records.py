"""Records, the units of TLS (RFC 8446 section 5): where they end in what was received, and what goes into one that is sent.

It knows their sizes and their headers, and nothing of what is in them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

__all__ = ["RECORD", "end_of_records", "pieces"]

#: Most bytes of data in one record (RFC 8446 section 5.1).
RECORD = 16 << 10
#: Most bytes of one record after its header: TLS 1.2 allows 2 KiB more than there are data in it (RFC 5246 section 6.2.3).
_LONGEST = RECORD + 2048
#: Types of records, from change_cipher_spec to heartbeat, and the first byte of the version that every one names.
_TYPES, _VERSION = range(20, 25), 3
#: Type, version, 16 bits length (RFC 8446 section 5.1).
_HEADER = struct.Struct(">BBxH")
#: Parts up to this size are copied together into one record: that costs less than a record more.
_SMALL = 4 << 10


def end_of_records(received: memoryview, end: int) -> int:
    """Return where the last record ends that is there in whole. What is no TLS is for OpenSSL to refuse, and counts as whole."""
    header_at, at, last = _HEADER.unpack_from, 0, end - _HEADER.size
    while at <= last:
        kind, version, length = header_at(received, at)
        if kind not in _TYPES or version != _VERSION or length > _LONGEST:
            return end
        after = at + _HEADER.size + length
        if after > end:
            break
        at = after
    return at


def pieces(parts: Sequence[memoryview]) -> Iterator[memoryview | bytes]:
    """Cut `parts` into records: small neighbours joined, large parts as they are."""
    small: list[memoryview] = []
    size = 0
    for part in parts:
        if small and (len(part) > _SMALL or size + len(part) > RECORD):
            yield b"".join(small)
            small, size = [], 0
        if len(part) <= _SMALL:
            small.append(part)
            size += len(part)
        else:
            yield from (part[at : at + RECORD] for at in range(0, len(part), RECORD))
    if size:
        yield b"".join(small)
