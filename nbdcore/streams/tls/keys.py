"""Files of pre-shared keys, as GnuTLS' psktool writes them: a `user:hexkey` line for each user.

A user name with odd characters is written in hex behind a `#`. Other lines that begin with `#`, and empty ones, say nothing.
"""

from __future__ import annotations

import errno
import os

from nbdcore.errors import UsageError, printable
from nbdcore.streams.base import from_signal_handler

__all__ = ["read_keys"]

#: Bytes of a user name and of a key that OpenSSL can take (PSK_MAX_IDENTITY_LEN of 1.1.1, PSK_MAX_PSK_LEN).
_LONGEST_USER, _LONGEST_KEY = 128, 256


def read_keys(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the key of each user in the file; of several lines for a user the first counts.

    Raises UsageError for a file that cannot be read, and for a line that is wrong, with its number and without its text: the
    key is a secret.
    """
    shown = printable(os.fspath(path))
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 (any path-like)
            lines = file.read().splitlines()
    except OSError as exc:
        if from_signal_handler(exc):
            raise
        raise UsageError(exc.errno or 0, f"cannot read the file of pre-shared keys {shown}: {exc.strerror}") from exc
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        user, colon, digits = line.strip().rpartition(":")
        if not line.strip() or (line.startswith("#") and not _in_hex(user)):
            continue
        name = bytes.fromhex(user[1:]).decode("utf-8", "surrogateescape") if line.startswith("#") else user
        key = _key(digits)
        if not colon or not name or not key or len(key) > _LONGEST_KEY or len(os.fsencode(name)) > _LONGEST_USER:
            raise UsageError(
                errno.EINVAL,
                f"line {number} of {shown} is no pre-shared key: write USER:HEXKEY, of {_LONGEST_USER} and "
                f"{_LONGEST_KEY} bytes at most, as psktool does",
            )
        keys.setdefault(name, key)
    return keys


def _in_hex(user: str) -> bool:
    try:
        return bool(bytes.fromhex(user[1:]))
    except ValueError:
        return False


def _key(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return b""
