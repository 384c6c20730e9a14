from __future__ import annotations

import click
import pytest

from nbdcore.cli.sizes import exact, parsed, rounded


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("64k", 64 << 10),
        ("64K", 64 << 10),
        ("512M", 512 << 20),
        ("512MB", 512 << 20),
        ("1g", 1 << 30),
        ("1GiB", 1 << 30),
        ("3T", 3 << 40),
        ("7E", 7 << 60),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_size_is_read_in_powers_of_1024(text, size):
    assert parsed(text) == size


@pytest.mark.parametrize("text", ["", "G", "1.5G", "-1", "1X", "1 G", "1GG", "0x10", "1_000", "8E", "9" * 5000, "٣"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter):
        parsed(text)


@pytest.mark.parametrize(
    ("size", "short", "about"),
    [
        (0, "0", "0"),
        (1000, "1000", "1000"),
        (1023, "1023", "1023"),
        (1024, "1K", "1K"),
        (1025, "1025", "1.0K"),
        (1 << 20, "1M", "1M"),
        ((1 << 20) - 1, "1048575", "1.0M"),
        (1536 << 20, "1536M", "1.5G"),
        (123456789, "123456789", "117.7M"),
        (1 << 60, "1E", "1E"),
        ((1 << 63) - 1, "9223372036854775807", "8.0E"),
    ],
)
def test_size_is_written_as_its_readers_expect(size, short, about):
    assert (exact(size), rounded(size)) == (short, about)


@pytest.mark.parametrize("size", [0, 1, 4096, 10**9, 3 << 40, (1 << 63) - 1])
def test_exact_size_can_be_read_back(size):
    assert parsed(exact(size)) == size
