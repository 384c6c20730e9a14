"""nbdcore over a real AF_VSOCK, in a virtual machine: to its host, from its host, within it, and where that fails.

The guest's part of each test is the function of `checks` that it calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdcore
from nbdcore.server import FileDisk, MemoryDisk, Server
from nbdcore.streams.sockets import SocketStream
from tests.interop import programs
from tests.interop.servers import nbdkit, qemu_nbd
from tests.vm import checks
from tests.vm.guest import Guest

pytestmark = [pytest.mark.vm, pytest.mark.xdist_group("vm")]

NOBODY = 10999  # a port on which nobody listens
NO_SUCH_CID = 77


@pytest.fixture
def image(short_folder: Path) -> Path:
    """A file with the content that the guest expects on a disk."""
    path = short_folder / "disk"
    path.write_bytes(checks.original())
    return path


@contextlib.contextmanager
def nbdcore_server(disk: Any, path: Path) -> Iterator[None]:
    with Server(disk) as server:
        server.listen("unix", path=path)
        yield


def test_the_plugin_says_that_vsock_is_supported(guest: Guest) -> None:
    assert guest.call(checks.supports_vsock) is True


# The guest connects to CID 2, port 10809, and reads and writes a disk that a server on the host serves


def test_guest_changes_file_that_nbdkit_serves_on_the_host(guest: Guest, image: Path) -> None:
    with nbdkit("file", image) as server, guest.offer(server.path, port=10809):
        guest.call(checks.changes_the_disk, cid=2, port=10809)
    assert image.read_bytes() == checks.changed()


def test_guest_changes_memory_that_nbdkit_serves_on_the_host(guest: Guest, image: Path, short_folder: Path) -> None:
    with nbdkit("memory", str(checks.SIZE)) as server, guest.offer(server.path, port=10809):
        programs.run("nbdcopy", image, server.uri)
        guest.call(checks.changes_the_disk, cid=2, port=10809)
        programs.run("nbdcopy", server.uri, short_folder / "copy")
    assert (short_folder / "copy").read_bytes() == checks.changed()


def test_guest_changes_file_that_qemu_nbd_serves_on_the_host(guest: Guest, image: Path) -> None:
    with qemu_nbd(image) as server, guest.offer(server.path, port=10809):
        guest.call(checks.changes_the_disk, cid=2, port=10809)
    assert image.read_bytes() == checks.changed()


def test_guest_changes_file_that_nbdcore_serves_on_the_host(guest: Guest, image: Path) -> None:
    with nbdcore_server(FileDisk(image), guest.host_socket(10809)):
        guest.call(checks.changes_the_disk, cid=2, port=10809)
    assert image.read_bytes() == checks.changed()


def test_every_form_of_the_default_address_leads_to_the_host(guest: Guest) -> None:
    disk = MemoryDisk(512)
    disk.pwrite(b"hello", 0)
    with nbdcore_server(disk, guest.host_socket(10809)):
        guest.call(checks.default_address_leads_to_the_host)


def test_uri_names_a_port_of_32_bits_and_an_export(guest: Guest) -> None:
    port = 2**32 - 2  # the last one; 2^32 - 1 means any
    second = MemoryDisk(512)
    second.pwrite(b"second", 0)
    with nbdcore_server({"first disk": MemoryDisk(512), "second disk": second}, guest.host_socket(port)):
        assert guest.call(checks.export_is_chosen_by_uri, port=port) == ["first disk", "second disk"]


# The host connects to a server in the guest


def test_host_changes_disk_that_nbdcore_serves_in_the_guest(guest: Guest) -> None:
    with guest.calling(checks.serves_a_client_of_the_host, port=5000):
        stream = SocketStream(guest.connect(5000), peer="the guest's port 5000")
        with nbdcore.Client(stream, timeout=checks.STEP) as disk:
            assert disk.pread(checks.SIZE, offset=0, timeout=checks.STEP) == checks.original()
            checks.change(disk)


# Client and server in the guest, over CID 1


def test_nbdcore_talks_to_nbdcore_within_the_guest(guest: Guest) -> None:
    guest.call(checks.client_talks_to_own_server)


def test_every_front_end_talks_to_nbdcore_within_the_guest(guest: Guest) -> None:
    guest.call(checks.every_front_end_talks_to_own_server)


def test_nbdcore_talks_to_nbdkit_within_the_guest(guest: Guest) -> None:
    guest.call(checks.client_talks_to_nbdkit)


def test_nbdinfo_talks_to_nbdcore_within_the_guest(guest: Guest) -> None:
    guest.call(checks.nbdinfo_talks_to_own_server)


def test_command_serves_over_vsock(guest: Guest) -> None:
    guest.call(checks.command_serves_vsock)


# Errors


def test_kernel_without_vsock_is_named_when_connecting(refusals: dict[str, dict[str, Any]]) -> None:
    assert refusals["no module"]["errno"] == "EAFNOSUPPORT"
    assert refusals["no module"]["kind"] == "TransportError"
    assert "no vsock" in refusals["no module"]["message"]


def test_kernel_without_a_vsock_transport_is_named_when_connecting(refusals: dict[str, dict[str, Any]]) -> None:
    assert refusals["no transport"]["errno"] == "ENODEV"
    assert refusals["no transport"]["kind"] == "TransportError"
    assert "no vsock device" in refusals["no transport"]["message"]


def test_port_on_which_nothing_listens_is_reset_and_the_message_says_why(guest: Guest) -> None:
    error = guest.call(checks.refusal, cid=1, port=NOBODY)
    assert (error["kind"], error["errno"]) == ("TransportError", "ECONNRESET")
    assert f"vsock CID 1, port {NOBODY}" in error["message"]
    assert "nothing listens on that port" in error["message"]


def test_short_timeout_ends_connecting_to_a_cid_that_does_not_exist(guest: Guest) -> None:
    error = guest.call(checks.refusal, cid=NO_SUCH_CID, port=10809, timeout=0.2)
    assert (error["kind"], error["errno"]) == ("DeadlineExceeded", "ETIMEDOUT")
    assert f"vsock CID {NO_SUCH_CID}, port 10809" in error["message"]


def test_timeout_longer_than_the_kernels_own_reaches_the_kernel(guest: Guest) -> None:
    # The kernel's own 2 seconds would end it before, as a TransportError.
    error = guest.call(checks.refusal, cid=NO_SUCH_CID, port=10809, timeout=3)
    assert (error["kind"], error["errno"]) == ("DeadlineExceeded", "ETIMEDOUT")


def test_kernel_that_gives_up_connecting_says_that_the_peer_does_not_answer(guest: Guest) -> None:
    error = guest.call(checks.refusal_by_the_kernel, cid=NO_SUCH_CID, port=10809, timeout=0)
    assert (error["kind"], error["errno"]) == ("TransportError", "ETIMEDOUT")
    assert "not up" in error["message"]


def test_port_on_which_another_server_listens_is_refused(guest: Guest) -> None:
    error = guest.call(checks.listening_twice_is_refused)
    assert (error["kind"], error["errno"]) == ("TransportError", "EADDRINUSE")
    assert "another server listens on that port" in error["message"]


def test_serving_on_a_privileged_port_without_privilege_is_one_clear_line(guest: Guest) -> None:
    ended = guest.call(checks.serving_on_a_privileged_port_is_refused)
    assert (ended["status"], ended["output"]) == (1, "")
    assert "port 1023" in ended["errors"]
    assert "ports below 1024 need privileges" in ended["errors"]
    assert ended["errors"].count("\n") == 1


def test_server_that_dies_in_the_middle_of_a_read_ends_it_with_one_error(guest: Guest) -> None:
    errors = guest.call(checks.server_dies_in_the_middle_of_a_read)
    assert errors["first"]["kind"] == "Disconnected"
    assert errors["second"]["kind"] in ("Disconnected", "UsageError")
