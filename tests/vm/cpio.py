"""The "newc" cpio archive that Linux takes its initial root file system from: written here, so that no cpio program is needed.

Knows the format (kernel documentation, "initramfs buffer format"), nothing of what goes into it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = "070701"  # newc without checksums
_TRAILER = "TRAILER!!!"  # the entry that ends an archive


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder: its path without a leading slash, its type and permissions, and a file's content."""

    path: str
    mode: int
    content: bytes = b""

    @classmethod
    def file(cls, path: str, content: bytes, *, executable: bool = False) -> Entry:
        return cls(path, stat.S_IFREG | (0o755 if executable else 0o644), content)

    @classmethod
    def folder(cls, path: str) -> Entry:
        return cls(path, stat.S_IFDIR | 0o755)


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of `entries`, each folder before what is in it."""
    members = [*entries, Entry(_TRAILER, 0)]
    return b"".join(_member(inode, entry) for inode, entry in enumerate(members, start=1))


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    # inode, mode, uid, gid, links, modification time, file size, device major and minor, special file's major and minor,
    # name size with its NUL, checksum: eight hexadecimal digits each
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
    header = (_MAGIC + "".join(f"{field:08x}" for field in fields)).encode()
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
