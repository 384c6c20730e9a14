"""`nbdcore transports`: which ways to a server exist here, and why others do not."""

from __future__ import annotations

import json
import warnings

import click
from rich.text import Text

from nbdcore.cli.output import escaped, paragraph, say, table
from nbdcore.plugins.registry import State, TransportStatus, TransportWarning, registry

__all__ = ["transports"]


@click.command(short_help="List the ways to a server that exist here.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
def transports(*, as_json: bool) -> None:
    """List the transports, the ways to reach a server, that are installed, and the beginning of the URIs for each.

    Where one cannot be used here, the reason stands below the list. "nbdcore demo" tries those that are loaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TransportWarning)  # the same is about to be printed
        statuses = registry.statuses()
    if as_json:
        say(json.dumps([_as_json(status) for status in statuses], indent=2))
        return
    if not statuses:
        say("No transports: nbdcore's package metadata was not found. Install nbdcore with pip.")
        return
    table(["transport", "state", "URIs", "package"], [_row(status) for status in statuses])
    for status in statuses:
        if status.reason:
            say("")
            paragraph(f"{escaped(status.name)}: {escaped(status.reason)}")


def _row(status: TransportStatus) -> list[str | Text]:
    package = f"{status.distribution} {status.version}".strip() or "this program"
    schemes = ", ".join(f"{scheme}://" for scheme in status.schemes) or "-"
    style = "green" if status.state is State.LOADED else "yellow"
    return [escaped(status.name), Text(status.state.value, style), escaped(schemes), escaped(package)]


def _as_json(status: TransportStatus) -> dict[str, object]:
    return {
        "name": status.name,
        "state": status.state.value,
        "schemes": list(status.schemes),
        "package": status.distribution,
        "version": status.version,
        "module": status.module,
        "reason": status.reason,
    }
