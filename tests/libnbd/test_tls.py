"""TLS as libnbd's settings ask for it, against nbdkit, whose TLS is GnuTLS."""

from __future__ import annotations

import pytest

import nbdcore.libnbd as nbd
from nbdcore.streams.tls.credentials import supports_tls_psk
from tests.certificates import PSK_LINE, PSK_USER, CertificateAuthority
from tests.interop.servers import nbdkit

pytestmark = pytest.mark.interop("nbdkit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    authority = CertificateAuthority()
    return authority.write(tmp_path_factory.mktemp("pki"), server=authority.issue("server", "localhost"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return CertificateAuthority().write(tmp_path_factory.mktemp("stranger"))


def options(folder):
    return (f"--tls-certificates={folder}", "memory", "1M")


def test_required_tls_with_certificates(folder, handles):
    with nbdkit(*options(folder), tls="require", tcp=True) as server:
        handle = handles()
        handle.set_tls_certificates(folder)
        handle.set_tls_hostname("localhost")
        handle.connect_uri(server.uri)
        assert handle.get_tls() == nbd.TLS_REQUIRE
        assert handle.get_tls_negotiated() is True
        handle.pwrite(b"secret" * 1000, 0)
        assert handle.pread(6000, 0) == b"secret" * 1000
        assert handle.get_uri().startswith("nbds://")
        handle.aio_pread(buffer := nbd.Buffer(1 << 20), 0, lambda error: 1 if not error.value else 0)
        while handle.aio_in_flight():
            handle.poll(-1)
        assert buffer.to_bytearray() == handle.pread(1 << 20, 0)
        handle.shutdown()


def test_certificate_of_a_stranger_is_refused_and_off_only_by_the_programs_own_act(folder, stranger, handles):
    with nbdkit(*options(folder), tls="require") as server:
        handle = handles()
        handle.set_tls_certificates(stranger)
        with pytest.raises(nbd.Error):
            handle.connect_uri(server.uri)
        assert handle.aio_is_dead()
        handle = handles()
        handle.set_tls_certificates(stranger)
        handle.set_tls_verify_peer(False)
        handle.connect_uri(server.uri)
        assert handle.get_tls_negotiated() is True
        handle.close()  # nbdkit ends after its last client


def test_allowed_tls_falls_back_only_where_the_server_declines(folder, stranger, handles):
    with nbdkit("memory", "1M") as server:
        handle = handles()
        handle.set_tls(nbd.TLS_ALLOW)
        handle.connect_uri(server.uri)
        assert handle.get_tls_negotiated() is False
        handle.close()
    with nbdkit(*options(folder), tls="on") as server:
        handle = handles()
        handle.set_tls(nbd.TLS_ALLOW)
        handle.set_tls_certificates(stranger)
        with pytest.raises(nbd.Error):
            handle.connect_uri(server.uri)
        assert handle.aio_is_dead()


def test_required_tls_that_the_server_declines_is_an_error(handles):
    with nbdkit("memory", "1M") as server:
        handle = handles()
        handle.set_tls(nbd.TLS_REQUIRE)
        with pytest.raises(nbd.Error) as caught:
            handle.connect_uri(server.uri)
        assert caught.value.errno == "ENOTSUP"


def test_tls_begun_by_hand_forgets_what_was_agreed_before(folder, handles):
    with nbdkit(*options(folder), tls="on") as server:
        handle = handles()
        handle.set_opt_mode(True)
        handle.set_tls_certificates(folder)
        handle.add_meta_context("base:allocation")
        handle.connect_uri(server.uri)
        handle.opt_info()
        assert handle.get_structured_replies_negotiated() is True
        assert handle.opt_starttls() is True
        assert handle.get_tls_negotiated() is True
        assert handle.get_structured_replies_negotiated() is False
        with pytest.raises(nbd.Error):
            handle.get_size()
        assert handle.opt_structured_reply() is True
        handle.opt_go()
        assert handle.can_meta_context("base:allocation") is True
        assert handle.pread(512, 0) == bytes(512)
        handle.close()


def test_folder_without_certificates_ends_the_connection(folder, tmp_path, handles):
    with nbdkit(*options(folder), tls="require") as server:
        handle = handles()
        handle.set_tls_certificates(tmp_path)
        with pytest.raises(nbd.Error, match="ca-cert"):
            handle.connect_uri(server.uri)
        assert handle.aio_is_dead()


def test_pre_shared_key(tmp_path, handles):
    keys = tmp_path / "keys"
    keys.write_text(PSK_LINE)
    with nbdkit(f"--tls-psk={keys}", "memory", "1M", tls="require") as server:
        handle = handles()
        handle.set_tls_psk_file(keys)
        handle.set_tls_username(PSK_USER)
        if supports_tls_psk():
            handle.connect_uri(server.uri)
            assert handle.pread(512, 0) == bytes(512)
            handle.close()
        else:
            with pytest.raises(nbd.Error, match=r"Python 3\.13") as caught:
                handle.connect_uri(server.uri)
            assert caught.value.errno == "ENOTSUP"
