"""`nbdcore demo`: what works on this machine, shown by doing it. Its trials are in `nbdcore.cli.trial`.

Everything happens inside this process and this machine: TCP on 127.0.0.1, a unix socket in a folder of its own, vsock on CID 1,
which is this machine itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from nbdcore import Error
from nbdcore.cli.output import Failure, described, escaped, paragraph, say, table
from nbdcore.cli.sizes import rounded
from nbdcore.cli.trial import SIZE, Outcome, pattern, run_trial
from nbdcore.disk import copy
from nbdcore.plugins.registry import State, TransportStatus, registry
from nbdcore.plugins.spec import Transport
from nbdcore.server import MemoryDisk, Server

__all__ = ["demo"]

# Seconds that all measuring may take, on however many transports, of the five that a demo may.
_MEASURING = 3.0
# The longest that one thing is measured; longer would tell no more.
_MOMENT = 0.3
# Why nothing can be served over a transport, in words for who has never used it.
_ONLY_CONNECTING = {
    "command": "it starts a server program that you name, such as nbdkit, and connects to it: nothing can be served over it",
    "ssh": "it connects to servers on other machines, which it reaches with the program ssh: nothing can be served over it",
}
# The kernel's own words are about addresses; what a user can do is another matter.
_VSOCK_HINT = (
    ". vsock joins a virtual machine and its host, and may work between those all the same. "
    "To try it within this machine, load the kernel's module for that, as root: modprobe vsock_loopback"
)
# Which transports a disk is copied over, if they were found right: the first that is there.
_OURS = ("tcp", "unix")
# Where its data are, in bytes.
_DATA = 8 << 20
# Seconds that connecting to our own server may take.
_COPYING = 5.0
_NUMBERS = ("disk", "compared", "extents", "write", "read", "4 KiB reads")


@click.command(short_help="Show what works on this machine.")
def demo() -> None:
    """Try every transport, which is a way to reach a server, on this machine: serve a disk, use it, and check every byte.

    Takes a few seconds, needs nothing, and leaves nothing behind. The exit status is 0 if all that could be tried was right.
    """
    with tempfile.TemporaryDirectory(prefix="nbdcore-demo-") as folder:
        paragraph(
            f"For each transport, which is a way to reach a server, nbdcore serves a disk of {SIZE >> 20} MiB in memory, "
            "connects to it as a client, writes, reads back and compares, and asks which parts (extents) of the disk hold data."
        )
        say("")
        outcomes = _try_all(Path(folder))
        copied = _copy(outcomes, Path(folder))
    tried = [outcome for outcome in outcomes if not outcome.reason]
    if tried:
        table(["transport", "result", *_NUMBERS], [_row(outcome) for outcome in tried], numbers=_NUMBERS)
        say("")
    for outcome in outcomes:
        if outcome.reason or outcome.fault:
            paragraph(f"{escaped(outcome.transport)} {'is wrong' if outcome.fault else 'was not tried'}: {_why(outcome)}")
            say("")
    _conclude(tried, copied)


def _try_all(folder: Path) -> list[Outcome]:
    statuses = registry.statuses()
    data = pattern()
    loaded = sum(status.state is State.LOADED for status in statuses)
    moment = min(_MOMENT, _MEASURING / (3 * max(loaded, 1)))
    return [_try(status, folder, data, moment) for status in statuses]


def _copy(outcomes: list[Outcome], folder: Path) -> str:
    """Copy a disk to a file and compare both, over a transport that was found right. Returns what to say of it."""
    right = [outcome.transport for outcome in outcomes if not outcome.reason and not outcome.fault and outcome.transport in _OURS]
    if not right:
        return ""
    disk = MemoryDisk(SIZE)
    disk.pwrite(pattern(), _DATA)
    with Server(disk) as server:
        uri = server.uri(server.listen(right[0], **_places(folder)[right[0]]))
        try:
            result = copy(uri, folder / "copy.img", verify=True, timeout=_COPYING)
        except (OSError, Error) as error:
            return f"A disk could not be copied to a file in {folder}: {described(error)}"
    size, data = rounded(result.size), rounded(result.copied)
    return (
        f"And a disk is copied over {right[0]} to a file: of its {size}, {data} were data, which took {result.seconds:.2f} s; "
        "the rest is zero, and was not moved. Then the file was compared with the disk: every byte is the same. "
        "With a disk of your own:  nbdcore copy --verify URI FILE"
    )


def _places(folder: Path) -> dict[str, dict[str, Any]]:
    """Return where the demo serves, by transport."""
    return {
        "tcp": {"host": "127.0.0.1", "port": 0},
        "unix": {"path": folder / "socket"},
        "vsock": {"cid": 1, "port": 0},
    }


def _try(status: TransportStatus, folder: Path, data: bytes, moment: float) -> Outcome:
    if status.state is not State.LOADED:
        return Outcome(status.name, reason=status.reason)
    transport = registry.get(status.name)
    ours = _places(folder)
    if type(transport).listen is Transport.listen:
        return Outcome(status.name, reason=_ONLY_CONNECTING.get(status.name, "it connects to servers, and cannot serve"))
    if status.name not in ours:
        try:
            transport.listening_address()
        except Exception as error:  # noqa: BLE001 (a stranger's code may raise anything)
            return Outcome(status.name, reason=f"a server must be told where to listen, and the demo knows no place ({error})")
    outcome = run_trial(transport, ours.get(status.name, {}), data, moment)
    if status.name == "vsock" and outcome.reason:
        outcome.reason += _VSOCK_HINT
    return outcome


def _row(outcome: Outcome) -> list[str | Text]:
    if outcome.fault:
        return [escaped(outcome.transport), Text("WRONG", "bold red"), *("-" for _ in _NUMBERS)]
    return [
        escaped(outcome.transport),
        Text("right", "green"),
        rounded(SIZE),
        rounded(outcome.compared),
        str(outcome.extents),
        f"{outcome.writing / 1e6:,.0f} MB/s",
        f"{outcome.reading / 1e6:,.0f} MB/s",
        f"{outcome.small_reads:,.0f}/s",
    ]


def _why(outcome: Outcome) -> str:
    return escaped(outcome.fault or outcome.reason)


def _conclude(tried: list[Outcome], copied: str) -> None:
    if not tried:
        raise Failure("no transport could be tried on this machine")
    wrong = [outcome.transport for outcome in tried if outcome.fault]
    if wrong:
        raise Failure(f"the demo found a fault over {', '.join(wrong)}: please report it with the lines above")
    if copied:
        paragraph(copied)
        say("")
    paragraph("What came back was what was written, every byte of it. Serve a disk of your own next:  nbdcore serve --memory 1G")
