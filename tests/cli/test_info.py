from __future__ import annotations

import json
import struct

import pytest

from nbdcore.server import ExportSettings, MemoryDisk, Server, ServerTLS
from tests.certificates import CertificateAuthority
from tests.cli import scripted
from tests.cli.commands import invoke
from tests.cli.scripted import ACK, GO, INFO, INFORMATION, LIST, SERVER, UNKNOWN, UNSUPPORTED
from tests.interop import programs
from tests.interop.images import raw_image
from tests.interop.servers import nbd_server, nbdkit

MEBIBYTE = 1 << 20


@pytest.fixture
def serve():
    """Starts one server over TCP; gives its URI for the empty export name."""
    servers = []

    def start(exports, **options):
        server = Server(exports, **options)
        servers.append(server)
        listener = server.listen("tcp", host="127.0.0.1", port=0)
        server.start()
        return server.uri(listener)

    yield start
    for server in servers:
        server.stop()


def failed(done, *words):
    """Assert that a command said one line on standard error, and nothing else."""
    [line] = done.stderr.splitlines()
    assert line.startswith("nbdcore: ")
    assert all(word in line for word in words), line
    assert (done.stdout, done.exit_code) == ("", 1)


# Encrypted


@pytest.fixture
def pki(tmp_path):
    """A certificates folder for a server that is 127.0.0.1 to its clients."""
    authority = CertificateAuthority()
    return authority.write(tmp_path / "pki", server=authority.issue("server", "127.0.0.1"))


def test_encrypted_server_is_asked_with_the_folder_of_its_ca(serve, pki):
    uri = serve(MemoryDisk(MEBIBYTE), tls=ServerTLS(certificates=pki))
    assert invoke("info", uri, "--tls-certificates", pki, "--size").stdout == f"{MEBIBYTE}\n"
    assert invoke("info", f"{uri}?tls-certificates={pki}").stdout.startswith("protocol: newstyle-fixed with TLS, ")


def test_server_whose_ca_is_not_trusted_is_an_error_of_one_line(serve, pki):
    failed(invoke("info", serve(MemoryDisk(MEBIBYTE), tls=ServerTLS(certificates=pki))), "CA")


def test_server_with_a_certificate_for_another_name_is_refused(serve, pki):
    uri = serve(MemoryDisk(MEBIBYTE), tls=ServerTLS(certificates=pki))
    failed(invoke("info", uri, "--tls-certificates", pki, "--tls-hostname", "other.example"), "other.example")


# One export


def test_text_tells_what_is_known(serve):
    uri = serve({"disk": ExportSettings(MemoryDisk(3 * MEBIBYTE), description="of mine", block_sizes=(512, 4096, MEBIBYTE))})
    done = invoke("info", "--no-content", uri + "disk")
    assert done.output.splitlines() == [
        "protocol: newstyle-fixed without TLS, using extended packets",
        'export="disk":',
        "\tdescription: of mine",
        "\texport-size: 3145728 (3M)",
        f"\turi: {uri}disk",
        "\tcontexts:",
        "\t\tbase:allocation",
        "\tis_rotational: false",
        "\tis_read_only: false",
        "\tcan_block_status_payload: true",
        "\tcan_cache: true",
        "\tcan_df: true",
        "\tcan_fast_zero: true",
        "\tcan_flush: true",
        "\tcan_fua: true",
        "\tcan_multi_conn: true",
        "\tcan_trim: true",
        "\tcan_zero: true",
        "\tblock_size_minimum: 512",
        "\tblock_size_preferred: 4096 (4K)",
        "\tblock_size_maximum: 1048576 (1M)",
    ]
    assert (done.stderr, done.exit_code) == ("", 0)


def test_json_tells_the_same(serve):
    uri = serve({"disk": ExportSettings(MemoryDisk(1000), description="of mine")}, read_only=True)
    told = json.loads(invoke("info", uri + "disk", "--json").output)
    [export] = told.pop("exports")
    assert told == {"protocol": "newstyle-fixed", "TLS": False, "structured": True, "extended": True}
    assert (
        export.items()
        >= {
            "export-name": "disk",
            "description": "of mine",
            "uri": uri + "disk",
            "contexts": ["base:allocation"],
            "is_read_only": True,
            "can_trim": False,
            "block_size_preferred": 4096,
            "export-size": 1000,
            "export-size-str": "1000",
        }.items()
    )


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_size_is_a_number_and_a_newline(serve, more):
    assert invoke("info", serve(MemoryDisk(123456789)), "--size", *more).output == "123456789\n"


def test_unknown_export_is_one_line_that_says_what_to_try(serve):
    failed(invoke("info", serve({"a": MemoryDisk(1), "b": MemoryDisk(1)}) + "c"), "'c'", "--list")


def test_missing_default_export_is_a_sentence_that_says_what_to_try(serve):
    done = invoke("info", serve({"a": MemoryDisk(1), "b": MemoryDisk(1)}))
    failed(done, "--list")
    assert done.stderr.startswith("nbdcore: opening the default export failed: the server has no such export")


def test_control_characters_of_a_server_do_not_reach_the_terminal(serve):
    name, description = 'a"b\\c\x1b[31m\n', "red\x1b[31m\x07\u202e"
    uri = serve({name: ExportSettings(MemoryDisk(1), description=description)})
    done = invoke("info", uri)
    _, head, text, *_ = done.output.splitlines()
    assert head == 'export="a\\"b\\\\c\\u001b[31m\\u000a":'
    assert text == "\tdescription: red\\x1b[31m\\x07\\xe2\\x80\\xae"
    [export] = json.loads(invoke("info", "--list", "--json", uri).output)["exports"]
    assert (export["export-name"], export["description"]) == (name, description)


def test_name_that_is_no_utf8_is_legal_json_and_goes_round(serve):
    name = b"\xff\xe9".decode("utf-8", "surrogateescape")
    uri = serve({name: MemoryDisk(1)})
    done = invoke("info", "--list", "--json", uri)
    assert done.output.isascii()
    [export] = json.loads(done.output)["exports"]
    assert (export["export-name"], export["uri"]) == (name, f"{uri}%FF%E9")
    assert invoke("info", export["uri"], "--size").output == "1\n"


# Other servers


def answers(*, info=True, exports=(), size=MEBIBYTE, contexts=()):
    """Return how a scripted server answers: to INFO too, or to GO only."""

    def answer(client, option, data):
        if option == LIST:
            for name in exports:
                scripted.reply(client, LIST, SERVER, scripted.counted(name))
            scripted.reply(client, LIST, ACK)
            return True
        if option not in (INFO, GO):
            scripted.reply(client, option, UNSUPPORTED)
            return True
        name = data[4 : 4 + int.from_bytes(data[:4])]
        if name == b"hang-up":
            return False
        if name == b"silence":
            return bool(client.recv(1))
        if name == b"unknown" or (option == INFO and not info):
            scripted.reply(client, option, UNKNOWN if name == b"unknown" else UNSUPPORTED)
            return True
        scripted.reply(client, option, INFORMATION, scripted.size_and_flags(size))
        scripted.reply(client, option, ACK)
        if option == GO:
            scripted.receive(client, 28)  # NBD_CMD_DISC
        return option == INFO

    return scripted.negotiating(answer)


def test_server_without_info_is_asked_by_opening_the_export():
    with scripted.listening(answers(info=False)) as uri:
        done = invoke("info", uri)
    assert done.output.startswith("protocol: newstyle-fixed without TLS, using simple packets\n")
    assert "export-size: 1048576 (1M)" in done.output
    assert "contexts" not in done.output
    assert "block_size" not in done.output
    assert done.exit_code == 0


@pytest.mark.parametrize("arguments", [("--size",), ("--json", "--list")])
def test_size_that_only_opening_tells_is_asked_for_by_opening(arguments):
    def answer(client, option, data):
        if option in (INFO, GO):
            scripted.reply(client, option, INFORMATION, scripted.size_and_flags(MEBIBYTE if option == GO else 0))
            scripted.reply(client, option, ACK)
        elif option == LIST:
            scripted.reply(client, option, SERVER, scripted.counted(b"disk"))
            scripted.reply(client, option, ACK)
        else:
            scripted.reply(client, option, UNSUPPORTED)
        return option != GO

    with scripted.listening(scripted.negotiating(answer)) as uri:
        done = invoke("info", *arguments, uri)
    assert done.exit_code == 0, done.stderr
    if "--size" in arguments:
        assert done.stdout == f"{MEBIBYTE}\n"
    else:
        assert [export["export-size"] for export in json.loads(done.stdout)["exports"]] == [MEBIBYTE]


def test_export_of_no_bytes_is_described(serve):
    assert invoke("info", serve(MemoryDisk(0)), "--size").stdout == "0\n"


@pytest.mark.interop("nbd-server")
def test_size_is_the_true_one_of_the_reference_server(tmp_path):
    image = raw_image(tmp_path / "disk.raw", MEBIBYTE)
    with nbd_server({"disk": image}, tcp=True) as server:
        assert invoke("info", server.uri, "--size").stdout == f"{MEBIBYTE}\n"


def test_oldstyle_server_is_described_and_listed():
    def converse(client):
        client.sendall(scripted.OLDSTYLE)
        scripted.receive(client, 28)

    for arguments in ((), ("--list",)):
        with scripted.listening(converse) as uri:
            done = invoke("info", uri, *arguments)
        assert done.output.startswith("protocol: oldstyle without TLS, using simple packets\n")
        assert "export-size: 1048576 (1M)" in done.output


def test_size_beyond_what_can_be_addressed_is_unavailable():
    with scripted.listening(answers(size=(1 << 64) - 1)) as uri:
        assert "\texport-size: unavailable\n" in invoke("info", uri).output
        [export] = json.loads(invoke("info", uri, "--json").output)["exports"]
        assert "export-size" not in export
        assert export["export-size-str"] == "unavailable"
        failed(invoke("info", uri, "--size"), "more bytes than can be addressed")


def test_server_that_says_nothing_is_given_up_after_the_timeout():
    with scripted.listening(lambda client: client.recv(1), clients=1) as uri:
        failed(invoke("info", uri, "--timeout", "0.2"), "in time")


def test_server_that_falls_silent_in_the_middle_is_given_up_too():
    with scripted.listening(scripted.negotiating(lambda client, *_: bool(client.recv(1))), clients=1) as uri:
        failed(invoke("info", uri, "--timeout", "0.2"), "in time")


def test_server_that_hangs_up_is_one_line():
    with scripted.listening(lambda client: None) as uri:  # noqa: ARG005
        failed(invoke("info", uri), "closed the connection")


def test_what_is_no_nbd_server_is_one_line():
    with scripted.listening(lambda client: client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as uri:
        failed(invoke("info", uri), "no NBD server")


def test_nobody_there_is_one_line(socket_path):
    failed(invoke("info", f"nbd+unix:///?socket={socket_path}"), str(socket_path), "is the server running?")


@pytest.mark.parametrize(
    "uri", ["localhost", "/run/socket", "nbd:localhost", "nbd+nothing://x", "nbds://localhost", "nbd://a/%zz"]
)
def test_uri_that_cannot_be_used_is_one_line(uri):
    failed(invoke("info", uri))


@pytest.mark.parametrize("seconds", ["0", "-1", "x"])
def test_timeout_that_is_none_is_wrong_usage(seconds):
    assert invoke("info", "nbd://localhost", "--timeout", seconds).exit_code == 1


def test_timeout_that_is_not_a_number_is_refused(serve):
    failed(invoke("info", serve(MemoryDisk(1)), "--timeout", "nan"), "timeout")


def test_timeout_may_be_endless(serve):
    assert invoke("info", serve(MemoryDisk(1)), "--timeout", "inf", "--size").output == "1\n"


# All exports


def names(done):
    return [line for line in done.stdout.splitlines() if line.startswith("export=")]


def test_list_describes_every_export_whatever_the_uri_names(serve):
    uri = serve({"a": MemoryDisk(1), "b": ExportSettings(MemoryDisk(MEBIBYTE), description="second")})
    done = invoke("info", "--list", uri + "nonsense")
    assert names(done) == ['export="a":', 'export="b":']
    assert "\tdescription: second\n\texport-size: 1048576 (1M)\n" in done.output
    assert done.output.count("protocol:") == 1
    assert done.exit_code == 0


@pytest.mark.parametrize("bad", [b"unknown", b"hang-up", b"silence", b"nul\0"])
def test_export_that_fails_does_not_hide_the_others(bad):
    with scripted.listening(answers(exports=[b"a", bad, b"b"])) as uri:
        text = invoke("info", "--list", "--timeout", "2" if bad == b"silence" else "30", uri)
        told = invoke("info", "--list", "--timeout", "2" if bad == b"silence" else "30", "--json", uri)
    assert names(text) == ['export="a":', 'export="b":']
    [line] = text.stderr.splitlines()
    assert repr(bad.decode()) in line
    assert [export["export-name"] for export in json.loads(told.stdout)["exports"]] == ["a", "b"]
    assert (text.exit_code, told.exit_code) == (1, 1)


def test_server_without_info_is_listed_over_one_connection_for_each_export():
    with scripted.listening(answers(info=False, exports=[b"a", b"b", b"c"])) as uri:
        done = invoke("info", "--list", uri)
    assert names(done) == ['export="a":', 'export="b":', 'export="c":']
    assert (done.stderr, done.exit_code) == ("", 0)


def test_server_that_is_gone_in_the_middle_of_a_list_ends_it():
    with scripted.listening(answers(exports=[b"a", b"hang-up", b"b"]), clients=1) as uri:
        done = invoke("info", "--list", uri)
    assert names(done) == ['export="a":']
    lost, gone = done.stderr.splitlines()
    assert "'hang-up'" in lost
    assert "cannot connect" in gone
    assert done.exit_code == 1


def test_server_without_exports_is_no_error():
    with scripted.listening(answers()) as uri:
        done = invoke("info", "--list", uri)
        told = invoke("info", "--list", "--json", uri)
    assert (done.stdout.count("\n"), done.stderr) == (1, "nbdcore: the server lists no exports\n")
    assert json.loads(told.output)["exports"] == []
    assert (done.exit_code, told.exit_code) == (0, 0)


def test_list_without_end_is_given_up():
    def endless(client, option, data):
        if option != LIST:
            scripted.reply(client, option, UNSUPPORTED)
            return True
        one = struct.pack(">QIII", 0x3E889045565A9, LIST, SERVER, 8) + scripted.counted(b"disk")
        while True:
            client.sendall(one * 1000)

    with scripted.listening(scripted.negotiating(endless)) as uri:
        failed(invoke("info", "--list", uri), "does not end")


def test_size_of_a_list_is_wrong_usage():
    assert invoke("info", "--size", "--list", "nbd://localhost").exit_code == 1


# Beside nbdinfo


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize("arguments", [("memory", "1M"), ("--newstyle", "memory", "1000"), ("--oldstyle", "memory", "1536M")])
def test_json_is_that_of_nbdinfo_where_that_has_the_key(arguments):
    with nbdkit(*arguments) as server:
        theirs = json.loads(programs.run("nbdinfo", "--json", "--no-content", server.uri).stdout)
        ours = json.loads(invoke("info", "--json", server.uri).output)
    [their_export], [our_export] = theirs.pop("exports"), ours.pop("exports")
    assert ours.items() >= theirs.items()
    assert {key: our_export[key] for key in their_export} == their_export
    assert [key for key in our_export if key in their_export] == list(their_export)
