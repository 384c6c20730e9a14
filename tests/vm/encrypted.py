"""What test_tls.py has the guest do: nbdcore's own client over vsock, with TLS, to a server that is not up yet."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbdcore
from nbdcore.streams.tls.starting import client_starter

#: Bytes that are read, from the disk's beginning.
READ = 512
#: Seconds that connecting may take: the processor is emulated.
PATIENCE = 30.0
#: And a single attempt.
ATTEMPT = 5.0


def prepare() -> None:
    """Load what the first TLS handshake would: in the agent, once for all calls."""
    nbdcore.supports_vsock()
    client_starter(nbdcore.TLS())


def reads(cid: int, port: int, *, trusted: str, hostname: str | None = None) -> str:
    """Wait for the server, connect, read. `trusted` is the certificate of a CA, in PEM form."""
    with tempfile.TemporaryDirectory() as folder:
        ca = Path(folder, "ca-cert.pem")
        ca.write_text(trusted)
        tls = nbdcore.TLS(ca=ca, hostname=hostname)
        # The vsock device may lose an attempt to reach nobody, which then gets no answer: such a one is made again.
        with nbdcore.connect_vsock(cid, port, tls=tls, timeout=ATTEMPT, wait=PATIENCE) as disk:
            if not disk.tls:
                raise AssertionError("the connection is not encrypted")
            return disk.pread(READ, 0, timeout=PATIENCE).hex()


def refusal(cid: int, port: int, *, trusted: str, hostname: str | None = None) -> str:
    """Connect in vain, and return why."""
    try:
        reads(cid, port, trusted=trusted, hostname=hostname)
    except nbdcore.TLSError as error:
        return str(error)
    raise AssertionError("the server was accepted")
