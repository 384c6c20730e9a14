"""TLS as a stream over another stream, of any kind.

The `ssl` module never touches a descriptor here: its SSLObject stands between two MemoryBIOs. Ciphertext is received in large
pieces into one BIO, and decrypted from there straight into the caller's room; what SSLObject leaves in the other BIO is sent.
So one receive serves many records, and TLS runs over whatever keeps the Stream contract, even over another TLS.

Who has what to do:

- The handshake goes on inside `handshake`, `recv_into` and `send`, whichever is called; until it is finished they move nothing
  else. `wants()` says what it waits for. It is finished only when the peer has proved what it must: a certificate that the
  context accepts, or knowledge of the pre-shared key.
- At most one batch of ciphertext is kept unsent. `send` takes nothing new before it is gone, so that a peer which does not
  receive makes `send` answer None, as with any stream; meanwhile `wants()` says WRITE, which `recv_into` heeds as well: who has
  handed everything over and waits for the answer need not come back with nothing to send.
- The end of the ciphertext is not the end of the data. Anybody on the way can cut a connection, and only the peer can send TLS's
  own goodbye (close_notify, RFC 8446 section 6.1). An end without it is an error until this side has said its own goodbye:
  then many peers just hang up.

Renegotiation, which would let reading wait for writing, is switched off by the contexts, and is gone from TLS 1.3.
"""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
import threading
from collections.abc import Iterator, Sequence

from nbdcore.errors import Disconnected, TLSError
from nbdcore.streams.base import Stream, Want, from_signal_handler
from nbdcore.streams.tls.explanations import explain
from nbdcore.streams.tls.records import RECORD, end_of_records, pieces

__all__ = ["TLSStream"]

#: Bytes of ciphertext received at once, and encrypted before what there is has been sent. Half of it costs a tenth more CPU
#: time, and twice as much no longer fits a processor's cache.
_PIECE = _BATCH = 128 << 10
#: Where a receive brings so much there is likely more: asking at once costs 2 us, and coming back from a poll ten times that.
_PLENTY = _PIECE // 2
#: Most bytes decrypted in one call: a peer that always has more must not keep a program for long from all else it has to do.
_MOST_AT_ONCE = 512 << 10
#: Most receives in one call, likewise: of messages of TLS's own, which bring no data, a peer may have any number.
_MOST_RECEIVES = 8
#: Unsent pieces of ciphertext, of which this stream's own user makes two at most: the rest are answers that nobody receives.
_MOST_ANSWERS = 1000
#: What it is like to send to, or to receive from, somebody who has hung up.
_HUNG_UP = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED})


class TLSStream(Stream):
    """TLS over `stream`, which belongs to it from then on and is closed with it.

    Args:
        stream: the open stream underneath; not a byte of TLS has been sent or received on it yet.
        context: what to trust, and what to show (see `nbdcore.streams.tls.contexts`).
        server_side: whether this is the server's end.
        server_hostname: the name to send to the server, and to check if the context says so.
        psk: whether the peer must prove that it knows the pre-shared key; a certificate does not do instead.
        least_bits: the secret bits that the cipher agreed on must have.

    Raises TLSError when the context offers nothing to begin a handshake with.
    """

    def __init__(
        self,
        stream: Stream,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        psk: bool = False,
        least_bits: int = 0,
    ) -> None:
        self._stream = stream
        self._psk = psk
        self._least_bits = least_bits
        self._peer = "client" if server_side else "server"
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname)
        self._ciphertext = memoryview(bytearray(_PIECE))
        self._begun = 0  # bytes at its front, of a record of which the rest has not come
        self._unsent: list[memoryview] = []
        self._kept = memoryview(b"")
        self._plenty = False  # the last receive brought much
        self._error: OSError | None = None  # met in receiving, and not raised yet
        self._established = False
        self._cut_off = False  # the stream underneath has ended
        self._ended = False  # the peer said goodbye
        self._finished = False  # this side said goodbye
        self._heard = False  # the peer sent data
        self._failed = False
        self._closed = False
        self._process = os.getpid()
        # OpenSSL's objects are for one thread at a time, and `close` may come from another.
        self._lock = threading.Lock()
        self._step()  # a client's first message is ready now, so that wants() says WRITE

    def __str__(self) -> str:
        return str(self._stream)

    @property
    def version(self) -> str | None:
        """The version of TLS in use, such as "TLSv1.3"; None before the handshake is finished."""
        return self._tls.version() if self._established else None

    @property
    def cipher(self) -> str | None:
        """The cipher suite in use, by OpenSSL's name; None before the handshake is finished."""
        cipher = self._tls.cipher() if self._established else None
        return cipher and cipher[0]

    # ------------------------------------------------------------------------------------------ the Stream's methods

    def handshake(self) -> bool:
        """Go on with the handshake, and return whether it is finished. False: wait for `wants()`, then call again.

        Raises TLSError when it failed, with the `ssl` module's error as its cause; Disconnected as the stream underneath does.
        """
        with self._lock:
            self._check_open()
            try:
                return self._shake()
            except OSError as exc:
                if not from_signal_handler(exc):
                    self._give_up(exc)
                raise

    def recv_into(self, room: memoryview) -> int | None:
        """Decrypt into `room`; None until the handshake is finished.

        Raises TLSError when TLS failed, and Disconnected when the connection broke, or ended without the peer's goodbye.
        """
        with self._lock:
            self._check_open()
            try:
                return self._receive(room)
            except OSError as exc:
                if not from_signal_handler(exc):
                    self._give_up(exc)
                raise

    def send(self, parts: Sequence[memoryview]) -> int | None:
        """Encrypt from the front of `parts`, and send. None until the handshake is finished, and while ciphertext is unsent."""
        with self._lock:
            self._check_open()
            try:
                if not self._shake() or not self._flush():
                    return None
                taken = self._encrypt(parts)
                self._flush()
            except OSError as exc:
                if not from_signal_handler(exc):
                    self._give_up(exc)
                raise
            return taken

    def fileno(self) -> int:
        """Return the descriptor of the stream underneath; -1 once closed."""
        return self._stream.fileno()

    def buffered(self) -> bool:
        """Return whether more was received than has been decrypted: a message of TLS's own, now and then, or a piece of one."""
        if self._closed:
            return False
        return self._error is not None or self._decryptable() or self._stream.buffered()

    def wants(self) -> Want:
        """Return READ until the handshake is finished, WRITE while ciphertext is unsent, and what the stream underneath wants."""
        want = self._stream.wants()
        if not self._established:
            want |= Want.READ
        if self._unsent or self._outgoing.pending:
            want |= Want.WRITE
        return want

    def finish_sending(self) -> bool:
        """Say goodbye (close_notify), then half-close the stream underneath. Bytes that the peer still sends can be received."""
        with self._lock:
            self._check_open()
            try:
                if not self._shake():
                    return False
                self._say_goodbye()
                return self._flush() and self._stream.finish_sending()
            except OSError as exc:
                if not from_signal_handler(exc):
                    self._give_up(exc)
                raise

    def hang_up(self) -> None:
        """Say goodbye if that goes through at once, and hang the stream underneath up."""
        self._leave()
        self._stream.hang_up()

    def close(self) -> None:
        """Say goodbye if that goes through at once, and close the stream underneath."""
        self._leave()
        self._stream.close()

    def _leave(self) -> None:
        left, self._closed = self._closed, True
        # When another thread is at work right now, its call is about to fail: the peer then misses the goodbye, no more. And in
        # the copy that a fork made, the connection is the parent's.
        if left or self._process != os.getpid() or not self._lock.acquire(blocking=False):
            return
        try:
            if self._established and not self._failed:
                # The peer may be gone; then nobody waits for a goodbye.
                with contextlib.suppress(OSError):
                    self._say_goodbye()
                    self._flush()
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise Disconnected(errno.ENOTCONN, f"the connection to {self} was closed by this program")

    # ------------------------------------------------------------------------------------------ the handshake

    def _shake(self) -> bool:
        """Go on with the handshake until it is finished, or must wait. Raises the error that is to be raised still."""
        if self._error is not None:
            raise self._error
        while not self._established and not self._step():
            self._flush()
            if not self._pull():
                if self._cut_off:
                    raise Disconnected(errno.ECONNRESET, f"{self} hung up during the TLS handshake")
                return False
        return True

    def _step(self) -> bool:
        """Take in what has come, make the answer, and return whether that was the handshake's end."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            # The peer is told why, if that goes through at once.
            with _if_possible():
                self._flush()
            raise self._failure(exc) from exc
        self._check_agreement()
        self._established = True
        self._flush()
        return True

    def _check_agreement(self) -> None:
        """Look at what the handshake has come to, before a byte is entrusted to it."""
        name, version, bits = self._tls.cipher() or ("no cipher", "", 0)
        # TLS 1.3 says that a key shared before was used as it says that a session is resumed, and no session was ever offered;
        # earlier versions have cipher suites of their own for it.
        if self._psk and not (self._tls.session_reused if version == "TLSv1.3" else "PSK" in name):
            raise TLSError(errno.EPROTO, f"the {self._peer}, {self}, did not prove that it knows the pre-shared key")
        if bits < self._least_bits:
            raise TLSError(
                errno.EPROTO, f"{self} chose the cipher {name} of {bits} bits, and {self._least_bits} are demanded here"
            )

    # ------------------------------------------------------------------------------------------ receiving

    def _receive(self, room: memoryview) -> int | None:
        if not self._shake():
            return None
        if self._unsent and not self._failed:
            self._flush()
        filled = self._fill(room[:_MOST_AT_ONCE])
        if filled:
            return filled
        if self._error is not None:
            raise self._error
        return self._none_or_end()

    def _fill(self, room: memoryview) -> int:
        """Receive and decrypt until `room` is full, or no more is there. An error is kept, since what came before it counts."""
        filled = 0
        try:
            for receives in range(_MOST_RECEIVES + 1):
                if receives and not self._pull():
                    break
                # Asking for more than there is costs an exception each time: 8 us, a tenth of what decrypting 100 KiB takes.
                if self._decryptable():
                    filled += self._give_kept(room[filled:]) if self._kept else self._decrypt(room[filled:])
                    if self._ended or self._error is not None or filled == len(room) or (filled and not self._plenty):
                        break
        except OSError as exc:
            if from_signal_handler(exc):
                raise
            self._error = exc
        return filled

    def _none_or_end(self) -> int | None:
        """Return what `recv_into` does when nothing is left to decrypt, and nothing more has come."""
        if self._ended:
            return 0
        if not self._cut_off:
            return None
        if not self._finished:
            raise Disconnected(
                errno.ECONNRESET, f"the connection to {self} was cut off: it ended without TLS's goodbye (close_notify)"
            )
        self._ended = True
        return 0

    def _pull(self) -> bool:
        """Receive one piece of ciphertext, and return whether anything came."""
        if self._cut_off:
            return False
        try:
            count = self._stream.recv_into(self._ciphertext[self._begun :])
        except OSError as exc:
            # What hanging up looks like when our goodbye was not received before.
            if not self._finished or exc.errno != errno.ECONNRESET or from_signal_handler(exc):
                raise
            count = 0
        self._plenty = count is not None and count >= _PLENTY
        if not count:
            self._cut_off = count == 0
            return False
        end = self._begun + count
        whole = end_of_records(self._ciphertext, end)
        self._incoming.write(self._ciphertext[:whole])
        self._ciphertext[: end - whole] = self._ciphertext[whole:end]
        self._begun = end - whole
        return True

    def _decryptable(self) -> bool:
        """Whether `_decrypt` has something to work on."""
        return bool(self._incoming.pending or self._kept or self._ended or self._tls.pending())

    def _decrypt(self, room: memoryview) -> int:
        """Fill `room` as far as what was received allows: 0 at the end or an error, and where no record is there in whole."""
        if self._ended:
            return 0
        read, incoming, size, filled = self._tls.read, self._incoming, len(room), 0
        try:
            while filled < size:
                count: int = read(size - filled, room[filled:])  # type: ignore[assignment]  # as without a buffer
                if not count:
                    self._ended = True
                    break
                filled += count
                if not incoming.pending:
                    break
        except ssl.SSLWantReadError:
            pass  # a message of TLS's own, or a piece of one
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as exc:
            self._error = self._failure(exc)
            self._error.__cause__ = exc
        finally:
            if self._outgoing.pending:
                self._answer()
        if filled:
            self._heard = True
        return filled

    def _answer(self) -> None:
        """Send the answer to a change of keys (RFC 8446 section 4.6.3), which the peer may ask for at any time."""
        if not self._flush() and len(self._unsent) > _MOST_ANSWERS:
            raise TLSError(errno.EPROTO, f"{self} asks for new keys without end, and receives none of the answers")

    def _give_kept(self, room: memoryview) -> int:
        count = min(len(room), len(self._kept))
        room[:count] = self._kept[:count]
        self._kept = self._kept[count:]
        return count

    # ------------------------------------------------------------------------------------------ sending

    def _encrypt(self, parts: Sequence[memoryview]) -> int:
        """Encrypt about a batch from the front of `parts`, and return how many bytes that took."""
        if self._finished and any(parts):
            raise Disconnected(errno.ENOTCONN, f"this program has finished sending to {self}")
        write, outgoing, taken = self._tls.write, self._outgoing, 0
        try:
            for piece in pieces(parts):
                count = write(piece)
                taken += count
                # A peer may have asked for smaller records (RFC 6066 section 4); one write makes one record.
                while count < len(piece):
                    more = write(memoryview(piece)[count:])
                    count += more
                    taken += more
                if outgoing.pending >= _BATCH:
                    break
        except ssl.SSLError as exc:
            raise self._failure(exc) from exc
        return taken

    def _flush(self) -> bool:
        """Send ciphertext, and return whether nothing is left unsent."""
        if self._outgoing.pending:
            self._unsent.append(memoryview(self._outgoing.read()))
        while self._unsent:
            count = self._stream.send(self._unsent)
            if count is None:
                return False
            while self._unsent and count >= len(self._unsent[0]):
                count -= len(self._unsent.pop(0))
            if count:
                self._unsent[0] = self._unsent[0][count:]
        owed = self._stream.wants()
        if owed is not Want.NOTHING and owed & Want.WRITE:  # operations on flags are slow
            self._stream.send([])
        return True

    def _say_goodbye(self) -> None:
        if self._finished:
            return
        # The `ssl` module's unwrap also looks for the peer's goodbye, and takes data that comes before it for a mistake. So what
        # was received is put aside meanwhile, decrypted or not.
        if pending := self._tls.pending():
            self._kept = memoryview(bytes(self._kept) + self._tls.read(pending))
        received = self._incoming.read()
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass  # said, and not answered yet
        except ssl.SSLError as exc:
            raise self._failure(exc) from exc
        finally:
            self._incoming.write(received)
        self._finished = True

    # ------------------------------------------------------------------------------------------ failures

    def _give_up(self, exc: OSError) -> None:
        """The connection failed: raise what says more than `exc` does, where there is anything."""
        self._failed = True
        if isinstance(exc, TLSError) or exc.errno not in _HUNG_UP:
            return
        self._look_for_alert()
        # A server that refuses this client may just hang up, and with TLS 1.3 the client's handshake is finished by then.
        if not self._established or (self._peer == "server" and not self._heard):
            when = "right after" if self._established else "during"
            if self._psk:
                why = "user name and pre-shared key are those it has"
            elif self._peer == "server":
                why = "it demands a client certificate or a pre-shared key"
            else:
                why = "it trusts the certificate of this side"
            raise TLSError(
                exc.errno, f"the {self._peer}, {self}, hung up {when} the TLS handshake; its log may say why: see whether {why}"
            ) from exc

    def _look_for_alert(self) -> None:
        """Read what the peer had to say before it hung up, and raise it if it is a reason."""
        try:
            with _if_possible():
                while self._pull():
                    pass
            # What the peer answered before counts: it is for the next `recv_into`.
            while data := self._tls.read(RECORD):
                self._kept = memoryview(bytes(self._kept) + data)
                self._heard = True
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return
        except ssl.SSLError as exc:
            raise self._failure(exc) from exc

    def _failure(self, exc: ssl.SSLError) -> TLSError:
        reason = explain(exc, self._peer, self._tls.server_hostname, psk=self._psk)
        doing = "TLS" if self._established else "the TLS handshake"
        return TLSError(errno.EPROTO, f"{doing} with {self} failed: {reason}")


@contextlib.contextmanager
def _if_possible() -> Iterator[None]:
    """Do something that may fail, where a better error is about to be raised."""
    try:
        yield
    except OSError as exc:
        if from_signal_handler(exc):
            raise
