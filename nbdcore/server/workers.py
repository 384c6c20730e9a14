"""A server's further processes: each serves a share of the clients, with an interpreter of its own.

The server's own process listens and accepts. A client that comes while others are here goes to the process that has the fewest,
and a process is only started when there is a client for it: so a server with one client is one process, however many it may
have. What goes to the process is the connection's descriptor. Limits and budget are shared out evenly, since the clients are.

A process that dies takes its clients along, and nobody else; another one is started when it is needed. A process whose server is
gone stops, as the server would have stopped it.

    server                                worker
    accepts ── name ────────────────────▶ a `Server` of its own, which listens nowhere
            ── descriptor ──────────────▶ (a socket that carries nothing else)
    stop    ── seconds ─────────────────▶ stops likewise
    counts  ◀── a client has ended ──────
    logs    ◀── a record of its log ─────
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.process import BaseProcess

from nbdcore.logs import server_log
from nbdcore.processes import how_it_ended
from nbdcore.server.shutdown import moment_after
from nbdcore.server.worker import Handed, ServerSettings, Stop, work
from nbdcore.streams.base import Stream
from nbdcore.streams.sockets import SocketStream
from nbdcore.streams.waiting import Deadline

__all__ = ["Workers", "shared_out"]


# What a process may take to end beyond the deadline that it was given.
_LAST_MOMENT = 1.0


def shared_out(places: int, processes: int) -> list[int]:
    """Return how many of so many places each process has, the larger shares first: no process without one."""
    each, more = divmod(places, min(places, processes))
    return [each + (number < more) for number in range(min(places, processes))]


class Workers:
    """At most so many processes beside the server's own. Safe from several threads.

    Args:
        places: for each process, how many clients it may have at most; the larger ones first.
        settings: of each process, but for that.
    """

    def __init__(self, places: Sequence[int], settings: ServerSettings) -> None:
        self._settings = settings
        self._places = [*places]  # of processes that do not run
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._stopping = False

    def take(self, stream: Stream, here: int) -> bool:
        """Hand a client over, and return whether that was done; `here`: how many the server's own process has.

        Returns False where this process has the fewest, and where the client's stream is no socket. Then it is served here.
        """
        if not isinstance(stream, SocketStream):
            return False
        with self._lock:
            while not self._stopping:
                worker = self._choose(here)
                if worker is None:
                    return False
                if worker.take(stream):
                    return True
        return False

    def _choose(self, here: int) -> _Worker | None:
        """Return the process for one more client; None: this one."""
        self._forget_dead()
        ready = [worker for worker in self._workers if worker.usable and not worker.lacking]
        best = min(ready, key=lambda worker: worker.clients, default=None)
        fewest = here if best is None else min(here, best.clients)
        if fewest and self._places:
            try:
                best = _Worker(replace(self._settings, max_clients=self._places[0]))
            except (OSError, MemoryError) as problem:
                server_log.warning("no further process could be started, and clients share those that there are: %s", problem)
                if getattr(problem, "errno", None) == errno.ENOTSUP:  # a disk that no other process can have
                    self._places.clear()
            except Exception as problem:  # noqa: BLE001  # whatever multiprocessing or pickle find wrong, the client is served
                server_log.warning("no further process can be started, and clients share those that there are: %s", problem)
                self._places.clear()  # it is no lack that passes: trying again for each client would only take time
            else:
                del self._places[0]
                self._workers.append(best)
                return best
        return None if best is None or here <= best.clients else best

    def _forget_dead(self) -> None:
        dead = [worker for worker in self._workers if not worker.alive]
        if dead:
            self._workers = [worker for worker in self._workers if worker.alive]
            self._places = sorted([*self._places, *(worker.places for worker in dead)], reverse=True)

    def stop(self, deadline: Deadline) -> None:
        """Stop all, as the server stops: they answer what was begun. Returns at the deadline, or a moment later."""
        with self._lock:
            self._stopping = True
            workers = [*self._workers]
        for worker in workers:
            worker.stop(deadline)
        latest = moment_after(deadline, _LAST_MOMENT)
        stuck = [worker for worker in workers if not worker.join(latest)]
        for worker in stuck:
            worker.kill()
        latest = Deadline.after(_LAST_MOMENT)
        for worker in stuck:
            worker.join(latest)


class _Worker:
    """One process, seen from the server.

    Attributes:
        places: how many clients it may have at most.
        clients: how many it was handed that have not ended.
        usable: whether it may be handed clients.
        lacking: whether it has no descriptors for one more client, until one of those that it has leaves.
        alive: whether it has not ended; one that is not usable any more still serves those that it has.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """Start it. Raises OSError where the system gives no process, thread or descriptor."""
        context = multiprocessing.get_context("spawn")
        self.places: int = settings.max_clients
        self.clients: int = 0
        self.usable: bool = True
        self.lacking: bool = False
        self.alive: bool = True
        self._stopping = False
        self._counting = threading.Lock()
        self._ordering = threading.Lock()  # a pipe takes the words of one thread at a time
        level = server_log.getEffectiveLevel()
        with ExitStack() as undo, ExitStack() as far:
            self._orders, orders = context.Pipe()
            undo.callback(self._orders.close)
            far.callback(orders.close)
            self._reports, reports = context.Pipe(duplex=False)
            undo.callback(self._reports.close)
            far.callback(reports.close)
            self._clients, clients = socket.socketpair()
            undo.callback(self._clients.close)
            far.callback(clients.close)
            for end in (self._clients, clients):
                end.setblocking(True)  # whatever socket.setdefaulttimeout says: the mode goes to the process with it
            arguments = (orders, clients, reports, settings, level)
            process = context.Process(target=work, args=arguments, name="nbdcore-serve", daemon=True)
            process.start()
            undo.callback(_end_at_once, process)
            self._process: BaseProcess = process
            assert process.pid is not None, "it was started"
            self._pid: int = process.pid  # which the process, once it has ended and is closed, does not tell any more
            self._thread = threading.Thread(target=self._listen, name="nbdcore-worker", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as failure:
                raise OSError(errno.EAGAIN, str(failure)) from failure
            undo.pop_all()

    def take(self, stream: SocketStream) -> bool:
        """Hand a client over, which takes no descriptor more. Returns False where that fails; the client is still the caller's.

        Then this process is handed no more, and is told to stop when those that it has have left: another one can take its place.
        """
        try:
            self._order(Handed(str(stream)))
            with self._counting:
                self.clients += 1
            reduction.sendfds(self._clients, [stream.fileno()])
        except (OSError, RuntimeError, TypeError, ValueError):  # the latter ones where it ends, or has ended, this moment
            self.usable = False
            self._clients.close()  # where it waits for this client it learns that none comes
            return False
        os.close(stream.detach())
        return True

    def _listen(self) -> None:
        """Take what the process reports, until it has ended."""
        while True:
            try:
                said = self._reports.recv()
            except (EOFError, OSError):
                break
            if isinstance(said, logging.LogRecord):
                logging.getLogger(said.name).handle(said)
            else:
                with self._counting:
                    self.clients -= 1
                    self.lacking = said.lacking and self.clients > 0
                if not self.usable and not self.clients:
                    self._tell_to_stop(_LAST_MOMENT)
        self.alive = False
        self._process.join()
        if not self._stopping and (self._process.exitcode or self.clients):  # else it has stopped in order, after SIGTERM
            how = how_it_ended(self._process.exitcode)
            server_log.error("process %d of this server %s, and its %d clients with it", self._pid, how, self.clients)
        self._process.close()
        self._orders.close()
        self._clients.close()
        self._reports.close()

    def stop(self, deadline: Deadline) -> None:
        """Ask it to stop."""
        self._stopping = True
        self._tell_to_stop(deadline.remaining())

    def _tell_to_stop(self, seconds: float | None) -> None:
        with suppress(OSError, TypeError, ValueError):  # it has died, or is about to
            self._order(Stop(seconds))

    def _order(self, order: Handed | Stop) -> None:
        with self._ordering:
            self._orders.send(order)

    def join(self, latest: Deadline) -> bool:
        """Wait until it has ended, and return whether it has."""
        self._thread.join(latest.remaining())
        return not self._thread.is_alive()

    def kill(self) -> None:
        """End it at once."""
        server_log.warning("process %d did not stop in time, and was killed", self._pid)
        with suppress(ValueError):  # it has ended by itself this moment
            self._process.kill()


def _end_at_once(process: BaseProcess) -> None:
    process.kill()
    process.join()
    process.close()
