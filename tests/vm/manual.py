"""What test_libnbd.py has the guest do: the program of libnbd's manual page for `connect_vsock`, and its asynchronous sister.

They are written as for libnbd's own module, and know nothing else of nbdcore.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nbdcore.libnbd as nbd
from tests.vm.checks import COMMAND, STEP

#: Bytes that a program reads from the disk's beginning.
READ = 512


def prepare() -> None:
    """Load what the first TLS handshake, and the first look for a transport, would: in the agent, once for all calls."""
    handle = nbd.NBD()
    handle.supports_tls()
    handle.supports_vsock()
    import nbdcore.streams.tls.contexts  # noqa: F401


def reads(cid: int, port: int, *, opt_mode: bool, trusted: str | None = None, hostname: str | None = None) -> str:
    """Connect, read, close. `trusted` is the certificate of a CA, in PEM form, which makes TLS required."""
    with tempfile.TemporaryDirectory() as folder:
        handle = nbd.NBD()
        _require_tls(handle, folder, trusted, hostname)
        handle.set_opt_mode(opt_mode)
        handle.connect_vsock(cid, port)
        if opt_mode:
            handle.opt_go()
        _check_tls(handle, trusted)
        data = handle.pread(READ, 0)
        handle.close()
    return data.hex()


def reads_by_polling(cid: int, port: int, *, opt_mode: bool, trusted: str | None = None) -> str:
    """Do what `reads` does, and never wait but in `poll`."""
    with tempfile.TemporaryDirectory() as folder:
        handle = nbd.NBD()
        _require_tls(handle, folder, trusted, None)
        handle.set_opt_mode(opt_mode)
        handle.aio_connect_vsock(cid, port)
        while handle.aio_is_connecting():
            handle.poll(-1)
        if opt_mode:
            handle.aio_opt_go()
            while handle.aio_is_connecting():
                handle.poll(-1)
        _check_tls(handle, trusted)
        buffer = nbd.Buffer(READ)
        cookie = handle.aio_pread(buffer, 0)
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
        handle.close()
    return buffer.to_bytearray().hex()


def refusal(cid: int, port: int, **how: Any) -> str:
    """Return why `reads` fails."""
    try:
        reads(cid, port, opt_mode=False, **how)
    except nbd.Error as error:
        return error.string
    raise AssertionError("it succeeded")


def demonstrates() -> str:
    """Return what the demo prints. Between an emulated processor's client and server it may take its time."""
    shown = subprocess.run([COMMAND, "demo"], check=False, capture_output=True, text=True, timeout=2 * STEP)
    return f"{shown.stdout}{shown.stderr}"


def _require_tls(handle: nbd.NBD, folder: str, trusted: str | None, hostname: str | None) -> None:
    if trusted is None:
        return
    Path(folder, "ca-cert.pem").write_text(trusted)
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_certificates(folder)
    if hostname is not None:
        handle.set_tls_hostname(hostname)


def _check_tls(handle: nbd.NBD, trusted: str | None) -> None:
    if handle.get_tls_negotiated() is not (trusted is not None):
        raise AssertionError(f"TLS is on: {handle.get_tls_negotiated()}")
