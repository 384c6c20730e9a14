"""Which transports exist here, and for each one that does not load, why.

Nothing happens at import. The first question (`supports`, `get`, `for_uri`, `statuses`) scans the entry points of the group
`nbdcore.transports`, and only then are pluggy and the plugins themselves imported. Each plugin is loaded by itself: whatever one
does, the others load. What became of it is kept as data (TransportStatus) for error messages and for `nbdcore transports`.

The order is always the same, whatever the file system says: plugins that the program registered itself, then nbdcore's own, then
everybody else's by entry-point name and distribution. The first to claim a name or a URI scheme keeps it, so that installing a
package never changes what `nbd://` means; the later one is a conflict, and said so.

A plugin must not ask the registry anything while it is being imported: the answer does not exist yet.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdcore.errors import TransportUnavailable, printable
from nbdcore.plugins.announced import announced_plugins
from nbdcore.plugins.loading import Plugin, State, TransportStatus, attempt
from nbdcore.uri import URI

if TYPE_CHECKING:
    from nbdcore.plugins.spec import Transport

__all__ = [
    "BLOCK_VARIABLE",
    "Registry",
    "State",
    "TransportStatus",
    "TransportWarning",
    "registry",
    "supports",
    "supports_tcp",
    "supports_unix",
    "supports_vsock",
]

#: Environment variable: names of transports, separated by commas, whose plugins are not even imported.
BLOCK_VARIABLE = "NBDCORE_BLOCK_TRANSPORTS"

_OWN_DISTRIBUTION = "nbdcore"


class TransportWarning(RuntimeWarning):
    """A transport plugin is broken or clashes with another one. Said once, when plugins are loaded; nothing else is affected."""


class Registry:
    """The transports of this process. Safe to use from several threads, and in a child after a fork.

    Programs share `nbdcore.plugins.registry.registry`; another Registry scans for itself.
    """

    def __init__(self) -> None:
        self._registered: list[Plugin] = []
        self._blocked: dict[str, str] = {}
        self._loaded: _Loaded | None = None
        self._lock = threading.RLock()
        self._scanning = False
        _REGISTRIES.add(self)

    def supports(self, name: str) -> bool:
        """Tell whether the plugin of that name loaded. Whether anything answers on the other side is another question."""
        return name in self._scanned().transports

    def get(self, name: str) -> Transport:
        """Return the transport of that name. Raises TransportUnavailable (ENOTSUP) with the plugin's own reason."""
        loaded = self._scanned()
        transport = loaded.transports.get(name)
        if transport is None:
            raise TransportUnavailable(loaded.why_not(name))
        return transport

    def for_uri(self, uri: URI) -> Transport:
        """Return the transport that answers to a URI's scheme.

        Raises TransportUnavailable (ENOTSUP) where no loaded one does, and UsageError for a query parameter that neither the
        transport nor nbdcore knows.
        """
        loaded = self._scanned()
        transport = loaded.schemes.get(uri.transport_scheme)
        if transport is None:
            raise TransportUnavailable(loaded.why_no_scheme(uri.transport_scheme))
        uri.check_parameters(transport.parameters)
        return transport

    @property
    def scanned(self) -> bool:
        """Whether the plugins have been looked for, which takes some tens of milliseconds and happens by itself when needed."""
        return self._loaded is not None

    def statuses(self) -> tuple[TransportStatus, ...]:
        """Return what became of every plugin, by name; loaded or not."""
        return tuple(sorted(self._scanned().statuses, key=lambda status: (status.name, status.distribution, status.module)))

    def block(self, name: str) -> None:
        """Forbid a transport in this process: before the first question it is not even imported; later it is taken back."""
        with self._lock:
            self._blocked[name] = "blocked by this program"
            if self._loaded is not None:
                self._loaded.withdraw(name, self._blocked[name])

    def register(self, plugin: object, *, name: str) -> None:
        """Add a plugin that no entry point announces, as frozen programs need.

        `plugin` is a module, an object with the hook, or a module's dotted name. Give the name where the import may fail on some
        platform: it happens with the others', and the reason is kept. What became of it is told by `statuses`.
        """
        with self._lock:
            self._registered.append(Plugin.given(plugin, name))
            if self._loaded is None:
                return
            complaints = self._loaded.add(self._registered[-1], self._blocked)
        _warn(complaints, stacklevel=3)

    def _scanned(self) -> _Loaded:
        if self._loaded is not None:
            return self._loaded
        with self._lock:
            if self._loaded is not None:
                return self._loaded
            if self._scanning:
                raise RuntimeError("a transport plugin may not ask the registry for transports while it is being loaded")
            self._scanning = True
            try:
                loaded, complaints = self._scan()
                self._loaded = loaded
            finally:
                self._scanning = False
        _warn(complaints, stacklevel=4)  # the caller of the public method
        return loaded

    def _scan(self) -> tuple[_Loaded, list[str]]:
        loaded = _Loaded()
        for name in os.environ.get(BLOCK_VARIABLE, "").split(","):
            if name.strip():
                self._blocked[name.strip()] = f"blocked by the environment variable {BLOCK_VARIABLE}"
        complaints: list[str] = []
        given = {(plugin.name, plugin.module) for plugin in self._registered}  # announced as well, these are no conflict
        announced = [plugin for plugin in announced_plugins(complaints) if (plugin.name, plugin.module) not in given]
        announced.sort(key=lambda it: (it.distribution != _OWN_DISTRIBUTION, it.name, it.distribution, it.module))
        for plugin in [*self._registered, *announced]:
            complaints += loaded.add(plugin, self._blocked)
        return loaded, complaints

    def _after_fork(self) -> None:
        """Forget a lock that another thread of the parent may have held, and the scan that it was in."""
        self._lock = threading.RLock()
        self._scanning = False


class _Loaded:
    """The outcome of a scan, filled one plugin at a time."""

    def __init__(self) -> None:
        self.statuses: list[TransportStatus] = []
        self.transports: dict[str, Transport] = {}
        self.schemes: dict[str, Transport] = {}

    def add(self, plugin: Plugin, blocked: dict[str, str]) -> list[str]:
        """Load one plugin and note the outcome. Returns what is worth a warning."""
        if plugin.name in blocked:
            self.statuses.append(plugin.status(State.BLOCKED, blocked[plugin.name]))
            return []
        state, reason, transports = attempt(plugin)
        if state is not State.LOADED:
            self.statuses.append(plugin.status(state, reason))
            return [f"{plugin} {reason}; the other transports are not affected"] if state is State.FAILED else []
        return [complaint for transport in transports for complaint in self._adopt(plugin, transport, blocked)]

    def _adopt(self, plugin: Plugin, transport: Transport, blocked: dict[str, str]) -> Iterator[str]:
        status = replace(plugin.status(State.LOADED, ""), name=transport.name, schemes=transport.schemes)
        holder = self._holder(status)
        if transport.name in blocked:
            status = replace(status, state=State.BLOCKED, reason=blocked[transport.name], schemes=())
        elif holder:
            status = replace(status, state=State.CONFLICT, reason=f"{plugin} is not used: {holder}", schemes=())
            yield status.reason
        else:
            self.transports[transport.name] = transport
            self.schemes.update(dict.fromkeys(transport.schemes, transport))
        self.statuses.append(status)

    def _holder(self, wanted: TransportStatus) -> str:
        """Return who has the name or a scheme of `wanted` already, "" where nobody does."""
        for other in self.statuses:
            if other.state is not State.LOADED:
                continue
            claims = [f"the URI scheme {scheme}" for scheme in wanted.schemes if scheme in other.schemes]
            if other.name == wanted.name:
                claims.insert(0, f"the name {other.name}")
            if claims:
                source = f" of {other.distribution}" if other.distribution else ", which this program registered"
                return f"{other.module}{source} has {claims[0]} already"
        return ""

    def withdraw(self, name: str, reason: str) -> None:
        """Take a loaded transport back."""
        transport = self.transports.pop(name, None)
        self.schemes = {scheme: owner for scheme, owner in self.schemes.items() if owner is not transport}
        self.statuses = [
            replace(status, state=State.BLOCKED, reason=reason, schemes=()) if status.name == name else status
            for status in self.statuses
        ]

    def why_not(self, name: str) -> str:
        """Return the message for a transport that is not loaded."""
        mine = next((status for status in self.statuses if status.name == name), None)
        if mine is not None:
            return f"transport {name} cannot be used: {mine.reason} ({self._loaded_names()})"
        if not self.statuses:
            return (
                f"there is no transport {name}, nor any other: nbdcore's package metadata was not found. "
                "Install nbdcore with pip, or have a frozen program call registry.register()"
            )
        return f"there is no transport {printable(name)!r} ({self._loaded_names()}); if somebody publishes one: {_install(name)}"

    def why_no_scheme(self, scheme: str) -> str:
        """Return the message for a URI scheme that no loaded transport answers to."""
        name = scheme.removeprefix("nbd+")
        if not self.statuses or any(status.name == name for status in self.statuses if status.state is not State.LOADED):
            return self.why_not(name)
        known = ", ".join(sorted(self.schemes)) or "none"
        absent = "".join(f"; {s.name} is not loaded: {s.reason}" for s in self.statuses if s.state is not State.LOADED)
        hint = f"; if somebody publishes one: {_install(name)}" if scheme.startswith("nbd+") else ""
        return f"no transport answers to {scheme}:// (URI schemes known here: {known}{absent}){hint}"

    def _loaded_names(self) -> str:
        return f"loaded here: {', '.join(sorted(self.transports)) or 'none'}"


def _install(name: str) -> str:
    return f"pip install nbdcore-{printable(name)}"


def _warn(complaints: Iterable[str], *, stacklevel: int) -> None:
    # After the outcome is stored, so that even where warnings are errors the registry answers afterwards.
    for complaint in complaints:
        warnings.warn(complaint, TransportWarning, stacklevel=stacklevel)


_REGISTRIES: weakref.WeakSet[Registry] = weakref.WeakSet()


def _forget_locks() -> None:
    for each in list(_REGISTRIES):
        each._after_fork()  # noqa: SLF001 (the same module)


if hasattr(os, "register_at_fork"):  # where there is no fork there is nothing to do
    os.register_at_fork(after_in_child=_forget_locks)

#: The registry that nbdcore itself uses.
registry: Registry = Registry()


def supports(name: str) -> bool:
    """Tell whether the transport plugin of that name loaded on this platform. It promises nothing about the other side."""
    return registry.supports(name)


def supports_tcp() -> bool:
    """Tell whether the tcp transport loaded: this Python has TCP sockets. It promises no network."""
    return registry.supports("tcp")


def supports_unix() -> bool:
    """Tell whether the unix transport loaded: this Python has unix sockets."""
    return registry.supports("unix")


def supports_vsock() -> bool:
    """Tell whether the vsock transport loaded: this Python has AF_VSOCK. It promises no hypervisor, no device and no server."""
    return registry.supports("vsock")
