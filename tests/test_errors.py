from __future__ import annotations

import errno
import pickle

import pytest

import nbdcore
from nbdcore.errors import copied, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("\x1b[31mred\n", r"\x1b[31mred\x0a"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("a" * 600, "a" * 500 + "…"),
    ],
)
def test_untrusted_text_is_shown_without_what_a_terminal_would_obey(text, shown):
    assert printable(text) == shown


def test_message_ends_with_the_servers_words_and_the_name_of_the_number():
    error = nbdcore.CommandError(errno.EIO, "read failed", server_text="bad \x07 disk")
    assert str(error) == r"read failed: bad \x07 disk (EIO)"


def test_server_that_says_what_the_message_says_is_not_quoted():
    error = nbdcore.CommandError(errno.ENOSPC, "write failed: No space left on device", server_text="No space left on device")
    assert str(error) == "write failed: No space left on device (ENOSPC)"


def test_number_that_does_not_exist_is_left_out():
    assert str(nbdcore.Error(0, "no such host")) == "no such host"


@pytest.mark.parametrize(
    "error",
    [
        nbdcore.Error(0, "anything"),
        nbdcore.UsageError(errno.EINVAL, "wrong"),
        nbdcore.ArgumentTypeError(errno.EINVAL, "wrong"),
        nbdcore.CommandError(errno.EIO, "read", server_text="text", offset=7),
        nbdcore.NegotiationError(errno.ENOENT, "no export", server_text="text", reply=6),
        nbdcore.TransportUnavailable("not here"),
        nbdcore.DeadlineExceeded(errno.ETIMEDOUT, "too long"),
        nbdcore.Disconnected(errno.ENOTCONN, "gone"),
    ],
)
def test_error_survives_pickling_with_all_it_knows(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, vars(copy), str(copy)) == (type(error), error.args, vars(error), str(error))


def test_failures_of_several_addresses_survive_copying():
    error = nbdcore.TransportError(errno.ECONNREFUSED, "both")
    error.failures = (nbdcore.TransportError(errno.ECONNREFUSED, "one"), nbdcore.TransportError(errno.EHOSTUNREACH, "other"))
    for copy in (copied(error), pickle.loads(pickle.dumps(error))):
        assert [failure.message for failure in copy.failures] == ["one", "other"]


def test_that_an_error_names_its_disk_survives_copying():
    error = nbdcore.Disconnected(errno.ENOTCONN, "gone")
    error.names_disk = True
    assert all(copy.names_disk for copy in (copied(error), pickle.loads(pickle.dumps(error))))


def test_what_the_world_did_is_an_oserror_and_what_the_program_did_wrong_is_none():
    world = [nbdcore.TransportError, nbdcore.TransportUnavailable, nbdcore.CommandError, nbdcore.NegotiationError]
    world += [nbdcore.TLSError, nbdcore.ProtocolViolation, nbdcore.Disconnected, nbdcore.DeadlineExceeded]
    assert all(issubclass(error, OSError) for error in world)
    assert not issubclass(nbdcore.Error, OSError)
    assert not issubclass(nbdcore.UsageError, OSError)
    assert not issubclass(nbdcore.ArgumentTypeError, OSError)


def test_every_error_is_the_builtin_one_that_python_programs_catch():
    assert issubclass(nbdcore.UsageError, ValueError)
    assert issubclass(nbdcore.ArgumentTypeError, TypeError)
    assert issubclass(nbdcore.Disconnected, ConnectionError)
    assert issubclass(nbdcore.DeadlineExceeded, TimeoutError)


def test_an_error_that_is_an_oserror_has_that_ones_attributes():
    error = nbdcore.CommandError(errno.EIO, "read failed")
    assert (error.errno, error.strerror, error.args) == (errno.EIO, "read failed", (errno.EIO, "read failed"))


def test_a_usage_error_has_number_and_message():
    error = nbdcore.UsageError(errno.EINVAL, "wrong")
    assert (error.errno, error.message, error.args) == (errno.EINVAL, "wrong", (errno.EINVAL, "wrong"))


@pytest.mark.parametrize(
    "kind",
    [getattr(nbdcore, name) for name in nbdcore.__all__ if name.endswith(("Error", "Exceeded"))]
    + [nbdcore.Disconnected, nbdcore.ProtocolViolation, nbdcore.TransportUnavailable],
)
def test_every_error_is_made_of_errno_and_message(kind):
    made = kind(errno.EPERM, "not so", server_text="said")
    assert (made.errno, made.message, made.server_text) == (errno.EPERM, "not so", "said")
    again = pickle.loads(pickle.dumps(made))
    assert (type(again), again.errno, again.message, again.server_text) == (kind, errno.EPERM, "not so", "said")


def test_reason_alone_why_a_transport_is_unavailable_is_enotsup():
    made = nbdcore.TransportUnavailable("no pigeons here")
    assert (made.errno, made.message) == (errno.ENOTSUP, "no pigeons here")
