"""Loading a transport plugin, whatever it does.

A plugin is somebody else's code: its import, its hook and its answers may raise anything, or be nonsense. This module turns that
into data (State, TransportStatus) and never lets it out. pluggy and the contract (`nbdcore.plugins.spec`) are imported in the
functions that need them, so that importing this module stays cheap. Which of two plugins wins is the registry's business.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING

from nbdcore.errors import TransportUnavailable, printable
from nbdcore.uri import URI

if TYPE_CHECKING:
    from nbdcore.plugins.spec import Transport

__all__ = ["Plugin", "State", "TransportStatus", "attempt", "described"]


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

    def status(self, state: State, reason: str) -> TransportStatus:
        """Return what became of this plugin."""
        return TransportStatus(self.name, state, reason, self.module, self.distribution, self.version)

    def __str__(self) -> str:
        source = f"of {self.distribution} {self.version}".rstrip() if self.distribution else "registered by this program"
        return f"transport plugin {self.name} ({self.module} {source})"


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
        return State.FAILED, f"failed to load: {described(error)} (python -c 'import {plugin.module.partition(':')[0]}')", []


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


def described(error: BaseException) -> str:
    """Return an exception in one line, as Python prints it."""
    import traceback

    return printable(traceback.format_exception_only(error)[-1].strip())
