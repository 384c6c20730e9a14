"""What `nbdcore info` answers with an exit status, a number, a URI or a map; of our own server, and of ones that misbehave."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import types

import pytest

import nbdcore
from nbdcore.server import ExportSettings, MemoryDisk, Server
from tests.cli import scripted
from tests.cli.commands import invoke, run
from tests.cli.scripted import ACK, GO, INFO, INFORMATION

MEBIBYTE = 1 << 20


@pytest.fixture
def uri():
    """The URI of a server's folder of exports; there is one, "disk", which has data in its second 64 KiB."""
    disk = MemoryDisk(MEBIBYTE)
    disk.pwrite(memoryview(b"x" * 65536), 65536)
    server = Server({"disk": ExportSettings(disk, read_only=True)})
    listener = server.listen("tcp", host="127.0.0.1", port=0)
    server.start()
    yield server.uri(listener)
    server.stop()


def failed(done, *words):
    [line] = done.stderr.splitlines()
    assert line.startswith("nbdcore: ")
    assert all(word in line for word in words), line
    assert (done.stdout, done.exit_code) == ("", 1)


# Features


@pytest.mark.parametrize("option", ["--is", "--can", "--has", "--have"])
@pytest.mark.parametrize(("feature", "status"), [("read-only", 0), ("write", 2)])
def test_feature_is_an_exit_status(uri, option, feature, status):
    done = invoke("info", option, feature, f"{uri}disk")
    assert (done.output, done.exit_code) == ("", status)


@pytest.mark.parametrize("word", "cannot can-not cant hasnot has-not hasnt havent havenot have-not isnot is-not isnt".split())  # noqa: SIM905
def test_negation_swaps_true_and_false(uri, word):
    assert [invoke("info", f"--{word}", feature, f"{uri}disk").exit_code for feature in ("read-only", "write")] == [2, 0]


@pytest.mark.parametrize(
    ("feature", "status"),
    [
        ("extended-headers", 0),
        ("EH", 0),
        ("Extended Header", 0),
        ("block_status_payload", 0),
        ("open", 0),
        ("connect", 0),
        ("tls", 2),
    ],
)
def test_later_features_are_known_too(uri, feature, status):
    assert invoke("info", "--has", feature, f"{uri}disk").exit_code == status


@pytest.mark.parametrize("option", ["--can", "--cannot"])
def test_feature_of_a_disk_that_cannot_be_opened_is_an_error_but_the_connection_has_its_own(uri, option):
    failed(invoke("info", option, "trim", f"{uri}nothing"), "--list")
    failed(invoke("info", option, "open", f"{uri}nothing"), "--list")
    for feature in ("connect", "read", "structured-reply", "extended-headers"):
        assert invoke("info", option, feature, f"{uri}nothing").exit_code == (0 if option == "--can" else 2)


@pytest.mark.parametrize("option", ["--can", "--cannot"])
def test_error_is_no_answer_negated_or_not(uri, option, socket_path):
    failed(invoke("info", option, "trimming", f"{uri}disk"), "'trimming'", "did you mean 'trim'?")
    failed(invoke("info", option, "connect", f"nbd+unix:///?socket={socket_path}"))


def test_two_tests_at_once_are_wrong_usage():
    assert invoke("info", "--is", "tls", "--cannot", "trim", "nbd://localhost").exit_code == 1


# One word


def test_uri_is_printed_plain_and_as_json(uri):
    assert invoke("info", "--uri", f"{uri}disk").stdout == f"{uri}disk\n"
    assert json.loads(invoke("info", "--uri", "--json", f"{uri}disk").stdout) == f"{uri}disk"
    failed(invoke("info", "--uri", f"{uri}nothing"), "--list")


@pytest.mark.interop("nbdkit")
def test_server_of_the_commands_own_has_no_uri():
    failed(invoke("info", "--uri", "[", "nbdkit", "memory", "1M", "]"), "no URI")


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version_is_nbdcores(option):
    assert invoke("info", option).stdout == f"nbdcore {nbdcore.__version__}\n"


@pytest.mark.parametrize(
    "options",
    [("--size", "--uri"), ("--uri", "--list"), ("--map", "--can", "trim"), ("--offset", "1"), ("--length", "1"), ("--total",)],
)
def test_options_that_do_not_go_together_are_status_1(options):
    done = invoke("info", *options, "nbd://localhost")
    assert (done.stdout, done.exit_code) == ("", 1)
    assert "you " in done.stderr


_SIZE = """
import sys
from nbdcore.cli import main
sys.argv = ["nbdcore", "info", "--size", {!r}]
main()
print(*sorted({{"rich.console", "json", "multiprocessing", "numpy", "email.parser", "ssl", "asyncio"}} & sys.modules.keys()))
"""


def test_size_takes_no_time_for_what_it_does_not_need(uri):
    assert run(command=(sys.executable, "-c", _SIZE.format(f"{uri}disk"))).stdout == f"{MEBIBYTE}\n\n"


# The map


def test_map_takes_no_value_from_the_next_word(uri):
    shown = "         0       65536    3  hole,zero\n     65536       65536    0  data\n    131072      917504    3  hole,zero\n"
    for words in (("--map", f"{uri}disk"), ("--map", "--", f"{uri}disk"), (f"{uri}disk", "--map")):
        assert invoke("info", *words).stdout == shown


def test_map_of_a_range_has_totals_of_that(uri):
    done = invoke("info", "--map", "--totals", "--offset", "64K", "--length", "256K", f"{uri}disk")
    assert done.stdout == "     65536  25.0%   0 data\n    196608  75.0%   3 hole,zero\n"
    assert invoke("info", "--map", "--offset", "1M", f"{uri}disk").output == ""
    failed(invoke("info", "--map", "--offset", "2M", f"{uri}disk"), "behind the end")


def test_context_that_the_server_lacks_is_one_line_with_its_name(uri):
    failed(invoke("info", "--map=qemu:dirty-bitmap:b", f"{uri}disk"), '"qemu:dirty-bitmap:b"')
    failed(invoke("info", "--map", "--map=no:thing", f"{uri}disk"), '"no:thing"')
    failed(invoke("info", "--map", f"{uri}nothing"), "--list")


def test_pattern_of_contexts_is_filled_in(uri):
    assert invoke("info", "--map=base:*", f"{uri}disk").stdout == invoke("info", "--map", f"{uri}disk").stdout


def mapping(*replies):
    """Return the conversation of a server of 1 TiB that gives one of these replies to each question about its map."""
    answers = iter(replies)

    def answer(client, option, data):
        if option == 8:  # NBD_OPT_STRUCTURED_REPLY
            scripted.reply(client, option, ACK)
        elif option == 10:  # NBD_OPT_SET_META_CONTEXT
            scripted.reply(client, option, 4, struct.pack(">I", 1) + b"base:allocation")
            scripted.reply(client, option, ACK)
        elif option in (INFO, GO):
            scripted.reply(client, option, INFORMATION, scripted.size_and_flags(1 << 40))
            scripted.reply(client, option, ACK)
        else:
            scripted.reply(client, option, scripted.UNSUPPORTED)
        return option != GO or transmit(client)

    def transmit(client):
        while True:
            _, _, kind, cookie, _, _ = struct.unpack(">IHHQQI", scripted.receive(client, 28))
            if kind == 2:  # NBD_CMD_DISC
                return False
            chunk, payload = next(answers)
            client.sendall(struct.pack(">IHHQI", 0x668E33EF, 1, chunk, cookie, len(payload)) + payload)

    return scripted.negotiating(answer)


def status(*extents):
    return 5, struct.pack(">I", 1) + b"".join(struct.pack(">II", *extent) for extent in extents)


@pytest.mark.parametrize("bad", [(32769, struct.pack(">IH", 5, 0)), status(), status((0, 0)), (5, b"\0\0"), (3, b"")])
@pytest.mark.parametrize("options", [(), ("--json",), ("--totals",)], ids=" ".join)
def test_map_that_breaks_off_prints_nothing(bad, options):
    with scripted.listening(mapping(status((1 << 20, 0), (1 << 20, 3)), *[bad] * 100)) as uri:
        failed(invoke("info", "--map", *options, uri))


# What is on it


def test_content_is_asked_of_python_magic_where_that_is_installed(uri, monkeypatch):
    seen = []
    magic = types.SimpleNamespace(from_buffer=lambda data: seen.append(data) or "a disk\x1b[31m\n")
    monkeypatch.setitem(sys.modules, "magic", magic)
    assert "\texport-size: 1048576 (1M)\n\tcontent: a disk\n" in invoke("info", f"{uri}disk").stdout.replace("\\x1b[31m", "")
    assert seen == [bytes(8192)]
    assert "content" not in invoke("info", "--no-content", f"{uri}disk").stdout
    assert "content" not in invoke("info", "--list", uri).stdout
    assert "content" in invoke("info", "--list", "--content", uri).stdout


def test_without_anything_to_tell_it_content_is_left_out(uri, monkeypatch):
    monkeypatch.setitem(sys.modules, "magic", None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    done = invoke("info", f"{uri}disk")
    assert "content" not in done.output
    assert done.exit_code == 0


def test_first_bytes_are_read_in_blocks_that_the_server_allows(monkeypatch):
    monkeypatch.setitem(sys.modules, "magic", types.SimpleNamespace(from_buffer=lambda data: f"{len(data)} bytes"))
    server = Server(ExportSettings(MemoryDisk(MEBIBYTE), block_sizes=(65536, 65536, MEBIBYTE)))
    try:
        uri = server.uri(server.listen("tcp", host="127.0.0.1", port=0))
        server.start()
        assert "\tcontent: 8192 bytes\n" in invoke("info", uri).stdout
    finally:
        server.stop()
