"""Finding transport plugins and loading one of them, whatever it does.

A plugin is somebody else's code: its import, its hook and its answers may raise anything, or be nonsense. This module turns that
into data (State, TransportStatus) and never lets it out. pluggy, importlib_metadata and the contract (`nbdcore.plugins.spec`) are
imported in the functions that need them, so that importing this module stays cheap. Which of two plugins wins is the registry's
business.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbdcore.errors import TransportUnavailable, printable
from nbdcore.uri import URI

if TYPE_CHECKING:
    import importlib_metadata

    from nbdcore.plugins.spec import Transport

__all__ = ["Plugin", "State", "TransportStatus", "announced_plugins", "attempt"]

# A line at the top of a distribution's METADATA.
_FIELD = re.compile(r"^(Name|Version): *(\S+)\s*$", re.MULTILINE)


class State(Enum):
    """What became of a plugin."""

    LOADED = "loaded"
    UNAVAILABLE = "unavailable"  # it says itself that it cannot work here, or its module is not in this build
    FAILED = "failed"  # it broke
    BLOCKED = "blocked"  # the user or the program forbade it; it was not imported
    CONFLICT = "conflict"  # another plugin has its name or one of its URI schemes


@dataclass(frozen=True, slots=True)
class TransportStatus:
    """What became of one transport.

    Attributes:
        name: what the user says: "vsock".
        state: see State; only a LOADED one can be used.
        reason: why it is not loaded, as a sentence's end; "" where it is.
        module: the plugin's module (and object, `module:object`).
        distribution: the installed package that brought it; "" where the program registered it itself.
        version: that package's version; "" where unknown.
        schemes: the URI schemes it answers to, without TLS; () where it is not loaded.
    """

    name: str
    state: State
    reason: str
    module: str
    distribution: str = ""
    version: str = ""
    schemes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin to be loaded, and where it comes from."""

    name: str
    module: str
    load: Callable[[], object]
    distribution: str = ""
    version: str = ""

    @classmethod
    def given(cls, plugin: object, name: str) -> Plugin:
        """Return the plugin that a program handed over: an object with the hook, or a module's name."""
        if isinstance(plugin, str):
            return cls(name=name, module=plugin, load=lambda: importlib.import_module(plugin))
        module = plugin.__name__ if isinstance(plugin, ModuleType) else f"{type(plugin).__module__}:{type(plugin).__qualname__}"
        return cls(name=name, module=module, load=lambda: plugin)

    @classmethod
    def announced(cls, entry_point: importlib_metadata.EntryPoint) -> Plugin:
        """Return the plugin behind an entry point."""
        distribution, version = _name_and_version(entry_point)
        return cls(entry_point.name, entry_point.value, entry_point.load, distribution, version)

    def status(self, state: State, reason: str) -> TransportStatus:
        """Return what became of this plugin."""
        return TransportStatus(self.name, state, reason, self.module, self.distribution, self.version)

    def __str__(self) -> str:
        source = f"of {self.distribution} {self.version}".rstrip() if self.distribution else "registered by this program"
        return f"transport plugin {self.name} ({self.module} {source})"


def _name_and_version(entry_point: importlib_metadata.EntryPoint) -> tuple[str, str]:
    """Return the name and version of the distribution that announced it, "" for what its metadata lacks.

    Read as lines where they can be: the library would import a parser of mail for them, 30 ms of the 200 that a command may take.
    """
    source = entry_point.dist
    if source is None:
        return "", ""
    head = (source.read_text("METADATA") or "").partition("\n\n")[0]
    known = dict(_FIELD.findall(head))
    if len(known) == 2:
        return known["Name"], known["Version"]
    return source.name or "", source.version or ""  # damaged metadata may lack them, whatever the annotations promise


def announced_plugins(complaints: list[str]) -> list[Plugin]:
    """Return the plugins that installed distributions announce, in no order; adds to `complaints` what cannot even be read.

    One distribution's broken metadata, of whatever kind, must not hide everybody else's transports. Most distributions announce
    none, which shows before anything of theirs is parsed.
    """
    import importlib_metadata

    from nbdcore.plugins.spec import GROUP

    plugins: dict[tuple[str, str], Plugin] = {}  # of two copies on sys.path the first one is the one that gets imported
    for distribution in importlib_metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            for entry_point in distribution.entry_points.select(group=GROUP):
                plugin = Plugin.announced(entry_point)
                plugins.setdefault((plugin.name, plugin.distribution), plugin)
        except Exception as error:  # noqa: BLE001 (as above, and this is the culprit)
            complaints.append(f"the entry points of distribution {_name_of(distribution)} cannot be read: {_described(error)}")
    return list(plugins.values())


def _name_of(distribution: Any) -> str:  # of a type whose name releases of importlib_metadata do not agree on
    try:
        return str(distribution.name)
    except Exception:  # noqa: BLE001 (metadata that is broken may raise anything)
        return "without a readable name"


def attempt(plugin: Plugin) -> tuple[State, str, list[Transport]]:
    """Load a plugin, whatever it does."""
    try:
        return State.LOADED, "", _transports(plugin)
    except TransportUnavailable as error:
        return State.UNAVAILABLE, printable(error.message), []
    except ModuleNotFoundError as error:
        module = plugin.module.partition(":")[0]
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return State.UNAVAILABLE, f"it is not in this build: there is no module {module}", []
        return State.FAILED, f"failed to load: it needs the module {error.name}, which is not installed", []
    except _BrokenContractError as error:
        return State.FAILED, f"breaks the contract: {error}", []
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a stranger's code may raise anything, and must harm nobody else)
        return State.FAILED, f"failed to load: {_described(error)} (python -c 'import {plugin.module.partition(':')[0]}')", []


class _BrokenContractError(Exception):
    """A plugin loaded, but is none. The message continues a sentence about it."""


def _transports(plugin: Plugin) -> list[Transport]:
    """Import a plugin, call its hook and check what it returns."""
    import pluggy

    from nbdcore.plugins.spec import PROJECT, Transport, TransportHooks

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(TransportHooks)
    manager.register(plugin.load())
    manager.check_pending()
    answers = manager.hook.nbdcore_transports()
    if not answers:
        raise _BrokenContractError("its hook nbdcore_transports (marked with hookimpl) is missing or returns nothing")
    if not isinstance(answers[0], Iterable):
        raise _BrokenContractError(f"its hook nbdcore_transports must return transports, not {printable(repr(answers[0]))}")
    transports = list(answers[0])
    for transport in transports:
        if not isinstance(transport, Transport):
            raise _BrokenContractError(f"{printable(repr(transport))} is no Transport object")
        _check_names(transport)
    if plugin.name not in (transport.name for transport in transports):
        raise _BrokenContractError(f"it has no transport named {plugin.name}, as its entry point says")
    return transports


def _check_names(transport: Transport) -> None:
    """A stranger may not have run a type checker: a bare string in place of a tuple would claim a scheme a letter."""
    name: object = getattr(transport, "name", None)
    if not isinstance(name, str) or not name:
        raise _BrokenContractError(f"its transport {printable(repr(transport))} has no name, which must be a str")
    for attribute in ("schemes", "parameters"):
        names: object = getattr(transport, attribute)
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name == name.lower() for name in names):
            raise _BrokenContractError(f"its {attribute} must be a tuple of lower-case names, not {printable(repr(names))}")
    for scheme in transport.schemes:
        if URI(scheme).tls:
            raise _BrokenContractError(f"its scheme {scheme} must be named without TLS: nbd, not nbds")


def _described(error: BaseException) -> str:
    import traceback

    return printable(traceback.format_exception_only(error)[-1].strip())
