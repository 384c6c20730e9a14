"""Run by tests: `strangers.py TRANSPORT ARGUMENT...` is the command, with a third party's transport in addition to nbdcore's own.

honest     a TCP transport under another name
liar       as honest, but a bit of every large piece that it receives is another
clumsy     as honest, but it cannot connect, in a way that no contract foresees
homeless   has no address to listen at unless it is told one
caller     can connect, but not listen
broken     is no transport at all
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from nbdcore.cli import main
from nbdcore.plugins.registry import registry
from nbdcore.plugins.spec import Transport, hookimpl
from nbdcore.streams.base import Stream
from nbdcore.uri import format_uri
from nbdcore_tcp import TCPAddress, TCPTransport

NAME = sys.argv.pop(1)


@dataclass(frozen=True, slots=True)
class Address(TCPAddress):
    def uri(self, export=""):
        return format_uri(f"nbd+{NAME}", host=self.host, port=self.port, export=export)


class Honest(TCPTransport):
    name = NAME
    schemes = (f"nbd+{NAME}",)

    def address(self, **parts):
        return Address(**parts)

    def listening_address(self, **parts):
        return self.address(**{"host": "127.0.0.1", "port": 0, **parts})

    def parse(self, uri):
        return Address(uri.host, uri.port)


class LyingStream(Stream):
    def __init__(self, real):
        self.real = real

    def recv_into(self, room):
        count = self.real.recv_into(room)
        if count and count > 10_000:
            room[count - 1] ^= 1
        return count

    def send(self, parts):
        return self.real.send(parts)

    def fileno(self):
        return self.real.fileno()

    def finish_sending(self):
        return self.real.finish_sending()

    def close(self):
        self.real.close()


class Liar(Honest):
    def connect(self, address, *, timeout=None):
        return LyingStream((yield from super().connect(address, timeout=timeout)))


class Clumsy(Honest):
    def connect(self, address, *, timeout=None):
        raise ZeroDivisionError(f"cannot divide {address} by {timeout}")


class Homeless(Honest):
    def listening_address(self, *, street):
        return self.address(host=street)


class Caller(Honest):
    listen = Transport.listen


TRANSPORTS = {"honest": Honest, "liar": Liar, "clumsy": Clumsy, "homeless": Homeless, "caller": Caller}


class Plugin:
    @hookimpl
    def nbdcore_transports(self) -> Iterable[Transport]:
        return (TRANSPORTS[NAME](),)


registry.register(Plugin() if NAME in TRANSPORTS else object(), name=NAME)

if __name__ == "__main__":
    sys.exit(main())
