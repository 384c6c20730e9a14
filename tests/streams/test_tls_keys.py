"""Files of pre-shared keys: what is read from them, and which line is wrong."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import UsageError
from nbdcore.streams.tls.keys import read_keys
from tests.certificates import PSK_KEY, PSK_LINE, PSK_USER


@pytest.fixture
def keys_of(tmp_path):
    def read(text: str) -> dict[str, bytes]:
        path = tmp_path / "keys.psk"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return read_keys(path)

    return read


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", {}),
        (PSK_LINE, {PSK_USER: PSK_KEY}),
        ("alice:00ff", {"alice": b"\x00\xff"}),
        ("alice:00FF\r\nbob:11\r\n", {"alice": b"\x00\xff", "bob": b"\x11"}),
        ("alice:01\nalice:02\n", {"alice": b"\x01"}),
        ("\n  \n# a comment: with a colon\n#zz:11\nbob:22\n", {"bob": b"\x22"}),
        ("#616c696365:33\n", {"alice": b"\x33"}),
        ("a user:of:many parts:44\n", {"a user:of:many parts": b"\x44"}),
        ("zoë:55\n", {"zoë": b"\x55"}),
        (f"{'u' * 128}:{'00' * 256}", {"u" * 128: bytes(256)}),
    ],
)
def test_keys_by_user(keys_of, text, keys):
    assert keys_of(text) == keys


@pytest.mark.parametrize(
    "line",
    ["alice", "alice:", ":0011", "alice:0", "alice:xyz", "alice:00 1", f"{'u' * 129}:00", f"alice:{'00' * 257}", "#616c696365:"],
)
def test_wrong_line_is_named_by_its_number_and_not_shown(keys_of, line):
    with pytest.raises(UsageError, match=r"line 3 of .*keys\.psk is no pre-shared key") as caught:
        keys_of(f"bob:00\n\n{line}\n")
    assert line not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.psk") as caught:
        read_keys(tmp_path / "none.psk")
    assert caught.value.errno == errno.ENOENT
