from __future__ import annotations

import contextlib

import pytest

from nbdcore.protocol import wire
from nbdcore.protocol.constants import CommandType, ErrorNumber, Info, Option, OptionReply, TransmissionFlag
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk
from nbdcore.server.channel import Channel
from nbdcore.server.exports import exports_of
from nbdcore.server.negotiation import negotiate
from nbdcore.server.offer import offer_of
from nbdcore.server.shutdown import Shutdown
from nbdcore.streams.sockets import SocketStream, connected_pair
from tests.server.raw import RawClient

ACK = (OptionReply.ACK, b"")
ALLOCATION = b"base:allocation"


@pytest.fixture
def several(serve, client_of):
    """A client of a server with two exports, greeted."""
    client = client_of(
        serve(
            {
                "first": ExportSettings(MemoryDisk(1000), description="the one"),
                "zweite Platte €": MemoryDisk(2000),
            }
        )
    )
    client.greet()
    return client


@pytest.fixture
def one(serve, client_of):
    client = client_of(serve(MemoryDisk(4096)))
    client.greet()
    return client


def info(name: str = "", *items: int) -> bytes:
    return wire.pack_info_request(name, items)


def contexts(name: str, *queries: str) -> bytes:
    return wire.pack_meta_context_request(name, queries)


def refused(replies: list[tuple[int, bytes]]) -> int:
    """Return the error that is the only reply, which must have a text."""
    ((kind, text),) = replies
    assert text.decode()
    return kind


# ---------------------------------------------------------------------------------------------- greeting


def test_the_greeting_offers_fixed_newstyle_without_zeroes(serve, client_of):
    assert client_of(serve(MemoryDisk(1))).greet() == 3


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(serve, client_of, flags):
    client = client_of(serve(MemoryDisk(1)))
    client.greet(flags)
    assert client.hung_up()


@pytest.mark.parametrize("flags", [0, 2])
def test_a_client_that_knows_only_newstyle_may_only_name_its_export(serve, client_of, flags):
    server = serve(MemoryDisk(4096))
    client = client_of(server)
    client.greet(flags)
    client.send(wire.pack_option(Option.EXPORT_NAME))
    client.unpack(wire.EXPORT_NAME_REPLY)
    assert client.exactly(0 if flags & 2 else 124) == bytes(0 if flags & 2 else 124)
    assert client.read(0, 10).contents() == bytes(10)
    client = client_of(server)
    client.greet(flags)
    client.send(wire.pack_option(Option.LIST))
    assert client.hung_up()


def test_an_option_with_a_wrong_magic_ends_the_connection(one):
    one.send(wire.OPTION_REQUEST.pack(0x49484156454F5053, Option.LIST, 0))
    assert one.hung_up()


# ---------------------------------------------------------------------------------------------- export name


@pytest.mark.parametrize("zeroes", [True, False])
def test_export_name_enters_transmission(serve, client_of, zeroes):
    client = client_of(serve({"disk": MemoryDisk(5000)}))
    client.greet(1 if zeroes else 3)
    client.send(wire.pack_option(Option.EXPORT_NAME, b"disk"))
    size, flags = client.unpack(wire.EXPORT_NAME_REPLY)
    assert size == 5000
    assert flags & TransmissionFlag.HAS_FLAGS
    if zeroes:
        assert client.exactly(124) == bytes(124)
    assert client.write(10, b"hello").error == 0
    assert client.read(9, 7).contents() == b"\0hello\0"


@pytest.mark.parametrize(
    "option", [wire.pack_option(Option.EXPORT_NAME), wire.pack_option(Option.GO, info())], ids=["name", "go"]
)
def test_choice_of_an_export_is_known_before_the_client_is_told(option):
    events = []

    class Watched(SocketStream):
        def send(self, parts):
            events.append("sent")
            return super().send(parts)

    near, far = connected_pair()
    shutdown = Shutdown()
    offer = offer_of(exports_of(MemoryDisk(4096), read_only=False), None, require_tls=None)
    with near, contextlib.closing(Watched(far)) as stream, contextlib.closing(shutdown):
        near.sendall(wire.CLIENT_FLAGS.pack(3) + option)
        assert negotiate(Channel(stream, shutdown), offer, shutdown, lambda: events.append("chosen"))
    assert events == ["sent", "chosen", "sent"]


@pytest.mark.parametrize("name", [b"missing", b"x" * 4096, b"\xff\0"])
def test_export_name_of_no_export_ends_the_connection(several, name):
    several.send(wire.pack_option(Option.EXPORT_NAME, name))
    assert several.hung_up()


def test_an_export_name_that_is_too_long_ends_the_connection(several):
    several.send(wire.OPTION_REQUEST.pack(0x49484156454F5054, Option.EXPORT_NAME, 4097))
    assert several.hung_up()


def test_export_name_after_extended_headers_ends_the_connection(one):
    one.agree(structured=False, extended=True, allocation=False)
    one.send(wire.pack_option(Option.EXPORT_NAME))
    assert one.hung_up()


# ---------------------------------------------------------------------------------------------- abort and list


@pytest.mark.parametrize("data", [b"", b"bye", bytes(100000)])
def test_abort_is_acknowledged_whatever_comes_with_it(one, data):
    assert one.option(Option.ABORT, data) == [ACK]
    assert one.hung_up()


def test_list_names_every_export_with_its_description(several):
    *servers, last = several.option(Option.LIST)
    assert last == ACK
    names = ["first", "zweite Platte €"]
    assert servers == [
        (OptionReply.SERVER, wire.pack_counted_string(names[0]) + b"the one"),
        (OptionReply.SERVER, wire.pack_counted_string(names[1])),
    ]


def test_a_thousand_exports_can_be_listed(serve, client_of):
    client = client_of(serve({f"export {number}": MemoryDisk(1) for number in range(1000)}))
    client.greet()
    assert len(client.option(Option.LIST)) == 1001


@pytest.mark.parametrize("option", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_data_where_none_belongs_is_invalid(one, option):
    assert refused(one.option(option, b"?")) == OptionReply.ERR_INVALID
    assert one.option(Option.LIST)[-1] == ACK


# ---------------------------------------------------------------------------------------------- info and go


def test_info_tells_what_was_asked_for_and_go_the_same(several):
    items = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 999)
    told = several.option(Option.INFO, info("first", *items))
    assert told[-1] == ACK
    (export, *others) = (data for kind, data in told[:-1] if kind == OptionReply.INFO)
    assert wire.INFO_EXPORT.unpack(export)[:2] == (Info.EXPORT, 1000)
    assert others == [
        wire.UINT16.pack(Info.NAME) + b"first",
        wire.UINT16.pack(Info.DESCRIPTION) + b"the one",
        wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, 4096, 32 << 20),
    ]
    assert several.option(Option.GO, info("first", *items)) == told
    assert several.read(990, 10).contents() == bytes(10)


def test_info_without_items_tells_size_and_flags_only(several):
    ((kind, data), last) = several.option(Option.INFO, info("zweite Platte €"))
    assert (kind, len(data), last) == (OptionReply.INFO, 12, ACK)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize("name", ["", "First", "x" * 4096, "\udcff"])
def test_an_unknown_export_is_refused_and_another_may_be_chosen(several, option, name):
    assert refused(several.option(option, info(name))) == OptionReply.ERR_UNKNOWN
    several.go("first")
    assert several.size == 1000


def test_the_only_export_is_found_under_the_empty_name_too(serve, client_of):
    server = serve({"disk": MemoryDisk(777)})
    for name in ("", "disk"):
        client = client_of(server)
        client.greet()
        (_, named, _) = client.option(Option.INFO, info(name, Info.NAME))
        assert named == (OptionReply.INFO, wire.UINT16.pack(Info.NAME) + b"disk")
        client.agree(name=name)
        client.go(name)
        assert client.size == 777
        assert client.ask(CommandType.BLOCK_STATUS, 0, 777).extents == {1: [(777, 3)]}


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"\0\0\0\0\0\1",
        b"\0\0\0\0\0\0\0",
        b"\0\0\0\7first\0\0",
        b"\xff\xff\xff\xff\0\0",
        b"\0\0\x10\1" + b"x" * 4097 + b"\0\0",
    ],
)
def test_a_malformed_info_request_is_invalid(several, option, data):
    assert refused(several.option(option, data)) == OptionReply.ERR_INVALID
    several.go("first")


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_a_minimum_block_size_must_be_asked_for(serve, client_of, option):
    settings = ExportSettings(MemoryDisk(1 << 20), block_sizes=BlockSizes(512, 4096, 1 << 20))
    client = client_of(serve(settings))
    client.greet()
    sizes = (OptionReply.INFO, wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 512, 4096, 1 << 20))
    told, (kind, _) = client.option(option, info("", Info.NAME))
    assert (told, kind) == (sizes, OptionReply.ERR_BLOCK_SIZE_REQD)
    assert sizes in client.option(option, info("", Info.BLOCK_SIZE))


def test_export_name_cannot_ask_for_a_minimum_block_size(serve, client_of):
    client = client_of(serve(ExportSettings(MemoryDisk(1 << 20), block_sizes=BlockSizes(512))))
    client.greet()
    client.send(wire.pack_option(Option.EXPORT_NAME))
    assert client.hung_up()


def test_other_block_sizes_than_the_minimum_need_not_be_asked_for(serve, client_of):
    client = client_of(serve(ExportSettings(MemoryDisk(1 << 20), block_sizes=BlockSizes(1, 8192, 1 << 20))))
    client.greet()
    client.go(items=())
    assert client.size == 1 << 20


# ---------------------------------------------------------------------------------------------- options that set


def test_structured_replies_after_extended_headers_are_refused(one):
    assert one.option(Option.STRUCTURED_REPLY) == [ACK]
    assert one.option(Option.STRUCTURED_REPLY) == [ACK]
    assert one.option(Option.EXTENDED_HEADERS) == [ACK]
    assert refused(one.option(Option.STRUCTURED_REPLY)) == OptionReply.ERR_EXT_HEADER_REQD


def test_tls_is_refused_and_the_rest_goes_on(one):
    assert refused(one.option(Option.STARTTLS)) == OptionReply.ERR_POLICY
    one.agree()
    one.go()


@pytest.mark.parametrize("option", [0, 4, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 10, 70000])
def test_an_unknown_option_is_unsupported_and_its_data_skipped(one, option, size):
    assert refused(one.option(option, bytes(size))) == OptionReply.ERR_UNSUP
    one.go()


@pytest.mark.parametrize("option", [Option.LIST, Option.GO, Option.SET_META_CONTEXT])
def test_an_option_that_is_too_big_is_skipped_and_refused(one, option):
    assert refused(one.option(option, bytes(100000))) == OptionReply.ERR_TOO_BIG
    one.go()


@pytest.mark.parametrize("option", [Option.LIST, Option.ABORT, Option.GO, 99])
def test_an_option_that_is_far_too_big_ends_the_connection(one, option):
    one.send(wire.OPTION_REQUEST.pack(0x49484156454F5054, option, 0xFFFFFFFF))
    assert one.hung_up()


# ---------------------------------------------------------------------------------------------- metadata contexts


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], True, False),
        (["base:"], True, False),
        (["base:allocation"], True, True),
        (["base:allocation", "base:allocation"], True, True),
        (["x-foo:bar", "base:allocation"], True, True),
        (["x-foo:"], False, False),
        (["base:unknown"], False, False),
        (["nonsense"], False, False),
        (["qemu:dirty-bitmap:b0"], False, False),
    ],
)
def test_contexts_are_listed_and_selected(one, queries, listed, selected):
    one.agree(allocation=False)
    found = [(OptionReply.META_CONTEXT, wire.UINT32.pack(0) + ALLOCATION)] if listed else []
    assert one.option(Option.LIST_META_CONTEXT, contexts("", *queries)) == [*found, ACK]
    chosen = [(OptionReply.META_CONTEXT, wire.UINT32.pack(1) + ALLOCATION)] if selected else []
    assert one.option(Option.SET_META_CONTEXT, contexts("", *queries)) == [*chosen, ACK]
    one.go()
    status = one.ask(CommandType.BLOCK_STATUS, 0, 4096)
    assert status.error == (0 if selected else ErrorNumber.EINVAL)
    assert status.extents == ({1: [(4096, 3)]} if selected else {})


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_structured_replies(one, option):
    assert refused(one.option(option, contexts("", "base:allocation"))) == OptionReply.ERR_INVALID
    assert one.option(Option.EXTENDED_HEADERS) == [ACK]
    assert one.option(option, contexts("", "base:allocation"))[-1] == ACK


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\0\0\0\0\1",
        b"\0\0\0\0\0\0\0\1\0\0\0\5base",
        b"\0\0\0\0\0\0\0\0more",
        b"\0\0\0\0\xff\xff\xff\xff",
        contexts("", "base:" + "x" * 4091) + b"x",
        b"\0\0\0\0\0\0\0\1\0\0\x10\1" + b"x" * 4097,
    ],
)
def test_a_malformed_context_request_is_invalid(one, option, data):
    one.agree(allocation=False)
    assert refused(one.option(option, data)) == OptionReply.ERR_INVALID
    one.go()


def test_contexts_of_an_unknown_export_are_refused(several):
    several.agree(allocation=False)
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        assert refused(several.option(option, contexts("missing"))) == OptionReply.ERR_UNKNOWN


def select_again(client: RawClient, *request: object) -> int:
    """Select base:allocation for "first", then ask once more in another way; return what a status request says."""
    client.agree(name="first")
    client.option(Option.SET_META_CONTEXT, *request)
    client.go("first")
    return client.ask(CommandType.BLOCK_STATUS, 0, 10).error


def test_selecting_nothing_replaces_a_selection(several):
    assert select_again(several, contexts("first")) == ErrorNumber.EINVAL


def test_a_selection_that_fails_replaces_one_as_well(several):
    assert select_again(several, b"nonsense") == ErrorNumber.EINVAL


def test_a_selection_for_another_export_replaces_one(several):
    assert select_again(several, contexts("zweite Platte €", "base:allocation")) == ErrorNumber.EINVAL


# ---------------------------------------------------------------------------------------------- pace


def test_a_handshake_that_comes_byte_by_byte_is_understood(serve, client_of):
    client = client_of(serve(MemoryDisk(4096)))
    everything = wire.CLIENT_FLAGS.pack(3) + wire.pack_option(Option.STRUCTURED_REPLY) + wire.pack_option(Option.GO, info())
    for byte in everything:
        client.send(bytes([byte]))
    client.unpack(wire.GREETING)
    client.unpack(wire.HANDSHAKE_FLAGS)
    assert client.option_replies(Option.STRUCTURED_REPLY) == [ACK]
    assert client.option_replies(Option.GO)[-1] == ACK


def test_requests_that_come_with_the_last_option_are_answered(serve, client_of):
    client = client_of(serve(MemoryDisk(4096)))
    everything = wire.CLIENT_FLAGS.pack(3) + wire.pack_option(Option.GO, info()) + client.pack(CommandType.READ, 0, 100)
    client.send(everything)
    client.unpack(wire.GREETING)
    client.unpack(wire.HANDSHAKE_FLAGS)
    assert client.option_replies(Option.GO)[-1] == ACK
    assert client.reply(100).contents() == bytes(100)


def test_the_text_of_a_refusal_is_a_string_however_long_the_name_was(several):
    """Escaped, each of these bytes takes several."""
    request = wire.UINT32.pack(4096) + b"\1" * 4096 + wire.UINT16.pack(0)
    ((kind, text),) = several.option(Option.INFO, request)
    assert kind == OptionReply.ERR_UNKNOWN
    assert 0 < len(text) <= 4096
