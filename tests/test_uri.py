"""NBD URIs: doc/uri.md's own examples, what must be refused and how it is said, and round trips."""

from __future__ import annotations

import errno
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdcore.errors import UsageError
from nbdcore.uri import TLS_PARAMETERS, URI, format_uri, is_uri, parse_uri


@pytest.mark.parametrize(
    ("text", "export"),
    [  # the table of doc/uri.md, "NBD URI export name"
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        # and beyond it
        ("nbd://example.com?", ""),
        ("nbd://example.com/a/b/", "a/b/"),
        ("nbd://example.com/%2Fdisk", "/disk"),
        ("nbd://example.com/a%252Fb", "a%2Fb"),  # decoded once
        ("nbd://example.com/a+b", "a+b"),
        ("nbd://example.com/%C3%A9", "é"),
        ("nbd://example.com/%ff", "\udcff"),
        ("nbd://example.com/a:b@c;d=e&f", "a:b@c;d=e&f"),
        ("nbd://example.com/a%3Fb%23c", "a?b#c"),
    ],
)
def test_export_is_the_path_without_one_leading_slash(text, export):
    assert parse_uri(text).export == export


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("nbd://", None, None, None),
        ("nbd:///x", None, None, None),
        ("nbd://host", None, "host", None),
        ("nbd://host:", None, "host", None),
        ("nbd://:7", None, None, 7),
        ("nbd://host:0", None, "host", 0),
        ("nbd://host:00010809", None, "host", 10809),
        ("nbd://host:65536", None, "host", 65536),  # the transport's business
        ("nbd+vsock://2:4294967295/", None, "2", 4294967295),
        ("nbd+vsock://4294967295", None, "4294967295", None),
        ("nbds://alice@host", "alice", "host", None),
        ("nbds://a:b@host:1", "a:b", "host", 1),
        ("nbds://al%40ice@host", "al@ice", "host", None),
        ("nbds://@host", "", "host", None),
        ("nbd://[::1]", None, "::1", None),
        ("nbd://[::1]:10809/x", None, "::1", 10809),
        ("nbd://[fe80::1%25eth0]:1/", None, "fe80::1%eth0", 1),
        ("nbd://[::ffff:127.0.0.1]/", None, "::ffff:127.0.0.1", None),
        ("nbd://127.0.0.1:1", None, "127.0.0.1", 1),
        ("nbd://ex%61mple.com", None, "example.com", None),
        ("nbd://b%C3%BCcher.example", None, "bücher.example", None),
        ("nbd://host?socket=x", None, "host", None),
    ],
)
def test_authority(text, user, host, port):
    uri = parse_uri(text)
    assert (uri.user, uri.host, uri.port) == (user, host, port)


@pytest.mark.parametrize(
    ("text", "scheme", "transport_scheme", "tls"),
    [
        ("nbd://", "nbd", "nbd", False),
        ("NBD://", "nbd", "nbd", False),
        ("nbds://", "nbds", "nbd", True),
        ("nbd+unix://", "nbd+unix", "nbd+unix", False),
        ("nbds+unix://", "nbds+unix", "nbd+unix", True),
        ("NbdS+VSock://", "nbds+vsock", "nbd+vsock", True),
        ("nbd+foo://", "nbd+foo", "nbd+foo", False),
        ("nbds+foo+bar://", "nbds+foo+bar", "nbd+foo+bar", True),
        ("nbdst://", "nbdst", "nbdst", False),
        ("carrier-pigeon://", "carrier-pigeon", "carrier-pigeon", False),
    ],
)
def test_scheme_with_and_without_tls(text, scheme, transport_scheme, tls):
    uri = parse_uri(text)
    assert (uri.scheme, uri.transport_scheme, uri.tls) == (scheme, transport_scheme, tls)


@pytest.mark.parametrize(
    ("query", "pairs"),
    [
        ("", ()),
        ("&;&", ()),
        ("socket=/run/x.sock", (("socket", "/run/x.sock"),)),
        ("SOCKET=x;Tls-Type=PSK", (("socket", "x"), ("tls-type", "PSK"))),
        ("a=1&b=2;c=3", (("a", "1"), ("b", "2"), ("c", "3"))),
        ("a", (("a", ""),)),
        ("a=b=c", (("a", "b=c"),)),
        ("a=x%26y%3Bz", (("a", "x&y;z"),)),
        ("a=1+1", (("a", "1+1"),)),
        ("a=b?c/d", (("a", "b?c/d"),)),
        ("socket=%00/abstract", (("socket", "\0/abstract"),)),
        ("socket=%FF", (("socket", "\udcff"),)),
    ],
)
def test_query(query, pairs):
    uri = parse_uri(f"nbd:///?{query}")
    assert uri.query == pairs
    assert parse_uri(str(uri)) == uri


def test_last_of_several_parameters_wins_and_names_have_no_case():
    uri = parse_uri("nbd+unix:///?socket=a&Socket=b&empty")
    assert uri.parameter("SOCKET") == "b"
    assert uri.parameter("empty") == ""
    assert uri.parameter("absent") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write nbd://"),
        ("localhost:10809", "write nbd://"),
        ("://host", "write nbd://"),
        ("1nbd://host", "write nbd://"),
        ("nbd:unix:/run/x.sock", "'//' is missing"),
        ("nbd:/x", "'//' is missing"),
        ("NBDS:host", "'//' is missing"),
        ("/run/x.sock", "nbd+unix:///EXPORT?socket=/run/x.sock"),
        ("nbd://ho st/", "write %20"),
        ("nbd://host/a b", "write %20"),
        (" nbd://host/", "write %20"),
        ("nbd://host/a\n", "write %0A"),
        ("nbd://host/\x7f", "write %7F"),
        ("nbd://host/é", "write %C3%A9"),
        ("nbd://host/\udcff", "write %"),
        ("nbd://host/a\0", "NUL"),
        ("nbd://host/%", "%25"),
        ("nbd://host/100%", "%25"),
        ("nbd://host/%4", "%25"),
        ("nbd://host/%zz", "'%zz' in the export name"),
        ("nbd://%zz/", "'%zz' in the host"),
        ("nbds://%zz@host/", "'%zz' in the user name"),
        ("nbd:///?socket=%zz", "'%zz' in the value of 'socket'"),
        ("nbd:///?%zz=1", "'%zz' in the query"),
        ("nbd://[fe80::1%eth0]/", "%25"),
        ("nbd://host/a%00b", "export name holds a NUL"),
        ("nbd://host/%00", "export name holds a NUL"),
        ("nbd://ho%00st/", "host holds a NUL"),
        ("nbds://a%00@host/", "user name holds a NUL"),
        ("nbd:///?a%00=1", "name holds a NUL"),
        ("nbd:///?tls-hostname=%00x", "'tls-hostname' holds a NUL"),
        ("nbd+unix:///?socket=a%00b", "'socket' holds a NUL"),
        ("nbd+unix:///?socket=%00a%00b", "'socket' holds a NUL"),
        ("nbd://host/a#b", "%23"),
        ("nbd://host/#", "%23"),
        ("nbd://host/?a=b#", "%23"),
        ("nbd://host:port/", "decimal"),
        ("nbd://host:-1/", "decimal"),
        ("nbd://host:+1/", "decimal"),
        ("nbd://host:0x2a39/", "decimal"),
        ("nbd://host:1_0/", "decimal"),
        ("nbd://host:%31/", "decimal"),
        (f"nbd://host:{'9' * 5000}/", "decimal"),
        ("nbd://::1/", "in brackets"),
        ("nbd://[::1/", "']'"),
        ("nbd://[::1]10809/", "']'"),
        ("nbd://[::1]:x/", "decimal"),
        ("nbd://[]/", "IPv6"),
        ("nbd://[localhost]/", "IPv6"),
        ("nbd://[1.2.3.4]/", "IPv6"),
        ("nbd://a@b@c/", "%40"),
        ("nbd://-oProxyCommand=x/", "begins with '-'"),
        ("nbd://%2Dx/", "begins with '-'"),
        ("nbd://a%2Fb/", "'/'"),
        ("nbd://a%40b/", "'@'"),
        ("nbd://a%3A1/", "':'"),
        ("nbd://a%20b/", "no such character"),
        ("nbd://a%0Ab/", "no such character"),
        ("nbd://a%FFb/", "no such character"),
        ("nbd:///?=x", "has no name"),
    ],
)
def test_wrong_uri_is_refused_and_says_what_to_write(text, said):
    with pytest.raises(UsageError) as caught:
        parse_uri(text)
    assert caught.value.errno == errno.EINVAL
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_error_shows_no_raw_control_characters_of_the_uri():
    with pytest.raises(UsageError) as caught:
        parse_uri("nbd://a%1B%5B31mb/")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("parameter", ["tls-verfy-peer=1", "tls_hostname=x", "sockett=x", "foo"])
def test_unknown_parameter_is_refused_by_name(parameter):
    uri = parse_uri(f"nbds+unix:///?socket=x&{parameter}")
    with pytest.raises(UsageError) as caught:
        uri.check_parameters(("socket",))
    assert f"no query parameter {parameter.partition('=')[0]};" in str(caught.value)
    assert "known are socket, tls-type" in str(caught.value)


@pytest.mark.parametrize("parameter", [*TLS_PARAMETERS, "TLS-Hostname", "socket", "x-anything"])
def test_known_and_experimental_parameters_pass(parameter):
    parse_uri(f"nbd+unix:///?{parameter}=1").check_parameters(("socket",))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("nbd://", True),
        ("Foo+bar://x", True),
        ("nbd:/x", False),
        ("/a://b", False),
        ("host:1", False),
        ("C:\\disk", False),
        ("", False),
    ],
)
def test_is_uri_tells_uris_from_files(text, meant):
    assert is_uri(text) is meant


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ({"scheme": "nbd"}, "nbd:///"),
        ({"scheme": "nbd", "host": "host", "port": 1}, "nbd://host:1/"),
        ({"scheme": "nbd", "host": "::1", "port": 0, "export": "a b"}, "nbd://[::1]:0/a%20b"),
        ({"scheme": "nbd", "host": "fe80::1%eth0"}, "nbd://[fe80::1%25eth0]/"),
        ({"scheme": "nbd+vsock", "host": "2", "port": 2**32 - 1, "export": "/x?y#z%"}, "nbd+vsock://2:4294967295//x%3Fy%23z%25"),
        ({"scheme": "nbd+unix", "query": [("socket", "\0a&b;c=d")]}, "nbd+unix:///?socket=%00a%26b%3Bc%3Dd"),
        ({"scheme": "nbd+unix", "query": [("socket", "/run/\udcff")]}, "nbd+unix:///?socket=/run/%FF"),
    ],
)
def test_format_quotes_each_piece_for_its_place(pieces, text):
    assert format_uri(**pieces) == text
    assert str(parse_uri(text)) == text


@pytest.mark.parametrize(
    "pieces",
    [
        {"scheme": "nbd", "export": "a\0"},
        {"scheme": "nbd", "export": "\ud800"},
        {"scheme": "NBD"},
        {"scheme": "nbd:"},
        {"scheme": ""},
    ],
)
def test_format_refuses_what_no_uri_can_say(pieces):
    with pytest.raises(UsageError):
        format_uri(**pieces)


def test_uri_is_a_frozen_picklable_value():
    uri = parse_uri("nbds://u@[::1]:1/x?tls-type=psk")
    assert pickle.loads(pickle.dumps(uri)) == uri
    assert hash(uri) == hash(parse_uri(str(uri)))
    with pytest.raises(AttributeError):
        uri.port = 2


# What a decoded piece may be: bytes that are no UTF-8 included, half surrogates excluded, as parsing never makes them.
_PIECE = st.binary(max_size=20).map(lambda octets: octets.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
_HOST = st.one_of(
    st.none(),
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    st.ip_addresses(v=6).map(str),
    st.sampled_from(["bücher.example", "fe80::1%eth0"]),
)


@given(
    scheme=st.sampled_from(["nbd", "nbds", "nbd+unix", "nbds+vsock", "x.y-z"]),
    user=st.none() | _PIECE,
    host=_HOST,
    port=st.none() | st.integers(0, 2**32),
    export=_PIECE,
    query=st.lists(st.tuples(st.from_regex(r"[a-z-]{1,8}", fullmatch=True), _PIECE), max_size=4).map(tuple),
)
@example(scheme="nbd", user="", host=None, port=None, export="/", query=(("socket", "\0"),))
def test_any_uri_survives_being_written_and_read(scheme, user, host, port, export, query):
    uri = URI(scheme, user, host, port, export, query)
    assert parse_uri(str(uri)) == uri


@given(st.one_of(st.text(), st.from_regex(r"nbd(\+unix)?://[%a-f0-9:@\[\]/?#&;=. -]*", fullmatch=True)))
def test_any_text_parses_or_is_a_usage_error(text):
    try:
        uri = parse_uri(text)
    except UsageError as error:
        said = str(error)
    else:
        said = str(uri)
        assert parse_uri(said) == uri
    assert said.isprintable()
