"""The engine of one connection: phase, conversations, commands; bytes in, bytes out, nothing that waits.

Whoever owns it moves bytes: `outgoing` says what to send and `sent` how much went; `room` says where the next bytes must go and
`received` how many came. The two halves share only the table of commands in flight, so a full send buffer never stops replies
from being read. A session does this for a stream; tests do it with bytes.

A server that answers a command with ESHUTDOWN is about to end, and the client must leave it: no command is taken any more, those
in flight are waited for, then the goodbye is said. Whoever moves the bytes need not wait for the server to hang up after that.

Nothing here raises because of the peer. A broken protocol, like a broken transport, ends in `fail`: the phase becomes DEAD (or
CLOSED, where the server hung up between two messages), the reason is kept in `error`, and every pending command and conversation
completes exactly once with it. Completions run after the bytes at hand have been dealt with; they may submit, never receive.
How a conversation is run is in `handshake.exchange`, what a reply means in `transmission.decoder`: the engine has one of each.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nbdcore.errors import Disconnected, Error, NegotiationError, ProtocolViolation, UsageError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    CommandType,
    OptionReply,
)
from nbdcore.protocol.handshake import negotiation, options
from nbdcore.protocol.handshake.agreement import Agreement, Settings, Traffic
from nbdcore.protocol.handshake.exchange import Exchange, Runner
from nbdcore.protocol.handshake.negotiation import Conversation
from nbdcore.protocol.state import Phase, check_agreed
from nbdcore.protocol.transmission.buffer import ReceiveBuffer
from nbdcore.protocol.transmission.commands import ALL_STRICT, Command, Limits, disconnect
from nbdcore.protocol.transmission.decoder import LARGE, Decoder

__all__ = ["INLINE_PAYLOAD", "Engine", "Exchange"]

#: A payload up to so many bytes is copied behind its header, which spares the kernel a part. With 64 in flight a write of 16 KiB
#: took a client of nbdkit 6.6 us of processor time copied and 7.4 us as a part of its own, one of 32 KiB 11.2 and 10.6 us.
INLINE_PAYLOAD = 1 << 14
# Looked up once: to find a member costs about as much as a call, and these are asked for with every command.
_CONNECTED = Phase.CONNECTED
_READ, _DISC, _BLOCK_STATUS = int(CommandType.READ), int(CommandType.DISC), int(CommandType.BLOCK_STATUS)
_READ_OR_WRITE = (_READ, int(CommandType.WRITE))
_SHUTTING_DOWN = "the server is shutting down"
# Most commands packed at once: sendmsg takes 1024 parts, and a command has two at most.
_BURST = 256
# Most bytes for one call that waits until they are sent: others have to wait with what they send.
_SENT_AT_ONCE = 1 << 20


class Engine:
    """The state of one connection.

    Raises UsageError for an export name or metadata context that the protocol cannot carry.

    Attributes:
        settings: what the client asked for.
        phase: where the connection stands.
        agreement: what was agreed on, or learnt.
        limits: what requests must obey; set when the phase becomes CONNECTED.
        traffic: what has gone over the wire.
        error: why the connection ended, else None.
        ended_by_program: it was this program that ended it.
        queue: commands that have not been packed, and so not sent. Those given up meanwhile (`done`) stay until their turn,
            except at the end: so there is something to send unless it is empty. `pending` leaves them out.
        in_flight: cookie -> command, for those that have been packed.
        wants_tls: the stream is to be swapped for an encrypted one; then call `tls_started`.
        ending: no more commands are taken: a disconnect was queued, or will be.
        shutting_down: the server said that it shuts down, before this program took leave.
    """

    def __init__(self, settings: Settings, *, strict: int = ALL_STRICT) -> None:
        self.settings: Settings = settings
        self.phase: Phase = Phase.CREATED
        self.agreement: Agreement = Agreement()
        self.limits: Limits = Limits(size=0, flags=0)
        self.traffic: Traffic = Traffic()
        self.error: Error | None = None
        self.ended_by_program: bool = False
        self.queue: deque[Command] = deque()
        self.in_flight: dict[int, Command] = {}
        options.info_request(settings.export, block_size=True, full=True)  # raises UsageError for what cannot be sent
        options.meta_context_request(settings.export, settings.contexts)
        self._strict = strict
        self._exchanges = Runner()
        self.wants_tls: bool = False
        self._decoder: Decoder | None = None
        self._incoming: ReceiveBuffer | None = None  # the decoder's
        self._parts: list[memoryview] = []
        self._begun: memoryview | None = None  # the part of which some bytes are sent, as it was
        self._last_cookie = 0
        self._mark = object()  # in each command that was submitted here
        self._given_up = 0  # commands in the queue that will not be sent
        self.ending: bool = False
        self.shutting_down: bool = False
        self._goodbye_queued = False

    # ------------------------------------------------------------------------------------------ phases

    def choose_export(self, name: str) -> None:
        """Take another export than the settings named. Raises UsageError for a name that cannot be sent.

        What is known of the one before is forgotten.
        """
        options.export_name(name)
        if name != self.settings.export:
            self.agreement.forget_export()
            self.agreement.forget_contexts()
        self.settings = replace(self.settings, export=name)

    def check_strictly(self, strict: int) -> None:
        """Make these of the client-side checks from now on (flags of `Strict`)."""
        self._strict = strict
        self.limits = replace(self.limits, strict=strict)

    def connecting(self) -> None:
        """The transport is being opened."""
        self.phase = Phase.CONNECTING

    def handshake(self) -> Exchange:
        """The transport is open: begin the handshake. Returns it as an exchange, whose result says whether an export is open."""
        self.phase = Phase.CONNECTING
        return self._begin(Exchange(negotiation.handshake(self.agreement, self.settings), enters=True, fatal=True))

    def option(self, conversation: Conversation[Any], *, enters: bool = False, call: str = "") -> Exchange:
        """Begin a conversation of opt mode; `enters`: its success opens the export.

        Raises UsageError, with nothing sent, for arguments that cannot be sent, and unless the phase is NEGOTIATING; where the
        `call` is named, also when the specification forbids it after what was agreed on.
        """
        if self.phase is not Phase.NEGOTIATING:
            raise self._out_of_phase("option", Phase.NEGOTIATING) from self.error
        check_agreed(call, self.agreement)
        self.phase = Phase.CONNECTING
        try:
            return self._begin(Exchange(conversation, enters=enters, fatal=False))
        except UsageError:
            self.phase = Phase.NEGOTIATING
            raise

    def abort(self) -> None:
        """Leave opt mode: say goodbye and count the connection as closed, whatever the server answers."""
        self._say_abort()
        self.phase = Phase.CLOSED

    def _say_abort(self) -> None:
        for step in negotiation.abort(self.agreement, self.settings):
            if isinstance(step, bytes):
                self._say(step)

    def end(self, why: str = "the connection was closed by this program") -> None:
        """This program ends the connection: everything pending fails, and a later call is a mistake, not a loss."""
        self.ended_by_program |= self.phase not in (Phase.CLOSED, Phase.DEAD)
        self.fail(Disconnected(errno.ENOTCONN, why), phase=Phase.CLOSED)

    def fail(self, error: Error, *, phase: Phase = Phase.DEAD) -> None:
        """The connection has ended: every pending command and conversation completes with `error`. Only the first one counts."""
        if self.phase in (Phase.CLOSED, Phase.DEAD):
            return
        self.phase, self.error = phase, error
        if not isinstance(error, NegotiationError):
            self._parts.clear()
        self._begun = None
        answered: list[Command] = []  # and not yet told so, where an exception broke off the decoding
        if self._decoder is not None:
            answered = self._decoder.take_completed()
            self._decoder.incoming.close()
        pending = [*answered, *self.in_flight.values(), *self.queue]
        self.in_flight.clear()
        self.queue.clear()
        self._given_up = 0
        self._decoder = self._incoming = None
        for command in pending:
            if not command.done:
                command.error = command.error or error
                command.done = True
                command.free()
        exchange = self._exchanges.stop()
        self.wants_tls = False
        try:
            if exchange is not None:
                exchange.error = error
                exchange.complete()
        finally:
            self._complete(pending)

    def _out_of_phase(self, what: object, wanted: Phase) -> Error:
        """The last word on what is legal: another thread may have ended the connection since the caller looked at its phase."""
        message = f"{what}: the connection is {self.phase.value}, and must be {wanted.value}"
        if self.lost:
            return Disconnected(errno.ENOTCONN, f"{message} (it ended with: {self.error})")
        return UsageError(errno.ENOTCONN if self.phase is Phase.CREATED else errno.EINVAL, message)

    # ------------------------------------------------------------------------------------------ commands

    def submit(self, command: Command) -> int:
        """Queue a command and return its cookie.

        Raises UsageError unless CONNECTED, and once a disconnect is queued. Raises Disconnected where the connection was lost,
        and once the server shuts down; but a disconnect is done at once then, since the goodbye will be said anyway.
        """
        if self.phase is not _CONNECTED:
            raise self._out_of_phase(command, _CONNECTED) from self.error
        if self.ending:
            return self._submit_at_the_end(command)
        self._last_cookie = command.cookie = cookie = self._last_cookie + 1
        command.mark = self._mark
        if command.type == _DISC:
            self.ending = self._goodbye_queued = True
        self.queue.append(command)
        return cookie

    def _submit_at_the_end(self, command: Command) -> int:
        if not self.shutting_down:
            raise UsageError(errno.EINVAL, f"{command}: the connection is being closed")
        if command.type != _DISC:
            raise Disconnected(errno.ENOTCONN, f"{command}: {_SHUTTING_DOWN}")
        command.done = True
        self._complete([command])
        return command.cookie

    def submit_alone(self, command: Command) -> list[memoryview]:
        """Submit a read or a write, packed already, if nothing else is under way. Returns `outgoing()`; empty: use `submit`.

        Calls are most of what a lone request costs; this is one in place of three, and `received_alone` is one less.
        """
        count, payload, parts = command.count, command.payload, self._parts
        if (
            self.phase is not _CONNECTED
            or self.ending
            or self.queue
            or parts
            or self.in_flight
            or command.type not in _READ_OR_WRITE
            or self._incoming is None
        ):
            return []
        cookie, flags, kind, offset = self._last_cookie + 1, command.flags, command.type, command.offset
        if self.limits.extended:
            request = wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, count)
        else:
            request = wire.REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, count)
        if payload is None:
            parts.append(memoryview(request))
            if count >= LARGE:
                self._incoming.large += 1
        elif count <= INLINE_PAYLOAD:
            parts.append(memoryview(request + payload))
        else:
            command.payload = payload = memoryview(payload)
            parts += (memoryview(request), payload)
        self.traffic.chunks_sent += 1
        self._last_cookie = command.cookie = cookie
        command.mark = self._mark
        self.in_flight[cookie] = command
        return parts

    def submit_all(self, commands: Sequence[Command]) -> None:
        """Queue several commands, none of them a disconnect, or none: raises as `submit` does."""
        if self.phase is not _CONNECTED or self.ending:
            for command in commands:
                self.submit(command)  # raises with the first
        cookie, mark = self._last_cookie, self._mark
        for command in commands:
            command.cookie = cookie = cookie + 1
            command.mark = mark
        self._last_cookie = cookie
        self.queue.extend(commands)

    def abandon(self, command: Command, error: Error) -> None:
        """The caller gives a command up: it completes with `error` now, and its memory is not touched any more.

        A command of which nothing was sent is never sent; the answer to any other is thrown away when it comes.
        """
        if command.done:
            return
        queued = command.mark is self._mark and command.cookie not in self.in_flight
        if self._incoming is not None and not queued:
            self._incoming.forget(command)
        self._let_go(command)
        command.target = command.memory = command.on_chunk = command.on_extents = None
        command.error, command.done, command.discard = error, True, True
        if queued:
            self._leave_queue()
        if command.completion is not None:
            command.completion(command)

    def _leave_queue(self) -> None:
        """A command in the queue is given up. It stays there until its turn comes: to find it in the middle would be a search."""
        self._given_up += 1
        queue = self.queue
        while queue and queue[-1].done:
            queue.pop()
            self._given_up -= 1

    def abandon_unsent(self, error: Error) -> None:
        """Give up every command of which not a byte has been sent: it completes with `error`."""
        for command in list(self.queue):
            self.abandon(command, error)

    @property
    def lost(self) -> bool:
        """Whether there was a connection, and it ended without this program's doing."""
        error = self.error
        if isinstance(error, NegotiationError):
            return error.reply == OptionReply.ERR_SHUTDOWN
        return isinstance(error, (Disconnected, ProtocolViolation)) and not self.ended_by_program

    @property
    def pending(self) -> int:
        """How many commands are queued or in flight."""
        return len(self.queue) - self._given_up + len(self.in_flight)

    def knows(self, command: Command) -> bool:
        """Whether the command was submitted here, and has not finished."""
        return command.mark is self._mark and not command.done

    @property
    def between_replies(self) -> bool:
        """Whether no reply has been received in part only."""
        return self._incoming is None or self._incoming.between_messages

    @property
    def finished_sending(self) -> bool:
        """Whether a disconnect was queued and everything has been sent: the sending side may be shut down."""
        return self._goodbye_queued and not self.queue and not self._parts

    # ------------------------------------------------------------------------------------------ bytes out

    def outgoing(self) -> list[memoryview]:
        """Return what is to be sent next; empty when there is nothing."""
        if self.queue and not self._parts:
            self._pack()
        return self._parts

    @property
    def has_outgoing(self) -> bool:
        """Whether `outgoing` would return something."""
        return bool(self._parts or self.queue)

    def large_payload(self, is_own: Callable[[Command], bool]) -> list[memoryview]:
        """Return the first of `outgoing()`, for a caller who waits until it is sent, where that is a large payload of its own.

        Empty where it is not, and where large answers are due: a server may wait until they are received before it reads on.
        """
        taken: list[memoryview] = []
        left, begun = _SENT_AT_ONCE, self._begun
        for part in self._parts[:2]:  # a header may come before the payload
            payload, begun = part if begun is None else begun, None
            taken.append(part[:left])
            left -= len(taken[-1])
            if len(part) >= LARGE:
                break
        else:
            return []
        in_flight = self.in_flight.values()
        owner = next((command for command in in_flight if command.payload is payload), None)
        if owner is None or not is_own(owner) or any(command.type in (_READ, _BLOCK_STATUS) for command in in_flight):
            return []
        return taken

    def sent(self, count: int) -> bool:
        """The first `count` bytes of `outgoing()` have been sent. Returns whether there is more to send."""
        self.traffic.bytes_sent += count
        parts = self._parts
        if len(parts) == 1 and count == len(parts[0]):
            parts.clear()
            self._begun = None
            return bool(self.queue)
        done = 0
        for part in parts:
            if count < len(part):
                break
            count -= len(part)
            done += 1
        if done:
            del parts[:done]
            self._begun = None
        if count:
            if self._begun is None:
                self._begun = parts[0]
            parts[0] = parts[0][count:]
        return bool(parts or self.queue)

    def _pack(self) -> None:
        """Turn queued commands into bytes: headers and small payloads into one buffer, large payloads as they are."""
        queue, parts, in_flight = self.queue, self._parts, self.in_flight
        extended = self.limits.extended
        pack = wire.EXTENDED_REQUEST.pack if extended else wire.REQUEST.pack
        magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        gathered: list[bytes | memoryview] = []
        goodbye: list[Command] = []
        burst = min(len(queue) - self._given_up, _BURST)
        self.traffic.chunks_sent += burst
        for _ in range(burst):
            command = queue.popleft()
            while command.done:
                self._given_up -= 1
                command = queue.popleft()
            kind, length, payload = command.type, command.count, command.payload
            if payload is not None and kind == _BLOCK_STATUS:
                length = len(payload)
            gathered.append(pack(magic, command.flags, kind, command.cookie, command.offset, length))
            if payload is None:
                if kind == _DISC:
                    command.done = True  # it has no reply
                    goodbye.append(command)
                    continue
                if length >= LARGE and kind == _READ and self._incoming is not None:
                    self._incoming.large += 1
            elif len(payload) <= INLINE_PAYLOAD:
                gathered.append(payload)
            else:
                command.payload = payload = memoryview(payload)
                parts += (memoryview(b"".join(gathered)), payload)
                gathered.clear()
            in_flight[command.cookie] = command
        if gathered:
            parts.append(memoryview(b"".join(gathered)))
        if goodbye:
            self._complete(goodbye)

    def _let_go(self, command: Command) -> None:
        """Free the caller's memory of a payload: what is still to be sent of it is copied."""
        payload, command.payload = command.payload, None
        if payload is None or len(payload) <= INLINE_PAYLOAD:
            return
        for number, part in enumerate(self._parts):
            if part is payload or (number == 0 and self._begun is payload):
                self._parts[number] = memoryview(bytes(part))
                self._begun = None if number == 0 else self._begun
                return

    # ------------------------------------------------------------------------------------------ bytes in

    def room(self) -> memoryview:
        """Return where the next bytes must go. Empty when none may be received now: between options, and before TLS."""
        if self._incoming is not None:
            return self._incoming.room()
        return self._exchanges.room()

    def room_when_sent(self) -> memoryview | None:
        """Return `room()` where everything has been sent, and the next bytes go into no command's own memory; None elsewhere.

        The same can be asked one by one; a client that waits for a small answer asks for it all.
        """
        incoming = self._incoming
        return None if self._parts or self.queue or incoming is None or incoming.into_memory else incoming.room()

    @property
    def direct(self) -> Command | None:
        """The command into whose own memory the next bytes go; None where they go elsewhere."""
        return None if self._incoming is None else self._incoming.direct

    def received(self, count: int) -> int:
        """Take in `count` bytes that were put into `room()`, and run the completions that follow from them.

        Returns how many commands that finished.
        """
        self.traffic.bytes_received += count
        if self._decoder is None:
            self._conclude(self._exchanges.received(count))
            return 0
        decoder, violation = self._decoder, None
        try:
            completed = decoder.received(count)
        except ProtocolViolation as exc:
            completed, violation = decoder.take_completed(), exc
        if decoder.shutdown_heard and not self.ending:
            completed += self._take_no_more()
        try:
            if completed:
                self._complete(completed)
        finally:
            if violation is not None:
                self.fail(violation)
            elif self.shutting_down:
                self._say_goodbye()
        if decoder.raised is not None:
            raised, decoder.raised = decoder.raised, None
            raise raised
        return len(completed)

    def received_alone(self, command: Command, count: int) -> bool:
        """Take in the answer to a command that is alone here, if the `count` bytes in `room()` are a plain one and no more.

        Returns whether they were, and the command is done then; else nothing has happened, and the bytes are for `received`.
        """
        decoder = self._decoder
        if decoder is None or self.queue or self._parts or self.ending or not decoder.received_alone(command, count):
            return False
        self.traffic.bytes_received += count
        command.payload = None
        return True

    def begins_alone(self, command: Command, count: int) -> Sequence[memoryview]:
        """Take in the beginning of the answer to a large read that is alone here, if the `count` bytes in `room()` are one.

        Returns where the rest goes, all of which is to be received next; how much was is for `ends_alone`. Empty: they are not,
        nothing has happened, and they are for `received`.
        """
        decoder = self._decoder
        if decoder is None or command.count < LARGE or not (rest := decoder.begins_alone(command, count)):
            return ()
        self.traffic.bytes_received += count
        return rest

    def ends_alone(self, command: Command, count: int) -> bool:
        """Take in the `count` bytes in the places that `begins_alone` returned, if they are all of the rest.

        Returns whether they were, and the command is done then. Else what `begins_alone` took in is decoded now, and what came
        into each place is for `received`. Others may have submitted commands meanwhile.
        """
        decoder = self._decoder
        if decoder is None:
            return False
        if decoder.ends_alone(command, count):
            self.traffic.bytes_received += count
            return True
        self.received(0)  # from here on as ever: the beginning is decoded
        return False

    def _take_no_more(self) -> list[Command]:
        """The server shuts down: it is asked nothing any more. Returns the commands that will not be sent, which have failed."""
        self.ending = self.shutting_down = True
        unsent = [command for command in self.queue if not command.done]
        self.queue.clear()
        self._given_up = 0
        for command in unsent:
            command.error = Disconnected(errno.ENOTCONN, f"{command} was not sent: {_SHUTTING_DOWN}")
            command.done = True
        return unsent

    def _say_goodbye(self) -> None:
        """Take leave of a server that shuts down, when it has answered everything."""
        if self.phase is _CONNECTED and not self.in_flight and not self._goodbye_queued:
            self._goodbye_queued = True
            self.queue.append(disconnect())

    def release_buffer(self) -> None:
        """Nothing more is to be received just now: hold no memory for it. What `room` returned is not to be used any more."""
        if self._incoming is not None:
            self._incoming.release()

    def received_eof(self) -> None:
        """The server has finished sending."""
        waiting = len(self.queue) - self._given_up + sum(not command.done for command in self.in_flight.values())
        between = self._incoming is not None and self._incoming.between_messages
        if between and self.finished_sending and not waiting and not self.shutting_down:
            self.end("this program took leave of the server")
        elif between:
            why = _SHUTTING_DOWN if self.shutting_down else "the server closed the connection"
            how_many = "1 command was" if waiting == 1 else f"{waiting} commands were"
            unanswered = f" ({how_many} not answered)" if waiting else ""
            self.fail(Disconnected(errno.ENOTCONN, f"{why}{unanswered}"), phase=Phase.CLOSED)
        elif self._decoder is not None:
            self.fail(Disconnected(errno.ENOTCONN, "the server closed the connection in the middle of a reply"))
        else:
            self.fail(Disconnected(errno.ENOTCONN, f"the server closed the connection during the handshake{self._eof_hint()}"))

    def _eof_hint(self) -> str:
        if not self.agreement.protocol:
            return ", before its greeting" if self._exchanges.waits_in_vain else ", within its greeting"
        if not self.agreement.fixed:
            return f" (a server of this age does so when it has no export {self.settings.export!r})"
        return ""

    # ------------------------------------------------------------------------------------------ conversations

    def _say(self, message: bytes) -> None:
        """Queue what a conversation says: an option, or the client's flags, which answer the greeting."""
        self._parts.append(memoryview(message))
        if len(message) == wire.CLIENT_FLAGS.size:
            self.traffic.chunks_received += 1
        else:
            self.traffic.chunks_sent += 1

    def tls_started(self) -> None:
        """The stream is encrypted now, as `wants_tls` asked."""
        self._conclude(self._exchanges.tls_started())

    def _begin(self, exchange: Exchange) -> Exchange:
        self._conclude(self._exchanges.begin(exchange))
        return exchange

    def _conclude(self, ended: Exchange | None) -> None:
        """A conversation took a step, or came to its end: say what it said; the phase follows from its outcome."""
        for message in self._exchanges.take_said():
            self._say(message)
        self.wants_tls = self._exchanges.wants_tls
        if ended is None:
            return
        if ended.ends_connection:
            self._end_with(ended)
            return
        if ended.error is None and ended.enters and ended.result is not False:
            self._enter_transmission()
        elif self.phase is Phase.CONNECTING:
            self.phase = Phase.NEGOTIATING
        ended.complete()

    def _end_with(self, ended: Exchange) -> None:
        """A conversation's error is the end of the connection. A server that refused something is told goodbye."""
        assert ended.error is not None
        if isinstance(ended.error, NegotiationError):
            self._say_abort()
        try:
            self.fail(ended.error)
        finally:
            ended.complete()

    def _enter_transmission(self) -> None:
        agreement, export = self.agreement, self.agreement.export
        assert export is not None, "every conversation that enters the transmission phase sets it"
        block_size = export.block_size
        self.limits = Limits(
            size=export.size,
            flags=int(export.flags),
            minimum=block_size.minimum,
            payload=block_size.payload,
            maximum=min(block_size.maximum, MAX_PAYLOAD),
            extended=agreement.extended,
            structured=agreement.structured,
            contexts=bool(agreement.contexts),
            strict=self._strict,
        )
        self._decoder = Decoder(
            self.in_flight,
            structured=agreement.structured,
            extended=agreement.extended,
            contexts=agreement.contexts,
            size=export.size,
            traffic=self.traffic,
        )
        self._incoming = self._decoder.incoming
        self.phase = Phase.CONNECTED

    # ------------------------------------------------------------------------------------------ completions

    def _complete(self, completed: list[Command]) -> None:
        """Run completions. One that raises keeps no other from running; its exception then goes to whoever moves the bytes."""
        raised: BaseException | None = None
        for command in completed:
            payload, completion = command.payload, command.completion
            if payload is not None:
                if len(payload) > INLINE_PAYLOAD:
                    self._let_go(command)
                command.payload = None
            if completion is not None and not command.discard:
                try:
                    completion(command)
                except BaseException as exc:  # noqa: BLE001 (raised again when every other command had its turn)
                    raised = raised or exc
        if raised is not None:
            raise raised
