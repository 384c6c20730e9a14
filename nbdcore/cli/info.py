"""`nbdcore info`: what a server says of itself and its disks. It is nbdinfo, word for word where scripts read it.

Questions are asked in `nbdcore.cli.inquiry` and `nbdcore.cli.parts`; `nbdcore.cli.facts` has text and JSON. Nothing is printed
before all is known, but for a list as text, which may be long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

import nbdcore
from nbdcore import DeadlineExceeded, Disconnected, Export, NegotiationError, ProtocolViolation, UsageError
from nbdcore.cli.access import Access, DiskType, Place, with_access
from nbdcore.cli.inquiry import Inquiry, hinted
from nbdcore.cli.options import GetoptCommand, with_color
from nbdcore.cli.output import Failure, described, pour, say, warn
from nbdcore.cli.sizes import parsed
from nbdcore.cli.spellings import SpelledOption

if TYPE_CHECKING:
    from nbdcore.disk.maps import DiskMap

__all__ = ["info"]

_NEGATIONS = ("--can-not", "--cant", "--hasnot", "--has-not", "--havent", "--havenot", "--have-not", "--isnot", "--is-not")


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the command line asks for, options of access aside; the names are those of the options."""

    as_json: bool
    list_all: bool
    only_size: bool
    only_uri: bool
    has: str | None
    lacks: str | None
    contexts: tuple[str, ...]
    totals: bool
    offset: int | None
    length: int | None
    content: bool
    no_content: bool

    def check(self) -> None:
        """Raise click.UsageError for options that contradict each other."""
        modes = {
            "--can": self.has is not None or self.lacks is not None,
            "--list": self.list_all,
            "--map": bool(self.contexts),
            "--size": self.only_size,
            "--uri": self.only_uri,
        }
        if sum(modes.values()) > 1:
            raise click.UsageError(f"you cannot use {' and '.join(name for name, used in modes.items() if used)} together.")
        if self.has is not None and self.lacks is not None:
            raise click.UsageError("you cannot test two features at once.")
        if self.content and self.no_content:
            raise click.UsageError("you cannot use --content and --no-content together.")
        if not self.contexts and (self.totals or self.offset is not None or self.length is not None):
            raise click.UsageError("you must use --totals, --offset and --length only with --map option.")


@click.command(cls=GetoptCommand, short_help="Describe a disk, or all that a server has.")
@click.argument("disk", type=DiskType())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the keys of nbdinfo --json.")
@click.option("--size", "only_size", is_flag=True, help="Print the size in bytes, and nothing else.")
@click.option("--uri", "only_uri", is_flag=True, help="Print the URI, in its plain form, and nothing else.")
@click.option(
    "--is", "--can", "--has", "has", cls=SpelledOption, spellings=["--have"], metavar="FEATURE",
    help="Print nothing. The exit status is 0 if the disk has the feature, 2 if not, and 1 for an error.",
)  # fmt: skip
@click.option(
    "--isnt", "--cannot", "--hasnt", "lacks", cls=SpelledOption, spellings=_NEGATIONS, metavar="FEATURE",
    help="The other way round: 2 if it has the feature, 0 if not, and 1 for an error all the same.",
)  # fmt: skip
@click.option(
    "--map", "contexts", cls=SpelledOption, is_flag=False, flag_value=nbdcore.BASE_ALLOCATION, multiple=True,
    metavar="[=CONTEXT]",
    help="Print which parts are data and which are holes; or what another metadata context says, such as "
    "--map=qemu:dirty-bitmap:NAME. With several, each line tells of all.",
)  # fmt: skip
@click.option("--totals", cls=SpelledOption, spellings=["--total"], is_flag=True, help="Sum the map up.")
@click.option("--offset", type=parsed, metavar="SIZE", help="Where the map begins: 512M, 1G.")
@click.option("--length", type=parsed, metavar="SIZE", help="How much of the disk the map covers.")
@click.option("--list", "-L", "list_all", is_flag=True, help="Describe all the disks of the server, whichever URI names.")
@click.option("--content", is_flag=True, help="With --list too, tell what seems to be on each disk, by its first bytes.")
@click.option("--no-content", is_flag=True, help="Read no byte of the disk.")
@with_color
@with_access
@click.version_option(nbdcore.__version__, "-V", "--version", prog_name="nbdcore", message="%(prog)s %(version)s")
def info(disk: Place, *, access: Access, **options: Any) -> None:
    """Describe the disk that DISK names (NBD calls it an export): its size, what is on it, and what the server can do with it.

    The options and the words are those of the program nbdinfo; the page "Command line" of the documentation explains each.

    \b
    nbdcore info nbd://localhost/
    nbdcore info 'nbd+unix:///EXPORT?socket=PATH' --map --totals
    nbdcore info nbd+vsock://2:10809/ --json
    nbdcore info nbds://disks.example/ --tls-certificates pki
    nbdcore info --can trim [ nbdkit memory 1G ]
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    wish = _Wish(**options)
    wish.check()
    if wish.contexts:
        _print_map(disk, access, wish)
        return
    with Inquiry(disk, access) as inquiry:
        if wish.has is not None or wish.lacks is not None:
            _test(inquiry, wish)
        elif wish.only_size:
            _print_size(inquiry)
        elif wish.only_uri:
            _print_uri(inquiry, wish)
        elif wish.list_all:
            _describe_all(inquiry, wish)
        else:
            _describe_one(inquiry, wish)


def _test(inquiry: Inquiry, wish: _Wish) -> None:
    """End with the exit status that answers."""
    from nbdcore.cli.features import feature

    wanted = feature(wish.has if wish.has is not None else str(wish.lacks))
    with hinted():
        client = inquiry.asked(inquiry.chosen) if wanted.of_disk else inquiry.connection()
    if wanted.holds(client) is (wish.has is None):
        raise click.exceptions.Exit(2)


def _print_size(inquiry: Inquiry) -> None:
    with hinted():
        client = inquiry.asked(inquiry.chosen)
    try:
        say(str(client.size))
    except UsageError as error:
        raise Failure("the export claims more bytes than can be addressed") from error


def _print_uri(inquiry: Inquiry, wish: _Wish) -> None:
    from nbdcore.cli.facts import quoted

    with hinted():
        uri = inquiry.uri(inquiry.asked(inquiry.chosen).export_name)
    if uri is None:
        raise Failure("--uri: a server that is started for this command has no URI")
    say(quoted(uri) if wish.as_json else uri)


def _print_map(disk: Place, access: Access, wish: _Wish) -> None:
    from nbdcore.cli import parts

    def taken(pieces: Iterator[DiskMap]) -> list[str]:
        """Put into words what is known while the server is asked for more; all is there before any of it is printed."""
        if wish.totals:
            return [parts.totals_as_json(pieces) if wish.as_json else parts.totals_as_text(pieces)]
        return list(parts.as_json(pieces) if wish.as_json else parts.as_text(pieces))

    texts = parts.read(access, disk, wish.contexts, taken, option="--map", offset=wish.offset or 0, count=wish.length)
    if any(texts):
        pour(texts)


def _describe_one(inquiry: Inquiry, wish: _Wish) -> None:
    from nbdcore.cli.facts import as_json, as_text, headline, member

    with hinted():
        facts = inquiry.facts(inquiry.chosen, content=not wish.no_content)
    say(as_json(inquiry.server, [member(facts)]) if wish.as_json else f"{headline(inquiry.server)}\n{as_text(facts)}")


def _describe_all(inquiry: Inquiry, wish: _Wish) -> None:
    """Describe what can be described. An export that cannot be is a line on standard error, and the exit status 1."""
    from nbdcore.cli.facts import as_json, as_text, headline, member

    exports = inquiry.exports()
    members: list[str] = []
    failed = False
    if not wish.as_json:
        say(headline(inquiry.server))
    for export in exports:
        inquiry.connection()  # where there is none any more, all the others are lost too
        try:
            facts = inquiry.facts(export.name, export.description, content=wish.content)
        except (NegotiationError, Disconnected, ProtocolViolation, DeadlineExceeded, UsageError) as error:
            _tell_of_failure(export, error)
            failed = True
            continue
        if wish.as_json:
            members.append(member(facts))
        else:
            say(as_text(facts))
    if wish.as_json:
        say(as_json(inquiry.server, members))
    elif not exports:
        warn("the server lists no exports")
    if failed:
        raise click.exceptions.Exit(1)


def _tell_of_failure(export: Export, error: nbdcore.Error) -> None:
    # A refusal names the export itself.
    warn(described(error) if isinstance(error, NegotiationError) else f"export {export.name!r}: {described(error)}")
