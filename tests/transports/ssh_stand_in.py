"""A stand-in for the program ssh, first on PATH: it notes down its arguments, and does here what the remote command says.

No other machine is contacted.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

RELAY = """
import json, os, select, shlex, socket, sys
with open(os.environ["SSH_CALLS"], "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if "broken.example" in sys.argv:
    sys.exit("ssh: Could not resolve hostname broken.example: Name or service not known")
program, *arguments = shlex.split(sys.argv[-1])
assert program == "nc"
if arguments[0] == "-U":
    server = socket.socket(socket.AF_UNIX)
    where = arguments[1]
else:
    server = socket.socket()
    where = ("127.0.0.1", int(arguments[1]))
try:
    server.connect(where)
except OSError as exc:
    sys.exit(f"nc: {exc}")
ways = {
    0: (lambda: os.read(0, 65536), server.send),
    server.fileno(): (lambda: server.recv(65536), lambda data: os.write(1, data)),
}
while ways:
    for number in select.select(list(ways), [], [])[0]:
        receive, send = ways[number]
        data = receive()
        if not data and number:
            sys.exit()
        if not data:
            del ways[number]
            server.shutdown(socket.SHUT_WR)
        while data:
            data = data[send(data) :]
"""


class StandIn:
    """What is run in place of ssh until the patches are undone."""

    def __init__(self, folder: Path, patches: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self._calls = folder / "calls"
        patches.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patches.setenv("SSH_CALLS", str(self._calls))
        program = folder / "ssh"
        program.write_text(f"#!{sys.executable} -IS\n{textwrap.dedent(RELAY)}")
        program.chmod(0o755)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []
