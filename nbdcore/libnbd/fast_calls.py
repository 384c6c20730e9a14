"""The calls that a program makes for each block: decorators that do what `calls.call` does, with fewer functions on the way.

To hand any arguments on costs as much as the shortest calls themselves. So the wrappers here have the parameters of their calls
(`transfer`), or none (`question`); a `listed` call has no wrapper. A `shared` call waits for one command and calls nothing back,
so what several threads ask is sent together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from nbdcore.errors import Error as CoreError
from nbdcore.libnbd import arguments
from nbdcore.libnbd.calls import ANY, CALLS, CONNECTED, Call, Handle, locked, on_slow_path, refused, wrong_state
from nbdcore.libnbd.errors import ClosedHandle, command_failure, translated
from nbdcore.protocol.state import Phase

if TYPE_CHECKING:
    from nbdcore.clients.polled import PolledClient
    from nbdcore.protocol.transmission.commands import Command, Limits

__all__ = ["check", "listed", "question", "shared", "transfer"]

_CREATED, _CONNECTED = Phase.CREATED, Phase.CONNECTED

P = ParamSpec("P")
R = TypeVar("R")


class CommandHandle(Handle, Protocol):
    """What the decorator of calls that start a command needs of it."""

    _complete_command: Callable[[Command], None]

    @property
    def _connection(self) -> PolledClient: ...

    def _queue(self, command: Command, completion: Any) -> int: ...


class WaitingHandle(Handle, Protocol):
    """What the decorator of calls that run a command needs of it."""

    def _run(self, call: str, command: Command) -> None: ...

    def _run_with_others(self, client: PolledClient, command: Command) -> None: ...


H = TypeVar("H", bound=Handle)
C = TypeVar("C", bound=CommandHandle)
W = TypeVar("W", bound=WaitingHandle)


def shared(
    first_version: str,
) -> Callable[[Callable[Concatenate[W, P], tuple[Command, R]]], Callable[Concatenate[W, P], R]]:
    """Make a method that builds a command, and what to return, libnbd's call that runs it, permitted while connected.

    As `call` has it, but that the lock is not held before the command is built: what several threads ask is sent together.
    """

    def decorate(build: Callable[Concatenate[W, P], tuple[Command, R]]) -> Callable[Concatenate[W, P], R]:
        row = CALLS[build.__name__] = Call(build.__name__, first_version, CONNECTED, moves_bytes=True)
        name = f"nbd_{row.name}"

        @functools.wraps(build)
        def run(self: W, /, *args: P.args, **kwargs: P.kwargs) -> R:
            command, result = build(self, *args, **kwargs)
            self._run(name, command)
            return result

        run_alone = locked(row, run)

        @functools.wraps(build)
        def wrapper(self: W, /, *args: P.args, **kwargs: P.kwargs) -> R:
            client = self._client
            if self._slow_path or client is None or client.engine.phase is not _CONNECTED:
                return run_alone(self, *args, **kwargs)
            if self._in_a_call() and not self._callbacks.calling:
                raise refused(row, self)
            try:
                command, result = build(self, *args, **kwargs)
                self._run_with_others(client, command)
            except CoreError as exc:
                raise translated(name, exc) from exc
            finally:
                if self._closing:
                    self._end_call()
            if command.error is not None and not command.cookie:  # it was not sent: the state has changed meanwhile
                return run_alone(self, *args, **kwargs)
            if command.error is not None:
                raise command_failure(name, command) from command.error
            return result

        return wrapper

    return decorate


def transfer(first_version: str) -> Callable[[Callable[[C, Limits, Any, int, int], Command]], Callable[..., int]]:
    """Make a method that builds the command to move a block libnbd's call that starts it, permitted while connected.

    The method gets the limits of the connection, the buffer, the offset and the flags. All else is as `call` has it.
    """

    def decorate(build: Callable[[C, Limits, Any, int, int], Command]) -> Callable[..., int]:
        row = CALLS[build.__name__] = Call(build.__name__, first_version, CONNECTED, moves_bytes=True)
        name = f"nbd_{row.name}"

        def start(self: C, buf: Any, offset: int, completion: Any = None, flags: int = 0) -> int:
            return self._queue(build(self, self._connection.engine.limits, buf, offset, flags), completion)

        def wrapper(self: C, buf: Any, offset: int, completion: Any = None, flags: int = 0) -> int:
            if self._in_a_call() and not self._callbacks.calling:
                raise refused(row, self)
            try:
                with self._lock:
                    client = self._client
                    if self._slow_path or client is None or client.engine.phase is not _CONNECTED:
                        return on_slow_path(row, start, self, buf, offset, completion, flags)
                    try:  # what `start` does
                        command = build(self, client.engine.limits, buf, offset, flags)
                        if completion is not None:
                            command.tag = completion if callable(completion) else arguments.callback(completion, "completion")
                        command.completion = self._complete_command
                        return client.submit(command)
                    except CoreError as exc:
                        raise translated(name, exc) from exc
                    finally:
                        if self._callbacks.interruption is not None:
                            self._callbacks.interrupt()
            finally:
                if self._closing:
                    self._end_call()

        # Not `functools.wraps`: the arguments are the wrapper's own.
        wrapper.__name__, wrapper.__qualname__, wrapper.__doc__ = build.__name__, build.__qualname__, build.__doc__
        return wrapper

    return decorate


def question(first_version: str, permitted: frozenset[Phase] = ANY) -> Callable[[Callable[[H], R]], Callable[[H], R]]:
    """Make a method without arguments a call of libnbd's API that takes no lock."""

    def decorate(function: Callable[[H], R]) -> Callable[[H], R]:
        row = CALLS[function.__name__] = Call(function.__name__, first_version, permitted, lock_free=True)
        in_order, limited = row.in_order, permitted != ANY

        @functools.wraps(function)
        def wrapper(self: H, /) -> R:
            if self._closed:
                raise ClosedHandle
            client = self._client
            if limited and (_CREATED if client is None else client.engine.phase) not in in_order:
                raise wrong_state(row, function, self, (), {})
            return function(self)

        return wrapper

    return decorate


def listed(first_version: str, permitted: frozenset[Phase] = ANY) -> Callable[[Callable[[H], R]], Callable[[H], R]]:
    """Make a method without arguments a call that takes no lock, and has no wrapper: it has to call `check` by itself."""

    def decorate(function: Callable[[H], R]) -> Callable[[H], R]:
        CALLS[function.__name__] = Call(function.__name__, first_version, permitted, lock_free=True)
        return function

    return decorate


def check(function: Callable[[H], Any], self: H) -> None:
    """Raise as the wrapper of a `listed` call would: ClosedHandle, and Error where the handle's state does not permit it."""
    row = CALLS[function.__name__]
    if self._closed:
        raise ClosedHandle
    if self._phase not in row.permitted:
        raise wrong_state(row, function, self, (), {})
