"""Whom a client believes: nobody in the clear where TLS is required, no certificate that leads nowhere, no URI, no text."""

from __future__ import annotations

import contextlib
import errno
import ssl
import warnings
from pathlib import Path

import pytest

import nbdcore
import nbdcore.libnbd as nbd
from nbdcore.protocol.constants import CommandType, Option, OptionReply
from nbdcore.testing.scripted import (
    Connection,
    Negotiation,
    ScriptedServer,
    answer,
    data,
    drain,
    error,
    expect_end,
    expect_option,
    greeting,
    half_close,
    info_replies,
    oldstyle_greeting,
    option_reply,
    unless_gone,
)
from tests.certificates import PSK_LINE, CertificateAuthority
from tests.security.peers import (
    DISK,
    ERRORS,
    PATIENCE,
    TLS_ASKED,
    TLS_GRANTED,
    Api,
    each_api,
    encrypted,
    number,
    opened,
    options_said,
    paused,
    refused,
)

either_mode = pytest.mark.parametrize("opt_mode", [False, True], ids=["automatic", "opt mode"])
REFUSALS = [reply for reply in OptionReply if reply >> 31] + [0xFFFFFFFF]


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture(scope="module")
def pki(ca, tmp_path_factory) -> Path:
    return ca.write(tmp_path_factory.mktemp("pki"), server=ca.issue("server", "localhost", "db.example"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    return CertificateAuthority().write(tmp_path_factory.mktemp("stranger"))


def check_refuses(api: Api, *scripts: list, **how) -> list[int]:
    """Connect in vain, over a socket; returns the options that the servers were asked."""
    with ScriptedServer(*scripts) as server, contextlib.closing(api(**how)) as client:
        refused(lambda: client.connect(server.socket()))
        assert client.dead
    return options_said(server.connections)


# ---------------------------------------------------------------------------------------------- required and allowed TLS


@each_api
@either_mode
@pytest.mark.parametrize("reply", REFUSALS)
def test_required_tls_that_is_refused_lets_no_other_option_out(api, opt_mode, reply):
    script = [*TLS_ASKED, option_reply(Option.STARTTLS, reply), expect_end]
    assert check_refuses(api, script, tls="require", opt_mode=opt_mode) == [Option.STARTTLS]


@each_api
@either_mode
@pytest.mark.parametrize("said", [oldstyle_greeting(DISK), greeting(0), greeting(2)], ids=["oldstyle", "newstyle", "no zeroes"])
def test_required_tls_with_a_server_of_an_age_without_it_lets_no_option_out(api, opt_mode, said):
    assert check_refuses(api, [said, unless_gone(drain)], tls="require", opt_mode=opt_mode) == []


@each_api
@either_mode
@pytest.mark.parametrize(
    "after", [b"", bytes(64), TLS_GRANTED, info_replies(Option.GO, DISK)], ids=["end", "zeroes", "grant", "export"]
)
@pytest.mark.parametrize("tls", ["require", "allow"])
def test_tls_handshake_that_fails_is_never_followed_by_plain_text_even_where_tls_is_only_allowed(api, opt_mode, after, tls):
    def fail(connection: Connection) -> None:
        connection.receive(5)
        connection.send(after)
        connection.half_close()
        connection.drain()

    # What follows the hello is TLS's own alert at most; the scripts end after one connection: there is no second attempt.
    assert check_refuses(api, [*TLS_ASKED, TLS_GRANTED, fail], tls=tls, opt_mode=opt_mode) == [Option.STARTTLS]


@each_api
def test_allowed_tls_falls_back_only_where_the_server_refuses_it(api):
    script = [*TLS_ASKED, option_reply(Option.STARTTLS, OptionReply.ERR_UNSUP), _negotiation, answer(data(b"a" * 512)), drain]
    with ScriptedServer(script) as server, contextlib.closing(api(tls="allow")) as client:
        client.connect(server.socket())
        assert client.read(512) == b"a" * 512


def _negotiation(connection: Connection) -> None:
    """Go on with a client that has sent its flags already."""
    script = Negotiation(size=DISK)
    option = 0
    while option != Option.GO:
        option, asked = connection.receive_option()
        connection.send(script._reply(option, asked))


# ---------------------------------------------------------------------------------------------- STARTTLS, a fresh start


@each_api
def test_nothing_that_a_man_in_the_middle_said_in_the_clear_survives_starttls(api, pki):
    clear = [
        expect_option(Option.INFO),
        info_replies(Option.INFO, 666, name="forged"),
        expect_option(Option.STARTTLS),
        TLS_GRANTED,
    ]
    with (
        ScriptedServer(paused(*clear, encrypted(pki, drain))) as server,
        contextlib.closing(api(opt_mode=True, tls="by hand", certificates=pki, hostname="db.example")) as client,
    ):
        client.connect(server.socket())
        client.info()
        assert client.size == 666
        assert client.start_tls() is True
        with pytest.raises(ERRORS):
            _ = client.size


@each_api
@pytest.mark.parametrize(
    "injected", [info_replies(Option.GO, 666), option_reply(Option.STRUCTURED_REPLY), b"x"], ids=["export", "grant", "byte"]
)
def test_bytes_behind_the_grant_of_tls_are_never_taken_for_answers(api, injected):
    script = [*TLS_ASKED, TLS_GRANTED + injected, half_close, unless_gone(drain)]
    assert check_refuses(api, script, tls="allow") == [Option.STARTTLS]


# ---------------------------------------------------------------------------------------------- certificates


@each_api
@pytest.mark.parametrize("way", ["tcp", "unix", "socket"])
def test_certificate_of_a_stranger_is_refused_however_the_server_is_reached(api, way, pki, stranger, socket_path):
    script = [*TLS_ASKED, TLS_GRANTED, unless_gone(_failing(encrypted(pki)))]
    with ScriptedServer(script) as server, contextlib.closing(api(tls="require", certificates=stranger)) as client:
        refused(lambda: _reach(client, server, way, socket_path))
        assert client.dead


@each_api
@pytest.mark.parametrize(("way", "accepted"), [("tcp", False), ("unix", True), ("socket", True)])
def test_name_is_checked_wherever_one_is_known_and_the_chain_alone_elsewhere(api, way, accepted, ca, tmp_path, socket_path):
    pki = ca.write(tmp_path, server=ca.issue("server", "db.example"))
    step = encrypted(pki, _negotiation, drain)
    script = [*TLS_ASKED, TLS_GRANTED, step if accepted else unless_gone(_failing(step))]
    with ScriptedServer(script) as server, contextlib.closing(api(tls="require", certificates=pki)) as client:
        if accepted:
            _reach(client, server, way, socket_path)
            assert client.size == DISK
        else:
            assert "localhost" in str(refused(lambda: _reach(client, server, way, socket_path)))


@each_api
def test_certificate_is_left_unchecked_only_by_the_callers_own_word(api, pki, stranger):
    script = [*TLS_ASKED, TLS_GRANTED, encrypted(pki, _negotiation, drain)]
    with (
        ScriptedServer(script) as server,
        contextlib.closing(api(tls="require", certificates=stranger, verify=False)) as client,
    ):
        client.connect(server.socket())
        assert client.size == DISK


def _reach(client, server: ScriptedServer, way: str, path: Path) -> None:
    if way == "tcp":
        client.connect_tcp(server.listen_tcp())
    elif way == "unix":
        server.listen_unix(path)
        client.connect_unix(path)
    else:
        client.connect(server.socket())


def _failing(step):
    """Play a TLS handshake that the client is to break off."""

    def play(connection: Connection) -> None:
        with contextlib.suppress(OSError):
            step(connection)

    return play


@each_api
@pytest.mark.parametrize("weak", ["TLS 1.1", "anonymous"])
def test_old_tls_and_anonymous_suites_are_refused_even_where_nothing_is_verified(api, weak, pki):
    ciphers, newest = "ALL:@SECLEVEL=0", ssl.TLSVersion.TLSv1_1
    if weak == "anonymous":
        ciphers, newest = "aNULL:@SECLEVEL=0", ssl.TLSVersion.TLSv1_2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what it is about
        script = [*TLS_ASKED, TLS_GRANTED, unless_gone(_failing(encrypted(pki, ciphers=ciphers, newest=newest)))]
        with ScriptedServer(script) as server, contextlib.closing(api(tls="require", verify=False)) as client:
            refused(lambda: client.connect(server.socket()))
            assert client.dead


class TestPreSharedKeys:
    # From Python 3.13 on.
    __test__ = nbdcore.supports_tls_psk()

    @each_api
    @pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
    @pytest.mark.parametrize("verify", [True, False])
    def test_server_that_declines_the_key_is_refused_though_the_system_trusts_its_certificate(
        self, api, newest, verify, pki, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca-cert.pem"))
        keys = tmp_path / "keys.psk"
        keys.write_text(PSK_LINE)
        heard: list[int] = []
        inside = encrypted(pki, lambda connection: heard.append(connection.receive_option()[0]), newest=newest)
        script = [*TLS_ASKED, TLS_GRANTED, unless_gone(_failing(inside))]
        assert check_refuses(api, script, tls="require", psk_file=keys, verify=verify) == [Option.STARTTLS]
        assert heard == []


@each_api
@pytest.mark.parametrize(("way", "said"), [("tcp", ["localhost"]), ("unix", [None]), ("socket", [None])])
def test_server_is_told_the_name_that_it_was_reached_by_and_none_where_there_is_none(api, way, said, pki, socket_path):
    names: list[str | None] = []
    step = encrypted(pki, _negotiation, drain, names=names)
    with (
        ScriptedServer([*TLS_ASKED, TLS_GRANTED, step]) as server,
        contextlib.closing(api(tls="require", certificates=pki)) as client,
    ):
        _reach(client, server, way, socket_path)
        assert names == said


@each_api
def test_secrets_of_a_connection_are_logged_nowhere_though_the_environment_names_a_file(api, pki, tmp_path, monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "secrets"))
    script = [*TLS_ASKED, TLS_GRANTED, encrypted(pki, _negotiation, drain)]
    with ScriptedServer(script) as server, contextlib.closing(api(tls="require", certificates=pki)) as client:
        client.connect(server.socket())
        assert client.size == DISK
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- URIs


@pytest.fixture
def nobody(socket_path) -> str:
    """Query of a URI whose server is not there: to get as far as trying it is another error."""
    return f"socket={socket_path}"


def check_uri_refused(uri: str, *numbers: int, **options) -> None:
    """Both clients refuse the URI before anything is opened, and stay as they were."""
    client = nbdcore.Client(**options)
    with pytest.raises(nbdcore.UsageError) as caught:
        client.connect(uri, timeout=PATIENCE)
    assert caught.value.errno in numbers
    assert client.phase is nbdcore.Phase.CREATED
    handle = nbd.NBD()
    handle.set_export_name("mine")
    with pytest.raises(nbd.Error) as told:
        handle.connect_uri(uri)
    assert told.value.errnum in numbers
    assert handle.aio_is_created()
    assert (handle.get_export_name(), handle.get_tls()) == ("mine", nbd.TLS_DISABLE)


@pytest.mark.parametrize(
    "parameter",
    ["tls-certificates=/etc", "tls-psk-file=/etc/shadow", "tls-verify-peer=0", "tls-verify-peer=false", "tls-priority=NORMAL"],
)
def test_uri_that_names_local_files_or_turns_a_check_off_is_refused(nobody, parameter):
    check_uri_refused(f"nbds+unix:///?{nobody}&{parameter}", errno.EPERM)


@pytest.mark.parametrize("parameter", ["tls-verify-pear=1", "tls-certificate=/pki", "tls-hostnam=db.example"])
def test_uri_with_a_misspelt_word_about_tls_is_refused_rather_than_followed_without_it(nobody, parameter):
    check_uri_refused(f"nbds+unix:///?{nobody}&{parameter}", errno.EINVAL)


@pytest.mark.parametrize(
    "uri",
    [
        "nbd+ssh://-oProxyCommand=touch%20owned/",
        "nbd+ssh://%2doProxyCommand=touch%20owned/",
        "nbd+ssh://host%0a/",
        "nbd+ssh://ho%20st/",
        "nbd+ssh://-l@host/",
        "nbd+ssh://host/?socket=-e",
        "nbd+ssh:///",
        "nbd://-host/",
    ],
)
def test_uri_whose_host_or_user_a_program_could_read_as_an_option_is_refused(uri):
    options = {} if uri.startswith("nbd:") else {"allow_transports": ["ssh"]}
    check_uri_refused(uri, errno.EINVAL, **options)


@pytest.mark.parametrize("uri", ["nbd://host/a%00b", "nbd://ho%00st/", "nbd+unix:///?socket=/a%00b", "nbd://us%00er@host/"])
def test_uri_with_a_nul_is_refused_once_it_is_decoded(uri):
    check_uri_refused(uri, errno.EINVAL)


def test_uri_uses_no_transport_that_was_not_allowed(nobody):
    with pytest.raises(nbdcore.UsageError) as caught:
        nbdcore.connect(f"nbd+unix:///?{nobody}", allow_transports=["tcp"], timeout=PATIENCE)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(nbdcore.UsageError) as caught:
        nbdcore.connect("nbd+ssh://host/", timeout=PATIENCE)
    assert caught.value.errno == errno.EPERM
    handle = nbd.NBD()
    handle.set_uri_allow_transports(nbd.ALLOW_TRANSPORT_TCP)
    with pytest.raises(nbd.Error) as told:
        handle.connect_uri(f"nbd+unix:///?{nobody}")
    assert told.value.errno == "EPERM"


def test_escapes_of_a_uri_are_decoded_exactly_once(socket_path):
    twice = "%2525%252f%2500"
    asked: list[bytes] = []

    def listen(connection: Connection) -> None:
        option = 0
        connection.receive(4)
        while option != Option.GO:
            option, payload = connection.receive_option()
            connection.send(Negotiation(size=DISK)._reply(option, payload))
        asked.append(payload)

    with ScriptedServer([greeting(), listen, drain], [greeting(), listen, drain]) as server:
        server.listen_unix(socket_path)
        uri = f"nbd+unix:///{twice}?socket={socket_path}"
        nbdcore.connect(uri, timeout=PATIENCE).close()
        handle = nbd.NBD()
        handle.connect_uri(uri)
        handle.close()
    name = b"%25%2f%00"
    assert [payload[: 4 + len(name)] for payload in asked] == [len(name).to_bytes(4) + name] * 2


# ---------------------------------------------------------------------------------------------- text of a server

HOSTILE = "gone\x1b]0;owned\x07\r\n\x00\u202e end"


@each_api
def test_text_of_an_error_reaches_messages_with_its_control_characters_escaped(api):
    with (
        ScriptedServer(opened(answer(error(5, HOSTILE), kind=CommandType.READ), drain)) as server,
        contextlib.closing(api()) as client,
    ):
        client.connect(server.socket())
        failure = refused(lambda: client.read(512))
        assert number(failure) == errno.EIO
        assert str(failure).isprintable()
        if isinstance(failure, nbdcore.Error):
            assert "gone\\x1b]0;owned\\x07" in str(failure)
            assert failure.server_text == HOSTILE


@each_api
def test_text_of_a_refusal_reaches_messages_with_its_control_characters_escaped(api):
    refusal = option_reply(Option.INFO, OptionReply.ERR_POLICY, HOSTILE.encode() + b"\xff")
    with (
        ScriptedServer(paused(expect_option(Option.INFO), refusal, drain)) as server,
        contextlib.closing(api(opt_mode=True)) as client,
    ):
        client.connect(server.socket())
        failure = refused(client.info)
        assert str(failure).isprintable()
        if isinstance(failure, nbdcore.Error):
            assert failure.server_text == HOSTILE + "\udcff"


@each_api
def test_names_of_exports_are_the_servers_own_to_the_byte(api):
    name = HOSTILE.replace("\0", "").encode()
    reply = option_reply(Option.LIST, OptionReply.SERVER, len(name).to_bytes(4) + name) + option_reply(Option.LIST)
    with (
        ScriptedServer(paused(expect_option(Option.LIST), reply, drain)) as server,
        contextlib.closing(api(opt_mode=True)) as client,
    ):
        client.connect(server.socket())
        assert client.exports() == [name.decode()]


def test_name_that_is_no_utf8_is_kept_with_surrogate_escapes():
    reply = option_reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\2\xff\xe9") + option_reply(Option.LIST)
    with ScriptedServer(paused(expect_option(Option.LIST), reply, drain)) as server:
        client = nbdcore.Client(server.stream(), opt_mode=True, structured_replies=False, contexts=(), timeout=PATIENCE)
        [export] = client.opt_list(timeout=PATIENCE)
        client.close()
    assert export.name == "\udcff\udce9"
