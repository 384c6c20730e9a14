from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import nbdcore
from nbdcore.streams.tls.credentials import supports_tls_psk
from tests.certificates import PSK_LINE, PSK_USER, CertificateAuthority
from tests.cli.commands import COMMAND, DEADLINE, invoke, run, serving
from tests.cli.test_command import STRANGERS
from tests.interop.programs import DIES_WITH_US
from tests.interop.programs import run as run_program

MEBIBYTE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """An image of 1 MiB."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MEBIBYTE))
    return path


def connect(uri):
    return nbdcore.connect(uri, timeout=DEADLINE)


def size_at(uri):
    with connect(uri) as client:
        return client.size


def port_of(uri):
    return nbdcore.parse_uri(uri).port


# What it serves


def test_memory_is_served_and_the_first_lines_say_where():
    with serving("--memory", "64M", "--tcp", "0") as server:
        with connect(server.uri) as client:
            client.pwrite(b"data", offset=4096)
            assert (client.pread(4, offset=4096), client.size) == (b"data", 64 * MEBIBYTE)
        assert server.said == [
            "Serving 64M of memory, gone when the server stops.",
            f"tcp: {server.uri}",
            f"Ready, until Ctrl-C. To look at it: nbdcore info {server.uri}",
        ]
        assert server.uri.startswith("nbd://127.0.0.1:")
        assert server.stop() == (0, "", "")


def test_file_is_served_and_keeps_what_was_written(disk):
    with serving(disk, "--tcp", "0") as server:
        with connect(server.uri) as client:
            client.pwrite(b"data", offset=512, fua=True)
        assert server.said[0] == f"Serving {disk}, 1M."
        assert server.stop() == (0, "", "")
    assert disk.read_bytes() == bytes(512) + b"data" + bytes(MEBIBYTE - 516)


def test_export_has_the_name_and_description_given(disk):
    with serving(disk, "--tcp", "0", "--export", "my disk", "--description", "of mine") as server:
        assert server.uri.endswith("/my%20disk")
        for uri in (server.uri, server.uri.removesuffix("my%20disk")):
            with connect(uri) as client:
                assert (client.size, client.description) == (MEBIBYTE, "of mine")
        with pytest.raises(nbdcore.NegotiationError):
            connect(server.uri + "s")


def test_read_only_lets_nobody_write(disk):
    with serving(disk, "--tcp", "0", "--read-only") as server:
        assert server.said[0] == f"Serving {disk}, 1M, read-only."
        with connect(server.uri) as client:
            assert client.read_only
            assert client.pread(4, 0) == bytes(4)


def test_client_beyond_the_most_is_turned_away():
    with serving("--memory", "1M", "--tcp", "0", "--max-clients", "1") as server:
        with connect(server.uri), pytest.raises(nbdcore.Error):
            connect(server.uri)
        assert server.stop()[2].count("\n") == 1


# Where it listens


def test_it_listens_at_several_places_at_once(socket_path):
    with serving(
        "--memory", "1M", "--tcp", "0", "--tcp", "localhost:0", "--unix", socket_path, "--listen", "nbd://127.0.0.1:0"
    ) as server:
        assert [line.split(":")[0] for line in server.said[1:-1]] == ["tcp", "tcp", "unix", "nbd"]
        assert [size_at(uri) for uri in server.uris] == [MEBIBYTE] * 4
        assert server.stop()[0] == 0
    assert not socket_path.exists()


def test_relative_socket_path_has_a_uri_that_leads_there_from_everywhere(short_folder):
    words = ("-c", f"import os, sys; os.chdir({str(short_folder)!r}); from nbdcore.cli import main; sys.exit(main())", "serve")
    with serving("--memory", "1M", "--unix", "my disk", command=(sys.executable,), words=words) as server:
        assert server.uri == f"nbd+unix:///?socket={short_folder}/my%20disk"
        assert server.said[-1].endswith(f"nbdcore info '{server.uri}'")
        assert size_at(server.uri) == MEBIBYTE


def test_third_partys_transport_is_listened_on_by_its_uri():
    with serving(
        "--memory", "1M", "--listen", "nbd+honest://127.0.0.1:0", command=STRANGERS, words=("honest", "serve")
    ) as server:
        assert server.uri.startswith("nbd+honest://127.0.0.1:")
        assert size_at(server.uri.replace("nbd+honest", "nbd")) == MEBIBYTE


def test_listening_beyond_this_machine_comes_with_a_warning_and_a_uri_that_works_here():
    with serving("--memory", "1M", "--tcp", "0.0.0.0:0") as server:
        assert server.uri.startswith("nbd://127.0.0.1:")
        assert "this machine's name or address in place of 127.0.0.1" in server.said[1]
        assert size_at(server.uri) == MEBIBYTE
        status, _, errors = server.stop()
    assert errors == f"nbdcore: warning: whoever can reach TCP 0.0.0.0 port {port_of(server.uri)} can read and write this disk\n"
    assert status == 0


def test_without_a_place_it_is_the_loopback_address_and_nbds_port():
    with closing(socket.socket()) as occupied:
        occupied.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            occupied.bind(("127.0.0.1", nbdcore.DEFAULT_PORT))
            occupied.listen()
        except OSError:
            pass  # somebody else's server is as good
        assert "cannot listen on TCP 127.0.0.1 port 10809" in invoke("serve", "--memory", "1M").stderr


# What is wrong


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("disk.img", "--memory", "1M"),
        ("--memory", "much"),
        ("--memory", "1M", "--tcp", "localhost"),
        ("--memory", "1M", "--tcp", "::1:10809"),
        ("--memory", "1M", "--tcp", ":10809"),
        ("--memory", "1M", "--tcp", "9" * 5000),
        ("--memory", "1M", "--vsock", "host:10809"),
        ("--memory", "1M", "--vsock", ":10809"),
        ("--memory", "1M", "--vsock", "-1"),
        ("--memory", "1M", "--listen", "/run/socket"),
        ("--memory", "1M", "--max-clients", "0"),
        ("disk.img", "another.img"),
        ("--memory", "1M", "--quiet", "--verbose"),
    ],
)
def test_wrong_usage_is_status_2(arguments):
    done = invoke("serve", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{folder}/nothing",), "{folder}/nothing: No such file or directory; look at the name, or make a disk: truncate -s 1G"),
        (("{folder}/no/disk",), "{folder}/no/disk: No such file or directory; look at the name: there is no folder {folder}/no"),
        (("{folder}",), "{folder}: a disk is a regular file or a block device, and this is a folder; name a file in it"),
        (("/dev/null",), "/dev/null: a disk is a regular file or a block device, and this is something else; name one of these"),
        (("--memory", "1M", "--tcp", "65536"), "a TCP port is a number from 0 to 65535"),
        (
            ("--memory", "1M", "--tcp", "192.0.2.1:0"),
            "cannot listen on TCP 192.0.2.1 port 0: that address is not this machine's own; 0.0.0.0 ",
        ),
        (("--memory", "1M", "--tcp", "nowhere.invalid:0"), "; give a name or an address that this machine has, or 0.0.0.0"),
        (
            ("--memory", "1M", "--unix", "{folder}/no/socket"),
            "there is no folder {folder}/no; make it, or choose a path in another",
        ),
        (("--memory", "1M", "--unix", "/dev/null/socket"), "/dev/null is no folder; choose a path in another"),
        (("--memory", "1M", "--unix", "/run/" + "x" * 200), "are too long for a unix socket, 107 is the limit; choose"),
        (("--memory", "1M", "--unix", ""), "needs a path"),
        (("--memory", "1M", "--unix", "{folder}"), "a file that is no socket is there; choose another path"),
        (("--memory", "1M", "--listen", "nbd+nothing://x"), "no transport answers to nbd+nothing://"),
        (("--memory", "1M", "--listen", "nbds://127.0.0.1:0"), "demands TLS"),
        (("--memory", "1M", "--tcp", "0", "--export", "x" * 4097), "the name of an export cannot be sent"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_1(arguments, words, short_folder):
    done = invoke("serve", *(argument.format(folder=short_folder) for argument in arguments))
    [line] = done.stderr.splitlines()
    assert line.startswith("nbdcore: ")
    assert words.format(folder=short_folder) in line
    assert (done.stdout, done.exit_code) == ("", 1)


def test_place_that_is_taken_is_one_line_and_leaves_the_first_server_alone(socket_path):
    with serving("--memory", "1M", "--tcp", "0", "--unix", socket_path) as server:
        tcp, unix = server.uris
        for place in (("--tcp", str(port_of(tcp))), ("--unix", socket_path)):
            done = invoke("serve", "--memory", "2M", *place)
            assert (done.stderr.count("\n"), done.stdout, done.exit_code) == (1, "", 1)
            assert "; stop that one, or choose another p" in done.stderr
        assert [size_at(tcp), size_at(unix)] == [MEBIBYTE] * 2


def test_blocked_transport_is_one_line_with_the_reason():
    done = run("serve", "--memory", "1M", "--unix", "x", NBDCORE_BLOCK_TRANSPORTS="unix")
    assert done.stderr.startswith("nbdcore: transport unix cannot be used: blocked by")
    assert done.returncode == 1


def test_full_disk_is_one_line_however_often_it_happens(disk):
    # No process of this shell can make a file longer than 64 KiB (its units are 512 or 1024 bytes), as if its disk were full.
    limited = ("sh", "-c", 'ulimit -f 64; exec "$@"', "sh", sys.executable, "-m", "nbdcore")
    with serving(disk, "--tcp", "0", command=limited) as server:
        with connect(server.uri) as client:
            for _ in range(3):
                with pytest.raises(nbdcore.CommandError):
                    client.pwrite(b"data", offset=MEBIBYTE // 2)
            assert client.pread(4, offset=MEBIBYTE // 2) == bytes(4)
        status, _, errors = server.stop()
    [line] = errors.splitlines()
    assert line.startswith(f"nbdcore: export '' ({disk}): the back end's pwrite failed: ")
    assert "; make room where it is" in line
    assert status == 0


def test_client_that_speaks_no_nbd_is_one_line_and_harms_no_other():
    with serving("--memory", "1M", "--tcp", "0") as server:
        with connect(server.uri) as client:
            with socket.create_connection(("127.0.0.1", port_of(server.uri)), timeout=DEADLINE) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n\x1b[31m")
                while stranger.recv(4096):
                    pass
            assert client.pread(1, 0) == b"\0"
        [line] = server.stop()[2].splitlines()
    assert re.match(r"nbdcore: TCP client 127\.0\.0\.1 port \d+ was disconnected: ", line)


# What it tells of clients


def test_quiet_leaves_warnings_out():
    with serving("--memory", "1M", "--tcp", "0.0.0.0:0", "--quiet") as server:
        with socket.create_connection(("127.0.0.1", port_of(server.uri)), timeout=DEADLINE) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while stranger.recv(4096):
                pass
        assert server.stop() == (0, "", "")


def test_verbose_tells_which_clients_come_and_go_from_every_process():
    with serving("--memory", "1M", "--tcp", "0", "--verbose", "--workers", "2") as server:
        with connect(server.uri) as first, connect(server.uri) as second:
            assert first.pread(4, 0) == second.pread(4, 0)
        lines = [server.process.stderr.readline().strip() for _ in range(4)]
        assert server.stop() == (0, "", "")
    come, gone = ({line.removesuffix(end) for line in lines if line.endswith(end)} for end in (CHOSEN, LEFT))
    assert come == gone
    assert len(come) == 2


CHOSEN, LEFT = " has chosen its export, without TLS", " has left"


# How it ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_it_in_order_with_clients_connected(number, socket_path):
    with serving("--memory", "1M", "--unix", socket_path) as server, connect(server.uri) as client:
        assert server.stop(number) == (0, "", "")
        assert not socket_path.exists()
        with pytest.raises(nbdcore.Error):
            client.pread(1, 0)


def test_second_signal_stops_it_at_once(eventually):
    with serving("--memory", "64M", "--tcp", "0") as server:
        with socket.create_connection(("127.0.0.1", port_of(server.uri)), timeout=DEADLINE) as stalling:
            begin_a_write_and_stall(stalling)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses(server.uri), "the server accepts nobody any more", seconds=DEADLINE)
            assert server.process.poll() is None
            status, _, _ = server.stop(signal.SIGTERM)
        assert status == -signal.SIGTERM


def begin_a_write_and_stall(client):
    """Open the export, and send the header of a write of 1 MiB, and half of its data."""
    client.recv(18, socket.MSG_WAITALL)
    client.sendall(struct.pack(">IQIIIH", 3, 0x49484156454F5054, 7, 6, 0, 0))  # NBD_OPT_GO of the export ""
    size = 0
    while size != 1:  # NBD_REP_ACK
        _, _, size, length = struct.unpack(">QIII", client.recv(20, socket.MSG_WAITALL))
        client.recv(length, socket.MSG_WAITALL) if length else b""
    client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, MEBIBYTE) + bytes(MEBIBYTE // 2))


def refuses(uri):
    try:
        with socket.create_connection(("127.0.0.1", port_of(uri)), timeout=DEADLINE):
            return False
    except ConnectionRefusedError:
        return True


def test_reader_that_goes_away_after_the_first_line_does_not_stop_it(socket_path, eventually):
    reader, writer = os.pipe()
    with Path(os.devnull).open() as nothing:
        server = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "nbdcore", "serve", "--memory", "1M", "--unix", str(socket_path)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, nothing.fileno(), 0)],
        )
    os.close(writer)
    try:
        assert os.read(reader, 7) == b"Serving"
        os.close(reader)
        assert size_at(f"nbd+unix:///?socket={socket_path}") == MEBIBYTE
    finally:
        os.kill(server, signal.SIGTERM)
        _, status = os.waitpid(server, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# Encrypted


@pytest.fixture
def pki(tmp_path):
    """A folder of certificates, for a server and for clients."""
    ca = CertificateAuthority()
    return ca.write(tmp_path / "pki", server=ca.issue("server", "localhost", "127.0.0.1"), client=ca.issue("client"))


def shown_by_nbdinfo(uri, *, folder=None, check=True):
    parameter = f"{'&' if '?' in uri else '?'}tls-certificates={folder}" if folder else ""
    return run_program("nbdinfo", "--json", uri + parameter, check=check)


@pytest.mark.interop("nbdinfo")
def test_encrypted_disk_has_uris_that_demand_tls(pki, socket_path):
    with serving("--memory", "1M", "--tcp", "0", "--unix", socket_path, "--tls-certificates", pki, "--export", "disk") as server:
        assert server.said[0] == "Serving 1M of memory, gone when the server stops, encrypted."
        tcp, unix = server.uris
        assert re.fullmatch(r"nbds://127\.0\.0\.1:[0-9]+/disk", tcp)
        assert unix == f"nbds+unix:///disk?socket={socket_path}"
        assert server.said[-1].endswith(f"nbdcore info {tcp} --tls-certificates {pki}")
        for uri in server.uris:
            told = json.loads(shown_by_nbdinfo(uri, folder=pki).stdout)
            assert (told["TLS"], told["exports"][0]["export-size"]) == (True, MEBIBYTE)
            assert shown_by_nbdinfo(uri.replace("nbds", "nbd", 1), check=False).returncode == 1
        assert server.stop() == (0, "", "")


@pytest.mark.interop("nbdinfo")
def test_clients_may_do_without_encryption_where_it_is_allowed(pki):
    with serving("--memory", "1M", "--tcp", "0", "--tls-certificates", pki, "--tls", "allow") as server:
        assert server.said[0].endswith(", encrypted for clients that ask for it.")
        assert json.loads(shown_by_nbdinfo(server.uri, folder=pki).stdout)["TLS"] is True
        assert json.loads(shown_by_nbdinfo(server.uri.replace("nbds", "nbd")).stdout)["TLS"] is False


@pytest.mark.interop("nbdinfo")
def test_client_without_the_certificate_demanded_is_one_line(pki, tmp_path):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    with serving("--memory", "1M", "--tcp", "0", "--tls-certificates", pki, "--tls-verify-clients") as server:
        assert shown_by_nbdinfo(server.uri, folder=stranger, check=False).returncode == 1
        assert shown_by_nbdinfo(server.uri, folder=pki).returncode == 0
        [line] = server.stop()[2].splitlines()
    assert re.match(r"nbdcore: the TLS handshake with TCP client 127\.0\.0\.1 port \d+ failed: ", line)
    assert "showed no certificate" in line


@pytest.mark.parametrize(
    ("options", "warned"),
    [(("--tls-verify-clients",), False), (("--tls-verify-clients", "--tls", "allow"), True), ((), True)],
)
def test_warning_about_strangers_depends_on_what_clients_must_show(pki, options, warned):
    with serving("--memory", "1M", "--tcp", "0.0.0.0:0", "--tls-certificates", pki, *options) as server:
        assert ("whoever can reach TCP" in server.stop()[2]) is warned


def test_uri_to_listen_at_may_demand_tls_that_there_is(pki):
    with serving("--memory", "1M", "--listen", "nbds://127.0.0.1:0", "--tls-certificates", pki) as server:
        assert server.uri.startswith("nbds://127.0.0.1:")
    done = invoke("serve", "--memory", "1M", "--listen", "nbds://127.0.0.1:0", "--tls-certificates", pki, "--tls", "allow")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "demands TLS, which this server does not require" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--tls", "require"),
        ("--tls", "allow"),
        ("--tls-verify-clients",),
        ("--tls-verify-clients", "--tls-psk", "keys.psk"),
        ("--tls-certificates", "pki", "--tls-psk", "keys.psk"),
        ("--tls-certificates", "pki", "--tls", "perhaps"),
    ],
)
def test_options_of_encryption_that_contradict_each_other_are_status_2(options):
    done = invoke("serve", "--memory", "1M", *options)
    assert (done.exit_code, done.stdout) == (2, "")


def test_certificates_that_cannot_be_used_are_one_line(tmp_path, pki):
    (pki / "server-key.pem").write_text("no key")
    for folder, words in ((tmp_path, "server-cert.pem"), (pki, "in PEM form")):
        done = invoke("serve", "--memory", "1M", "--tcp", "0", "--tls-certificates", folder)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert words in done.stderr


class TestPreSharedKeys:
    # From Python 3.13 on.
    __test__ = supports_tls_psk()

    @pytest.mark.interop("nbdinfo")
    def test_client_with_the_key_is_served_and_no_other(self, tmp_path):
        keys, others = tmp_path / "keys.psk", tmp_path / "others.psk"
        keys.write_text(PSK_LINE)
        others.write_text(f"{PSK_USER}:ff00\n")
        with serving("--memory", "1M", "--tcp", "0.0.0.0:0", "--tls-psk", keys) as server:
            uri = server.uri.replace("://", f"://{PSK_USER}@")
            assert json.loads(shown_by_nbdinfo(f"{uri}?tls-psk-file={keys}").stdout)["TLS"] is True
            assert shown_by_nbdinfo(f"{uri}?tls-psk-file={others}", check=False).returncode == 1
            [line] = server.stop()[2].splitlines()
        assert "TLS" in line


class TestWithoutPreSharedKeys:
    # Before Python 3.13.
    __test__ = not supports_tls_psk()

    def test_they_are_one_line(self, tmp_path):
        (tmp_path / "keys.psk").write_text(PSK_LINE)
        done = invoke("serve", "--memory", "1M", "--tls-psk", tmp_path / "keys.psk")
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "Python 3.13" in done.stderr


def test_standard_descriptors_that_were_closed_go_to_no_disk_and_no_socket(disk, short_folder):
    place = short_folder / "s"
    shell = ("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    with subprocess.Popen([*DIES_WITH_US, *shell, *COMMAND, "serve", str(disk), "--unix", str(place)]) as process:
        try:
            with nbdcore.connect_unix(str(place), wait=DEADLINE) as client:
                assert client.size == MEBIBYTE
            assert {Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)} == {Path(os.devnull)}
        finally:
            process.kill()


@pytest.mark.parametrize("place", [("--tcp", "0"), ("--listen", "nbd://127.0.0.1:0")])
def test_without_keepalive_clients_are_served_all_the_same(place):
    with serving("--memory", "1M", *place, "--no-keepalive") as server:
        assert size_at(server.uri) == MEBIBYTE


def test_without_keepalive_other_transports_are_as_always(socket_path):
    with serving("--memory", "1M", "--unix", socket_path, "--no-keepalive") as server:
        assert size_at(server.uri) == MEBIBYTE
