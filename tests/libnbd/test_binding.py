"""What libnbd's Python module promises beyond the calls: errors, arguments, results, buffers, handles, constants, the module."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import nbdcore.libnbd as nbd
from nbdcore.server import MemoryDisk, Server

# ---------------------------------------------------------------------------------------------- the module


def test_constants_are_plain_numbers_and_strings():
    for name in nbd._constants.NAMES:
        assert type(getattr(nbd, name)) in (int, str)
    assert (nbd.STRICT_MASK, nbd.CMD_FLAG_MASK, nbd.SHUTDOWN_MASK, nbd.ALLOW_TRANSPORT_MASK) == (127, 63, 65536, 15)
    assert nbd.CONTEXT_BASE_ALLOCATION == "base:allocation"
    assert len(nbd._constants.NAMES) == 46


def test_module_names_the_library_and_its_release(handles):
    handle = handles()
    assert nbd.package_name == handle.get_package_name() == "libnbd"
    assert nbd.__version__ == handle.get_version() == "1.24.4"
    assert isinstance(handle.get_version_extra(), str)
    assert handle.get_handle_size() > 0
    assert handle.supports_uri() is True
    assert handle.supports_tls() is True
    assert isinstance(handle.supports_vsock(), bool)


def test_handles_are_numbered_from_the_third_on():
    code = "import nbdcore.libnbd as n; print(n.NBD().get_handle_name(), n.NBD().get_handle_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["nbd3", "nbd4"]


def test_plain_import_finds_the_module_only_when_told_to(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text("import sys, nbd\nprint(nbd.NBD.__module__, sys.argv[1:])\n")
    for what in ([program], ["-c", program.read_text()], ["-m", "program"]):
        line = [sys.executable, "-m", "nbdcore.libnbd", *what, "x"]
        told = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)
        assert told.stdout.split() == ["nbdcore.libnbd.handle", "['x']"]
    code = "import nbdcore.libnbd as n, sys; assert 'nbd' not in sys.modules; n.install(); import nbd; print(nbd.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == nbd.__version__


# ---------------------------------------------------------------------------------------------- errors


def test_error_has_a_text_a_number_and_its_name(handles):
    with pytest.raises(nbd.Error) as caught:
        handles().pread(1, 0)
    error = caught.value
    text = "nbd_pread: invalid state: START: the handle must be connected with the server: Transport endpoint is not connected"
    assert error.args == (text, errno.ENOTCONN)
    assert (error.string, error.errnum, error.errno) == (text, errno.ENOTCONN, "ENOTCONN")
    assert str(error) == f"{text} (ENOTCONN)"
    assert not isinstance(error, OSError)


def test_error_without_a_number_has_no_name():
    error = nbd.Error("nbd_x: text", 0)
    assert (error.errno, str(error)) == (None, "nbd_x: text")


def test_wrong_number_of_arguments_is_a_type_error_in_any_state(handles, connected):
    for handle in (handles(), connected):
        with pytest.raises(TypeError):
            handle.pread(1)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda h: h.set_export_name(b"bytes"), TypeError),
        (lambda h: h.set_export_name("nul\0"), ValueError),
        (lambda h: h.connect_unix(3), TypeError),
        (lambda h: h.connect_unix(b"nul\0"), ValueError),
        (lambda h: h.set_debug_callback(None), TypeError),
        (lambda h: h.connect_command(("tuple",)), TypeError),
        (lambda h: h.connect_command([1]), TypeError),
        (lambda h: h.poll(1 << 40), OverflowError),
        (lambda h: h.kill_subprocess(1 << 40), OverflowError),
        (lambda h: h.aio_connect(("a", 1)), TypeError),
        (lambda h: h.set_strict_mode("1"), TypeError),
    ],
)
def test_argument_of_a_wrong_type_is_refused(call, error, handles):
    with pytest.raises(error):
        call(handles())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda h: h.pwrite("text", 0), TypeError),
        (lambda h: h.pwrite(nbd.Buffer(1), 0), TypeError),
        (lambda h: h.pwrite(memoryview(b"abcd")[::2], 0), BufferError),
        (lambda h: h.aio_pread(3, 0), TypeError),
        (lambda h: h.aio_pread(b"read-only", 0), BufferError),
        (lambda h: h.aio_pread(nbd.Buffer.from_buffer(b"read-only"), 0), BufferError),
        (lambda h: h.aio_pwrite("text", 0), TypeError),
        (lambda h: h.aio_flush(3), TypeError),
        (lambda h: h.block_status(512, 0, None), TypeError),
        (lambda h: h.pread_structured(512, 0, None), TypeError),
        (lambda h: h.pread(1.5, 0), TypeError),
    ],
)
def test_argument_of_a_wrong_type_is_refused_when_connected(call, error, connected):
    with pytest.raises(error):
        call(connected)
    assert connected.aio_in_flight() == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda h: h.set_tls(9), "nbd_set_tls: tls: invalid value for parameter: 9"),
        (lambda h: h.set_strict_mode(1 << 20), "nbd_set_strict_mode: flags: invalid value for flag: 0x100000"),
        (lambda h: h.set_handshake_flags(77), "nbd_set_handshake_flags: flags: invalid value for flag: 0x4d"),
        (lambda h: h.get_meta_context(0), "nbd_get_meta_context: meta context request out of range"),
        (lambda h: h.aio_command_completed(0), "nbd_aio_command_completed: invalid aio cookie 0"),
        (lambda h: h.set_export_name("x" * 5000), None),
        (lambda h: h.add_meta_context("x" * 5000), None),
        (lambda h: h.set_socket_activation_name("a-b"), None),
        (lambda h: h.kill_subprocess(-1), None),
        (lambda h: h.aio_command_completed(-1), None),
        (lambda h: h.aio_command_completed(1 << 64), None),
        (lambda h: h.set_tcp_option(999, 1), None),
    ],
)
def test_value_that_is_refused_leaves_nothing_changed(call, text, handles):
    handle = handles()
    with pytest.raises(nbd.Error) as caught:
        call(handle)
    assert caught.value.errno in ("EINVAL", "ENAMETOOLONG")
    if text is not None:
        assert caught.value.string == f"{text}: Invalid argument"
    assert (handle.get_tls(), handle.get_strict_mode(), handle.get_export_name()) == (0, nbd.STRICT_MASK, "")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda h: h.pread(512, 1 << 64), "EINVAL"),
        (lambda h: h.pread(512, -512), "EINVAL"),
        (lambda h: h.pread(-1, 0), "EINVAL"),
        (lambda h: h.pread(0, 0), "EINVAL"),
        (lambda h: h.pread(512, 1 << 20), "EINVAL"),
        (lambda h: h.pread(512, 0, nbd.CMD_FLAG_FUA), "EINVAL"),
        (lambda h: h.pread(512, 0, 1 << 20), "EINVAL"),
        (lambda h: h.pwrite(b"x", 1 << 20), "ENOSPC"),
        (lambda h: h.trim(0, 0), "EINVAL"),
        (lambda h: h.zero(512, 1 << 20), "ENOSPC"),
        (lambda h: h.zero(512, 0, nbd.CMD_FLAG_DF), "EINVAL"),
        (lambda h: h.cache(512, 1 << 20), "EINVAL"),
        (lambda h: h.shutdown(1), "EINVAL"),
        (lambda h: h.get_block_size(9), "EINVAL"),
        (lambda h: h.block_status_filter(512, 0, ["no:such"], print), "EINVAL"),
    ],
)
def test_request_that_cannot_be_is_refused_and_the_connection_lives(call, name, connected):
    sent = connected.stats_bytes_sent()
    with pytest.raises(nbd.Error) as caught:
        call(connected)
    assert caught.value.errno == name
    assert connected.stats_bytes_sent() == sent
    assert connected.pread(1, 0) == bytearray(1)


def test_strictness_can_be_given_up_at_any_time(connected):
    connected.set_strict_mode(connected.get_strict_mode() & ~nbd.STRICT_BOUNDS)
    with pytest.raises(nbd.Error) as caught:
        connected.pread(512, 1 << 20)
    assert caught.value.string.startswith("nbd_pread: read: command failed: ")
    connected.set_strict_mode(0)
    with pytest.raises(nbd.Error, match="flags: invalid value for flag: 0x10000"):
        connected.pread(512, 0, 0x10000)
    connected.set_strict_mode(nbd.STRICT_MASK)
    with pytest.raises(nbd.Error) as caught:
        connected.pread(512, 1 << 20)
    assert "command failed" not in caught.value.string


# ---------------------------------------------------------------------------------------------- results


def test_results_have_libnbds_types(connected):
    assert type(connected.pread(512, 0)) is bytearray
    assert connected.pwrite(b"abc", 0) is None
    assert connected.can_flush() is True
    assert connected.is_read_only() is False
    assert connected.get_size() == 1 << 20
    assert type(connected.get_block_size(0)) is int
    assert connected.get_block_size(nbd.SIZE_PAYLOAD) >= 1 << 20
    assert connected.get_protocol() == "newstyle-fixed"
    assert connected.get_tls_negotiated() is False
    assert connected.get_structured_replies_negotiated() is True
    assert connected.can_meta_context("base:allocation") is True
    assert connected.can_meta_context("other:context") is False
    assert connected.get_handshake_flags() == 3


def test_pwrite_takes_any_bytes_and_pread_finds_them(connected):
    for offset, data in enumerate((b"abcd", bytearray(b"efgh"), memoryview(b"ijkl"), array.array("I", [1]))):
        connected.pwrite(data, offset * 4)
    assert connected.pread(12, 0) == b"abcdefghijkl"


def test_text_that_the_server_did_not_give_is_an_error(connected):
    for call in (connected.get_canonical_export_name, connected.get_export_description):
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errno == "ENOTSUP"


def test_settings_start_as_libnbds_do(handles, monkeypatch):
    monkeypatch.delenv("LIBNBD_DEBUG", raising=False)
    handle = handles()
    assert [
        handle.get_export_name(),
        handle.get_full_info(),
        handle.get_request_block_size(),
        handle.get_request_structured_replies(),
        handle.get_request_extended_headers(),
        handle.get_request_meta_context(),
        handle.get_handshake_flags(),
        handle.get_strict_mode(),
        handle.get_pread_initialize(),
        handle.get_opt_mode(),
        handle.get_tls(),
        handle.get_tls_verify_peer(),
        handle.get_tls_hostname(),
        handle.get_nr_meta_contexts(),
        handle.get_socket_activation_name(),
        handle.get_debug(),
        handle.get_keepalive(),
        handle.get_private_data(),
    ] == ["", False, True, True, True, True, 3, 127, True, False, 0, True, "", 0, "", False, False, 0]


def test_private_data_keeps_the_low_32_bits(handles):
    handle = handles()
    assert handle.set_private_data(5) == 0
    assert handle.set_private_data(-1) == 5
    assert handle.get_private_data() == 0xFFFFFFFF


def test_traffic_is_counted_as_libnbd_does(connected):
    before = connected.stats_chunks_sent(), connected.stats_chunks_received()
    assert before[1] == 1  # the greeting
    connected.pread(512, 0)
    connected.flush()
    assert (connected.stats_chunks_sent(), connected.stats_chunks_received()) == (before[0] + 2, 3)
    assert connected.stats_bytes_received() > 512
    assert connected.stats_bytes_sent() > 16


# ---------------------------------------------------------------------------------------------- buffers


def test_buffer_is_zero_until_it_is_read_into(connected):
    buffer = nbd.Buffer(512)
    assert (len(buffer), buffer.size(), buffer.is_zero()) == (512, 512, True)
    connected.pwrite(b"x" * 512, 0)
    connected.aio_pread(buffer, 0, lambda _: 1)
    while connected.aio_in_flight():
        connected.poll(-1)
    assert buffer.to_bytearray() == b"x" * 512
    assert not buffer.is_zero(0, 1)


def test_buffer_shares_or_copies_as_asked():
    memory = bytearray(b"abcd")
    shared, copied = nbd.Buffer.from_buffer(memory), nbd.Buffer.from_bytearray(memory)
    memory[0] = 0
    assert shared.to_buffer() is memory
    assert (shared.to_bytearray(), copied.to_bytearray()) == (b"\0bcd", b"abcd")
    assert nbd.Buffer.from_bytearray(3).to_bytearray() == bytes(3)
    with pytest.raises(TypeError):
        nbd.Buffer.from_buffer(3)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (5, -1), (0, 5), (2, 3), (0, -2)])
def test_range_outside_a_buffer_is_an_index_error(offset, size):
    with pytest.raises(IndexError):
        nbd.Buffer(4).is_zero(offset, size)


def test_no_bytes_are_zero_wherever_they_are():
    assert nbd.Buffer(4).is_zero(99, 0) is True
    assert nbd.Buffer.from_buffer(b"\0a").is_zero(0, 1) is True
    assert nbd.Buffer.from_buffer(b"\0a").is_zero(1) is False


# ---------------------------------------------------------------------------------------------- handles


def test_with_block_closes_the_handle_also_when_it_fails(server):
    with nbd.nbd() as handle:
        handle.connect_tcp("127.0.0.1", server)
    with pytest.raises(nbd.ClosedHandle):
        handle.get_size()
    with pytest.raises(nbd.Error, match="invalid state"), nbd.nbd() as handle:
        handle.pread(1, 0)
    with pytest.raises(nbd.ClosedHandle):
        handle.get_size()
    with pytest.raises(nbd.ClosedHandle), nbd.nbd() as handle:
        handle.close()


def test_last_reference_that_goes_closes_the_connection(server):
    handle = nbd.NBD()
    handle.connect_tcp("127.0.0.1", server)
    told = []
    handle.aio_pread(bytearray(512), 0, lambda error: told.append(error.value))
    gone = weakref.ref(handle)
    gc.disable()
    try:
        del handle
        assert gone() is None
    finally:
        gc.enable()
    assert told == [errno.ENOTCONN]


def test_socket_that_is_no_connected_stream_is_refused_and_closed(handles):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with pytest.raises(nbd.Error):
        handles().connect_socket(sock.detach())
    with pytest.raises(nbd.Error):
        handles().connect_socket(socket.socket().detach())


def test_debug_messages_name_the_call(connected, capsys):
    seen = []
    connected.set_debug_callback(lambda *message: seen.append(message))
    connected.pread(512, 0)
    assert seen == []
    connected.set_debug(True)
    connected.pread(512, 0)
    with pytest.raises(nbd.Error):
        connected.pread(512, 1 << 40)
    assert ("nbd_pread", "enter: count=512 offset=0 flags=0") in seen
    assert seen[-1][1].startswith('leave: error="nbd_pread: ')
    connected.clear_debug_callback()
    connected.flush()
    assert f"libnbd: debug: {connected.get_handle_name()}: nbd_flush: enter: flags=0\n" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("yes", False), ("", False)])
def test_environment_turns_debug_on_with_exactly_1(value, wanted, monkeypatch, handles):
    monkeypatch.setenv("LIBNBD_DEBUG", value)
    handle = handles()
    handle.set_debug_callback(lambda *_: None)
    assert handle.get_debug() is wanted


def test_a_buffer_has_items_slices_and_an_iterator():
    buffer = nbd.Buffer.from_bytearray(b"abcd")
    assert (buffer[0], buffer[-1], buffer[1:3], bytes(buffer), list(buffer)) == (97, 100, bytearray(b"bc"), b"abcd", [*b"abcd"])
    buffer[0], buffer[2:4] = 65, b"CD"
    assert bytes(buffer) == b"AbCD"
    with pytest.raises(IndexError):
        buffer[4]


def test_what_is_put_into_a_new_buffer_stays_in_it():
    buffer = nbd.Buffer(4)
    buffer[1] = 1
    assert not buffer.is_zero()
    assert bytes(buffer) == bytes([0, 1, 0, 0])


def test_nbd_port_in_a_uri_comes_before_the_port_of_the_authority(handles):
    with Server(MemoryDisk(1 << 20)) as server:
        port = server.listen("tcp", host="127.0.0.1", port=0).address.port
        handle = handles()
        handle.connect_uri(f"nbd://127.0.0.1:1/?nbd-port={port}")
        assert handle.get_size() == 1 << 20


@pytest.mark.parametrize("port", ["", "-1", "x", "99999999999", "65536"])
def test_nbd_port_that_is_no_port_is_refused(handles, port):
    with pytest.raises(nbd.Error) as caught:
        handles().connect_uri(f"nbd://127.0.0.1:1/?nbd-port={port}")
    assert caught.value.errnum == errno.EINVAL


@pytest.mark.parametrize(
    ("use", "there"),
    [
        (lambda h, b: h.aio_pread(b, 0), True),
        (lambda h, b: h.aio_pread_structured(b, 0, lambda *_: 0), True),
        (lambda h, b: h.aio_pwrite(b, 0), True),
        (lambda h, b: h.aio_pread(b, 1 << 40), True),
        (lambda _, b: b.to_buffer(), True),
        (lambda _, b: b.__setitem__(0, 1), True),
        (lambda _, b: (b.to_bytearray(), b.is_zero(), b.size(), len(b), b[0], bytes(b)), False),
    ],
)
def test_buffer_has_init_once_its_memory_was_given_to_somebody(use, there, connected):
    """Programs look at this attribute, private though it is, to know whether a buffer holds anything."""
    buffer = nbd.Buffer(512)
    assert not hasattr(buffer, "_init")
    with contextlib.suppress(nbd.Error, TypeError):
        use(connected, buffer)
    assert getattr(buffer, "_init", False) is there


@pytest.mark.parametrize("make", [nbd.Buffer.from_buffer, nbd.Buffer.from_bytearray])
def test_buffer_of_a_programs_own_bytes_has_init(make):
    assert make(bytearray(4))._init is True
