"""One table of libnbd's calls: which release brought each, in which states it is permitted, and what every call has in common.

A method of NBD that is a call of libnbd's API is decorated with `call`, or with a decorator of `fast_calls`, and so gets its row
in CALLS. The documentation and the tests read that table. The decorator does what all calls share, in this order: the handle is
not closed; its lock is held; its state permits the call; any error of nbdcore leaves as libnbd's `Error`, named after the call.
Calls that libnbd promises never to block take no lock.
"""

from __future__ import annotations

import errno
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from nbdcore.clients.session.forks import in_use_when_forked
from nbdcore.errors import Error as CoreError
from nbdcore.libnbd.errors import ClosedHandle, Error, failure, translated
from nbdcore.protocol.state import Phase

if TYPE_CHECKING:
    from nbdcore.clients.polled import PolledClient
    from nbdcore.libnbd.callbacks import Callbacks

__all__ = ["ANY", "CALLS", "ELSEWHERE", "Call", "Handle", "call", "locked", "on_slow_path", "refused", "wrong_state"]

_CREATED = Phase.CREATED
CREATED = frozenset({_CREATED})
NEGOTIATING = frozenset({Phase.NEGOTIATING})
CONNECTED = frozenset({Phase.CONNECTED})
SETTING_UP = CREATED | NEGOTIATING
TALKING = NEGOTIATING | CONNECTED
KNOWN = frozenset({Phase.NEGOTIATING, Phase.CONNECTED, Phase.CLOSED})
ADDRESSED = frozenset(Phase) - CREATED
COUNTING = frozenset({Phase.CONNECTED, Phase.CLOSED, Phase.DEAD})
ANY = frozenset(Phase)

#: What libnbd calls each state in its messages, in the order in which it lists them.
_WORDS = {
    Phase.CREATED: "newly created",
    Phase.CONNECTING: "connecting",
    Phase.NEGOTIATING: "negotiating",
    Phase.CONNECTED: "connected with the server",
    Phase.CLOSED: "shut down",
    Phase.DEAD: "dead",
}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of libnbd's API.

    Attributes:
        name: as Python has it.
        first_version: the release of libnbd that brought it.
        permitted: the states in which it is permitted.
        lock_free: it neither waits for the handle's lock nor takes it.
        moves_bytes: it opens a connection, or sends or receives: a signal handler that interrupted another call must not make it.
    """

    name: str
    first_version: str
    permitted: frozenset[Phase]
    lock_free: bool = False
    moves_bytes: bool = False

    @property
    def in_order(self) -> tuple[Phase, ...]:
        """The permitted states, the commonest first: an identical one is found before any is compared, or hashed."""
        return tuple(sorted(self.permitted, key=lambda phase: phase is not Phase.CONNECTED))

    @property
    def states(self) -> str:
        """The permitted states in libnbd's words."""
        return ", or ".join(word for phase, word in _WORDS.items() if phase in self.permitted)


#: Every call that NBD has as a method, by name. Filled by `call`, and so complete once the package is imported.
CALLS: dict[str, Call] = {}

#: Calls of libnbd's C API that a Python program makes in another way, in libnbd's own module as here.
ELSEWHERE = {
    "create": "nbd.NBD()",
    "get_error": "the attribute `string` of nbd.Error",
    "get_errno": "the attributes `errnum` and `errno` of nbd.Error",
}

P = ParamSpec("P")
R = TypeVar("R")


class Handle(Protocol):
    """What the decorator needs of a handle."""

    _closed: bool
    _closing: bool
    _lock: threading.RLock
    _in_a_call: Callable[[], bool]
    _callbacks: Callbacks
    _debug: bool
    _slow_path: bool
    _lost: bool
    _client: PolledClient | None

    @property
    def _phase(self) -> Phase: ...

    @property
    def _state_name(self) -> str: ...

    def _say(self, call: str, message: str) -> None: ...

    def _hang_up(self) -> None: ...

    def _end_call(self) -> None: ...


H = TypeVar("H", bound=Handle)


def call(
    first_version: str,
    permitted: frozenset[Phase] = ANY,
    *,
    lock_free: bool = False,
    moves_bytes: bool | None = None,
    in_the_middle: Callable[..., Any] | None = None,
) -> Callable[[Callable[Concatenate[H, P], R]], Callable[Concatenate[H, P], R]]:
    """Make a method a call of libnbd's API.

    `moves_bytes`: left out, it does where only a connection permits it. `in_the_middle` is what such a call does in the middle of
    another call of its own thread, where most are refused.
    """
    moves = permitted <= TALKING if moves_bytes is None else moves_bytes

    def decorate(function: Callable[Concatenate[H, P], R]) -> Callable[Concatenate[H, P], R]:
        row = Call(function.__name__, first_version, permitted, lock_free, moves)
        CALLS[row.name] = row
        return _unlocked(row, function) if lock_free else locked(row, function, in_the_middle)

    return decorate


def locked(
    row: Call, function: Callable[Concatenate[H, P], R], in_the_middle: Callable[..., Any] | None = None
) -> Callable[Concatenate[H, P], R]:
    """Wrap a method in what calls that take the lock have in common."""
    name, permitted = f"nbd_{row.name}", row.in_order
    limited, moves_bytes = row.permitted != ANY, row.moves_bytes

    # The commonest calls take a microsecond or two altogether: nothing is asked here that one attribute does not answer.
    @functools.wraps(function)
    def wrapper(self: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if moves_bytes and self._in_a_call() and (in_the_middle or not self._callbacks.calling):
            if in_the_middle is None:
                raise refused(row, self)
            result: R = _made_in_the_middle(row, in_the_middle, self, *args, **kwargs)
            return result
        try:
            with self._lock:
                client = self._client
                if self._slow_path or (limited and (_CREATED if client is None else client.engine.phase) not in permitted):
                    return on_slow_path(row, function, self, *args, **kwargs)
                try:
                    return function(self, *args, **kwargs)
                except CoreError as exc:
                    raise translated(name, exc) from exc
                finally:
                    if self._callbacks.interruption is not None:
                        self._callbacks.interrupt()
        finally:
            if self._closing:
                self._end_call()

    return wrapper


def refused(row: Call, self: Handle) -> Exception:
    """Return the error for a call that moves bytes in a signal handler that interrupted another call of this handle."""
    if self._closed:
        return ClosedHandle()
    message = "a signal handler interrupted another call of this handle, and may only end it"
    return failure(f"nbd_{row.name}", message, errno.EDEADLK)


def _made_in_the_middle(row: Call, in_the_middle: Callable[..., Any], self: Handle, *args: Any, **kwargs: Any) -> Any:
    """Make a call that has a meaning of its own in the middle of another call of this handle."""
    if self._closed:
        raise ClosedHandle
    try:
        return in_the_middle(self, *args, **kwargs)
    except CoreError as exc:
        raise translated(f"nbd_{row.name}", exc) from exc


def _unlocked(row: Call, function: Callable[Concatenate[H, P], R]) -> Callable[Concatenate[H, P], R]:
    permitted = row.in_order
    limited = row.permitted != ANY

    @functools.wraps(function)
    def wrapper(self: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._closed:
            raise ClosedHandle
        client = self._client
        if limited and (_CREATED if client is None else client.engine.phase) not in permitted:
            raise wrong_state(row, function, self, args, kwargs)
        return function(self, *args, **kwargs)

    return wrapper


def on_slow_path(row: Call, function: Callable[Concatenate[H, P], R], self: H, *args: P.args, **kwargs: P.kwargs) -> R:
    """Make a call of a handle that is closed, lost in a fork, in a wrong state, or wants debug messages."""
    if self._closed:
        raise ClosedHandle
    if self._lost:
        raise failure(f"nbd_{row.name}", in_use_when_forked().message, errno.ENOTCONN)
    if self._debug:
        return _debugged(row, function, self, *args, **kwargs)
    raise wrong_state(row, function, self, args, kwargs)


def _debugged(row: Call, function: Callable[Concatenate[H, P], R], self: H, *args: P.args, **kwargs: P.kwargs) -> R:
    """Make a call as `locked` does, and say so."""
    name = f"nbd_{row.name}"
    before = self._state_name
    self._say(name, " ".join(["enter:", *_shown(function, self, args, kwargs)]))
    try:
        if self._phase not in row.permitted:
            raise wrong_state(row, function, self, args, kwargs)
        try:
            result = function(self, *args, **kwargs)
        except CoreError as exc:
            raise translated(name, exc) from exc
    except Error as exc:
        self._say(name, f'leave: error="{exc.string}"')
        raise
    else:
        if self._state_name != before:
            self._say(name, f"transition: {before} -> {self._state_name}")
        self._say(name, f"leave: ret={_short(result)}")
        return result
    finally:
        self._callbacks.interrupt()


def _shown(function: Callable[..., Any], self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    bound = inspect.signature(function).bind(self, *args, **kwargs)
    bound.apply_defaults()
    return [f"{name}={_short(value)}" for name, value in list(bound.arguments.items())[1:]]


def _short(value: object) -> str:
    """Return a value as debug text: numbers and names as they are, memory and callbacks by kind only."""
    if value is None:
        return "0"  # as C has it
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return repr(value)[:100] if isinstance(value, str | list) else f"<{type(value).__name__}>"


def wrong_state(row: Call, function: Callable[..., Any], self: Any, args: Any, kwargs: Any) -> Error:
    """Return the error for a call that the state does not permit. Raises TypeError first for one with the wrong arguments."""
    inspect.signature(function).bind(self, *args, **kwargs)
    number = errno.ENOTCONN if self._phase is Phase.CREATED else errno.EINVAL
    return failure(f"nbd_{row.name}", f"invalid state: {self._state_name}: the handle must be {row.states}", number)
