"""`nbdcore info` beside nbdinfo 1.14 or later on the same servers, byte for byte, without what versions after 1.14 added."""

from __future__ import annotations

import os
import re

import pytest

from tests.cli.commands import invoke
from tests.interop import programs
from tests.interop.images import add_dirty_bitmap, pattern, qcow2_image
from tests.interop.servers import nbdkit, qemu_nbd

MEBIBYTE = 1 << 20

# Lines that came with 1.18, and what 1.20 put behind block sizes.
_ADDED = re.compile(r'^\t?"?(?:extended|can_block_status_payload)"?: .*\n', re.MULTILINE)
_HUMAN = re.compile(r"^(\tblock_size_\w+: \d+) \(\w+\)$", re.MULTILINE)


# Later versions ask for metadata contexts where structured replies were not agreed on, and nbdkit then answers. The specification
# forbids it (section "NBD_OPT_LIST_META_CONTEXT").
_ASKED_IN_VAIN = re.compile(
    r'(using simple packets|"structured": false)(.*?)\n\t"?contexts"?:(?: \[)?(?:\n\t\t[^\n]*)+(?:\n\t\],)?', re.DOTALL
)


def of_1_14(text):
    return _ASKED_IN_VAIN.sub(r"\1\2", _HUMAN.sub(r"\1", _ADDED.sub("", text)))


def check_alike(*arguments):
    """Assert that both programs print the same, and end with the same status."""
    theirs = programs.run("nbdinfo", *arguments, check=False)
    ours = invoke("info", *arguments)
    assert (of_1_14(ours.stdout), ours.exit_code) == (of_1_14(theirs.stdout), theirs.returncode), ours.stderr
    assert bool(ours.stderr) == (ours.exit_code == 1)


@pytest.fixture(scope="module")
def sparse():
    """nbdkit with data, holes and an end between sectors."""
    with nbdkit("data", "1*40000 @900000 3 @1000003 1", "size=10000001") as server:
        yield server.uri


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """qemu-nbd with a backing file and a dirty bitmap, read-only."""
    folder = tmp_path_factory.mktemp("layered")
    base = qcow2_image(folder / "base.qcow2", 4 * MEBIBYTE, {0: pattern(MEBIBYTE)})
    top = folder / "top.qcow2"
    programs.run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    add_dirty_bitmap(top, "b", [(MEBIBYTE // 2, MEBIBYTE)])
    with qemu_nbd(top, "--allocation-depth", format="qcow2", bitmap="b", read_only=True, export="disk") as server:
        yield server.uri


PRINTING = [
    *([], ["--json"], ["--no-content"], ["--list"], ["-L", "--json"], ["--list", "--content"], ["--size"], ["--size", "--json"]),
    *(["--map"], ["--map", "--json"], ["--map", "--totals"], ["--map", "--totals", "--json"], ["--map=no:thing", "--json"]),
]


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize("options", PRINTING, ids=" ".join)
def test_sparse_disk_is_printed_alike(sparse, options):
    check_alike(*options, sparse)


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
@pytest.mark.parametrize("options", [[], ["--json"], ["--list", "--json"]], ids=" ".join)
def test_layered_disk_is_printed_alike(layered, options):
    check_alike(*options, layered)


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"])
def test_layered_disk_is_mapped_alike(layered, context):
    for options in ((), ("--json",), ("--totals",), ("--totals", "--json")):
        check_alike(f"--map={context}", *options, layered)


FEATURES = [
    *(
        "connect",
        "read",
        "write",
        "read-only",
        "readonly",
        "read_only",
        "ROTATIONAL",
        "tls",
        "structured-reply",
        "sr",
        "Structured",
    ),
    *("structured-replies", "cache", "df", "fast-zero", "fastzero", "fast_zero", "flush", "fua", "multi-conn", "multiconn"),
    *("multi_conn", "trim", "zero", "nonsense"),
]


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize("word", FEATURES)
def test_feature_is_told_alike(sparse, word):
    check_alike("--can", word, sparse)


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize(
    "words", ["memory 0", "memory 1536M", "--no-sr memory 1M", "--newstyle memory 1000", "--oldstyle memory 1M"]
)
def test_server_of_each_kind_is_printed_alike(words):
    with nbdkit(*words.split()) as server:
        for options in ((), ("--json",), ("--map", "--json"), ("--map", "--totals", "--json"), ("--map", "--totals")):
            check_alike(*options, server.uri)


@pytest.mark.interop("nbdkit", "nbdinfo")
def test_names_and_descriptions_are_printed_alike():
    script = r"""list_exports=printf 'NAMES+DESCRIPTIONS\na"b\\c\nd\tü\nsnow ☃\n\n'"""
    with nbdkit("eval", script, "get_size=echo 512") as server:
        for options in (("--list",), ("--list", "--json")):
            check_alike(*options, server.uri)


@pytest.mark.interop("nbdkit", "nbdinfo")
def test_server_without_exports_is_printed_alike():
    with nbdkit("eval", "list_exports=echo NAMES", "get_size=echo 512") as server:
        for options in (("--list",), ("--list", "--json")):
            theirs = programs.run("nbdinfo", *options, server.uri)
            assert of_1_14(invoke("info", *options, server.uri).stdout) == of_1_14(theirs.stdout)


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize("dashes", [(), ("--",)])
def test_server_of_the_commands_own_is_printed_alike(dashes):
    for options in ((), ("--json",), ("--map",), ("--size",), ("--is", "tls")):
        check_alike(*options, *dashes, "[", "nbdkit", "memory", "1M", "]")


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize(
    "options",
    [
        ("--size", "--map"),
        ("--list", "--size"),
        ("--can", "trim", "--size"),
        ("--totals",),
        ("--content", "--no-content"),
        ("--nonsense",),
        ("again",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_1_alike(sparse, options):
    check_alike(*options, sparse)


@pytest.mark.interop("nbdkit", "nbdinfo")
def test_disk_that_cannot_tell_its_map_is_an_error_alike():
    with nbdkit("eval", "get_size=echo 65536", "can_extents=exit 0", "extents=echo EIO no >&2; exit 1") as server:
        check_alike("--map", server.uri)


@pytest.mark.interop("nbdkit", "nbdinfo")
def test_disk_that_cannot_be_read_has_no_content_alike():
    with nbdkit("eval", "get_size=echo 65536", "pread=echo EIO no >&2; exit 1") as server:
        check_alike(server.uri)
        check_alike("--json", server.uri)


@pytest.mark.interop("nbdkit", "nbdinfo")
def test_content_is_what_libmagic_calls_it(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"\x1f\x8b\x08\x00" + os.urandom(100_000))
    with nbdkit("file", image) as server:
        check_alike(server.uri)
        assert "\tcontent: gzip compressed data" in invoke("info", server.uri).stdout
