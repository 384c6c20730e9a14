"""`nbdcore info` and what a hostile server can make of it: nothing on a terminal, nothing in JSON, and no end of memory."""

from __future__ import annotations

import itertools
import json
import struct
import sys

from nbdcore.protocol import wire
from nbdcore.protocol.constants import Info, Option, OptionReply
from nbdcore.testing.scripted import Connection, ScriptedServer, Step, greeting, info_replies, option_reply, unless_gone
from tests.cli.commands import invoke, run
from tests.security.peers import DISK

NASTY = 'a"b\\c/\x1b[31m\x00\x7f\u2028\u202e\ud7ff'.encode() + b"\xff\xc0\x80"


#: Bytes of address space that the command gets: many times what it needs, and a fraction of what the list would take.
MOST_MEMORY = 512 << 20
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
sys.argv[:2] = ["nbdcore"]
from nbdcore.cli import main
sys.exit(main())
"""


def until_goodbye(*replies: tuple[int, bytes]) -> Step:
    """Answer these options so, and refuse all others, until the client says goodbye or hangs up."""
    known = dict(replies)

    def play(connection: Connection) -> None:
        connection.receive(4)
        while True:
            option, _ = connection.receive_option()
            if option == Option.ABORT:
                return
            connection.send(known.get(option, option_reply(option, OptionReply.ERR_UNSUP)))

    return unless_gone(play)


def described(name: bytes, description: bytes) -> bytes:
    """Answer INFO with texts that are no text."""
    pieces = [
        wire.INFO_EXPORT.pack(Info.EXPORT, DISK, 1),
        struct.pack(">H", Info.NAME) + name,
        struct.pack(">H", Info.DESCRIPTION) + description,
    ]
    return b"".join(option_reply(Option.INFO, OptionReply.INFO, piece) for piece in pieces) + option_reply(Option.INFO)


def listed(*names: bytes) -> bytes:
    entries = (option_reply(Option.LIST, OptionReply.SERVER, struct.pack(">I", len(name)) + name) for name in names)
    return b"".join(entries) + option_reply(Option.LIST)


def test_hostile_names_and_descriptions_are_escaped_on_a_terminal_and_in_json():
    name = NASTY.replace(b"\0", b"")  # no option can name an export with a NUL
    answers = [(Option.LIST, listed(name)), (Option.INFO, described(name, NASTY))]
    for arguments in ((), ("--list",), ("--json",), ("--json", "--list")):
        with ScriptedServer([greeting(), until_goodbye(*answers)]) as server:
            done = invoke("info", f"nbd://127.0.0.1:{server.listen_tcp()}", *arguments)
        assert done.exit_code == 0
        shown = done.output.replace("\n", "").replace("\t", "")
        assert shown.isprintable()
        if "--json" in arguments:
            [export] = json.loads(done.output)["exports"]
            assert export["description"].encode("utf-8", "surrogateescape") == NASTY


def test_refusal_with_hostile_words_is_one_printable_line_and_a_failing_exit_status():
    words = b"no\x1b]0;owned\x07\nnbdcore: all is well\r\xff"
    refused = option_reply(Option.INFO, OptionReply.ERR_POLICY, words)
    with ScriptedServer([greeting(), until_goodbye((Option.INFO, refused), (Option.GO, refused))]) as server:
        done = invoke("info", f"nbd://127.0.0.1:{server.listen_tcp()}", "--json")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()


def endless_list(connection: Connection) -> None:
    """Name exports until the client hangs up."""
    option = 0
    connection.receive(4)
    while option != Option.LIST:
        option, _ = connection.receive_option()
        if option != Option.LIST:
            connection.send(option_reply(option, OptionReply.ERR_UNSUP))
    entry = option_reply(Option.LIST, OptionReply.SERVER, struct.pack(">I", 4000) + b"n" * 4000)
    for _ in itertools.count():
        connection.send(entry * 16)


def test_list_without_end_is_given_up_before_it_takes_the_machines_memory():
    with ScriptedServer([greeting(), unless_gone(endless_list)]) as server:
        uri = f"nbd://127.0.0.1:{server.listen_tcp()}"
        limited = [sys.executable, "-c", LIMITED, str(MOST_MEMORY), "info", "--list", "--json", uri]
        done = run(command=limited)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "does not end" in done.stderr
    assert done.stderr.count("\n") == 1


def test_export_that_cannot_be_asked_about_is_named_in_the_exit_status():
    answers = [(Option.LIST, listed(b"good", b"bad"))]
    good = info_replies(Option.INFO, DISK)
    turns = iter([good, option_reply(Option.INFO, OptionReply.ERR_UNKNOWN)])

    def play(connection: Connection) -> None:
        connection.receive(4)
        known = dict(answers)
        while (option := connection.receive_option()[0]) != Option.ABORT:
            reply = next(turns) if option == Option.INFO else known.get(option)
            connection.send(reply or option_reply(option, OptionReply.ERR_UNSUP))

    with ScriptedServer([greeting(), unless_gone(play)]) as server:
        done = invoke("info", "--list", "--json", f"nbd://127.0.0.1:{server.listen_tcp()}")
    assert done.exit_code == 1
    assert [export["export-name"] for export in json.loads(done.stdout)["exports"]] == ["good"]
    assert "'bad'" in done.stderr
