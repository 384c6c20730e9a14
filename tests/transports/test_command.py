"""The command transport's addresses; what becomes of the programs is tested with the clients."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

import nbdcore_command
from nbdcore.errors import UsageError
from nbdcore.uri import parse_uri

(transport,) = nbdcore_command.nbdcore_transports()


def test_an_address_is_a_value_that_leads_to_the_same_command():
    address = transport.address(argv=["nbdkit", Path("/disk"), "\udcff"], activation="disk")
    assert address.argv == ("nbdkit", os.fspath(Path("/disk")), "\udcff")
    copy = pickle.loads(pickle.dumps(address))
    assert copy == address
    assert hash(copy) == hash(address)
    assert str(address) == "the command nbdkit"
    assert str(transport.address(argv=["\x1b[31m"])) == "the command \\x1b[31m"


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"argv": []},
        {"argv": "nbdkit -s memory 1M"},
        {"argv": b"nbdkit"},
        {"argv": None},
        {"argv": [""]},
        {"argv": ["nbdkit", 1]},
        {"argv": ["nbdkit", "a\0b"]},
        {"argv": ["nbdkit", b"-s"]},
        {"argv": ["nbdkit"], "shell": True},
        {"argv": ["nbdkit"], "activation": ""},
        {"argv": ["nbdkit"], "activation": "a:b"},
        {"argv": ["nbdkit"], "activation": "a\nb"},
        {"argv": ["nbdkit"], "activation": b"a"},
        {"argv": ["nbdkit"], "activation": "x" * 256},
    ],
)
def test_a_wrong_command_is_a_usage_error(parts):
    with pytest.raises(UsageError, match=r"command|activated socket"):
        transport.address(**parts)


def test_no_uri_leads_to_a_command():
    assert transport.schemes == ()
    assert transport.runs_programs
    with pytest.raises(UsageError, match="has no URI"):
        transport.address(argv=["nbdkit"]).uri()
    with pytest.raises(UsageError, match="name no command"):
        transport.parse(parse_uri("nbd+command://nbdkit/"))


def test_a_command_cannot_be_listened_for():
    with pytest.raises(UsageError, match="cannot listen"):
        transport.listen(transport.address(argv=["nbdkit"]))


def test_address_without_a_program_says_what_it_needs():
    (transport,) = nbdcore_command.nbdcore_transports()
    with pytest.raises(UsageError, match=r"needs argv \(the program and its arguments\).*; given: nothing"):
        transport.address()
