"""An NBD URI, taken apart and put together again: `scheme://user@host:port/export?name=value`.

Written after doc/uri.md of the NBD specification and RFC 3986. A URI is data: a frozen, picklable value that holds no socket.
This module knows what every NBD URI has in common, and nothing of transports: which schemes exist, which port is too large and
which query parameters mean something is theirs to say, so that a stranger's scheme parses like a built-in one.

Percent escapes are decoded exactly once, piece by piece, after the text was cut at its delimiters. Bytes that are no UTF-8 become
surrogate escapes, as file names do. A `+` is a plus sign: NBD URIs are no HTML forms. Parsing is strict where leniency would let
two programs read one text as two servers: raw spaces, control and non-ASCII characters, broken escapes, NUL and fragments are
errors.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from nbdcore.errors import UsageError, printable

__all__ = ["DEFAULT_PORT", "TLS_PARAMETERS", "URI", "VSOCK_HOST", "format_uri", "is_uri", "parse_uri"]

#: The port of NBD that IANA assigned (doc/uri.md), for TCP; every NBD server on vsock uses it too.
DEFAULT_PORT = 10809
#: VMADDR_CID_HOST: seen from a virtual machine, the machine that runs it; what vsock connects to where no other CID is named.
VSOCK_HOST = 2

#: Query parameters about TLS. Every transport accepts them: what they mean is not the transport's business. The first three are
#: doc/uri.md's, the others libnbd's.
TLS_PARAMETERS = (
    "tls-type",
    "tls-hostname",
    "tls-verify-peer",
    "tls-certificates",
    "tls-psk-file",
    "tls-username",
    "tls-priority",
)

# Strings, since re compiles them on first use and keeps them: compiling all three here costs `import nbdcore` half a millisecond.
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"  # RFC 3986 section 3.1
_BAD_ESCAPE = r"%(?![0-9A-Fa-f]{2}).{0,2}"
_ESCAPE = rb"%([0-9A-Fa-f]{2})"
# A port of more digits fits no transport; the limit keeps int() from refusing an absurd one in words of its own.
_PORT_DIGITS = 20

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")  # RFC 3986 section 2.3
_SAFE_IN_USER = _UNRESERVED | frozenset(b":")
_SAFE_IN_ADDRESS = _UNRESERVED | frozenset(b":")
_SAFE_IN_PATH = _UNRESERVED | frozenset(b"/:@!$&'()*+,;=")
_SAFE_IN_QUERY = _UNRESERVED | frozenset(b"/:@!$'()*,?")  # without the separators, and without + which others take for a space


@dataclass(frozen=True, slots=True)
class URI:
    """The pieces of an NBD URI, decoded. `str(uri)` is an equivalent URI: `parse_uri(str(uri)) == uri`.

    Attributes:
        scheme: in lower case, as the text has it: "nbd", "nbds+unix".
        user: the whole userinfo (a TLS user name), or None where there is none.
        host: host name or address without brackets, or None where it is absent or empty.
        port: any decimal number, or None. The transport checks its range: vsock's ports have 32 bits.
        export: the path without its one leading slash; "" names the default export.
        query: (name, value) pairs in the text's order, names in lower case.
    """

    scheme: str
    user: str | None = None
    host: str | None = None
    port: int | None = None
    export: str = ""
    query: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(_SCHEME, self.scheme) or not self.scheme.islower():
            raise _wrong(f"the scheme {printable(self.scheme)!r} must be lower-case letters, digits, '+', '-' and '.'")
        _refuse_nul("user name", self.user or "")
        _refuse_nul("host", self.host or "")
        _refuse_nul("export name", self.export)
        for name, value in self.query:
            _refuse_nul("query parameter's name", name)
            # A leading NUL marks a Linux abstract socket name (doc/uri.md, "socket parameter").
            _refuse_nul(f"value of {printable(name)!r}", value.removeprefix("\0") if name == "socket" else value)

    @property
    def tls(self) -> bool:
        """Whether the scheme demands TLS: "nbds" or "nbds+anything"."""
        return self.scheme.partition("+")[0] == "nbds"

    @property
    def with_tls(self) -> URI:
        """The same URI with a scheme that demands TLS."""
        return self if self.tls else replace(self, scheme=self.scheme.replace("nbd", "nbds", 1))

    @property
    def transport_scheme(self) -> str:
        """The scheme without TLS, by which a transport is found: "nbd", "nbd+unix", "nbd+vsock", or a third party's own."""
        return "nbd" + self.scheme.removeprefix("nbds") if self.tls else self.scheme

    def parameter(self, name: str) -> str | None:
        """Return the value of a query parameter, "" where it has none, None where it is absent; of several the last one."""
        wanted = name.lower()
        return next((value for key, value in reversed(self.query) if key == wanted), None)

    def check_parameters(self, known: Collection[str] = ()) -> None:
        """Raise UsageError if the query has a parameter that nobody understands, so that no misspelt `tls-` lowers security.

        Understood are those in `known` (the transport's own, in lower case) and TLS_PARAMETERS; experimental ones, whose names
        begin with `x-`, are let pass.
        """
        understood = {*known, *TLS_PARAMETERS}
        unknown = [name for name, _ in self.query if name not in understood and not name.startswith("x-")]
        if unknown:
            listed = ", ".join(dict.fromkeys(printable(name) for name in unknown))
            raise _wrong(
                f"{self.scheme} URIs have no query parameter {listed}; "
                f"known are {', '.join((*sorted(known), *TLS_PARAMETERS))} (write %3F for a '?' in the export name)"
            )

    def __str__(self) -> str:
        authority = "" if self.user is None else _quoted(self.user, _SAFE_IN_USER) + "@"
        if self.host is not None:
            is_address = ":" in self.host
            host = _quoted(self.host, _SAFE_IN_ADDRESS if is_address else _UNRESERVED)
            authority += f"[{host}]" if is_address else host
        if self.port is not None:
            authority += f":{self.port}"
        pairs = (f"{_quoted(name, _SAFE_IN_QUERY)}={_quoted(value, _SAFE_IN_QUERY)}" for name, value in self.query)
        query = "&".join(pairs)
        return f"{self.scheme}://{authority}/{_quoted(self.export, _SAFE_IN_PATH)}" + (f"?{query}" if query else "")


def is_uri(text: str) -> bool:
    """Tell whether `text` is meant as a URI (a scheme, then `://`) rather than as a file or host name; it may be a wrong one."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and re.fullmatch(_SCHEME, scheme) is not None


def parse_uri(text: str) -> URI:
    """Take an NBD URI apart. Raises UsageError (EINVAL) that names the piece that is wrong and says what to write instead."""
    _refuse_raw_characters(text)
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(_SCHEME, scheme):
        raise _wrong(f"{printable(text)!r} is no NBD URI: {_advice(text)}")
    rest, hash_sign, fragment = rest.partition("#")
    if hash_sign:
        raise _wrong(f"an NBD URI has no fragment ({printable('#' + fragment)!r}): write %23 for a '#' in a name")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    user, host, port = _authority(authority)
    return URI(
        scheme=scheme.lower(),
        user=user,
        host=host,
        port=port,
        export=_decoded("export name", path),
        query=tuple(_query(query)),
    )


def format_uri(
    scheme: str,
    *,
    host: str | None = None,
    port: int | None = None,
    export: str = "",
    query: Iterable[tuple[str, str]] = (),
) -> str:
    """Return the URI of these decoded pieces, each percent-encoded as its place needs. Raises UsageError for a NUL in one."""
    return str(URI(scheme=scheme, host=host, port=port, export=export, query=tuple(query)))


def _authority(text: str) -> tuple[str | None, str | None, int | None]:
    """Cut `user@host:port` (RFC 3986 section 3.2); every part may be absent."""
    user, at_sign, address = text.rpartition("@")
    if "@" in user:
        raise _wrong(f"more than one '@' before the host in {printable(text)!r}: write %40 for one that belongs to the user name")
    if address.startswith("["):
        literal, bracket, port = address[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise _wrong(f"the address in {printable(address)!r} must be closed by ']', with nothing but ':PORT' behind it")
        host = _ipv6_address(literal)
        port = port.removeprefix(":")
    else:
        name, _, port = address.partition(":")
        if ":" in port:
            raise _wrong(f"too many ':' in {printable(address)!r}: write an IPv6 address in brackets, as in [::1]:10809")
        host = _host_name(name)
    return (_decoded("user name", user) if at_sign else None), host or None, _port(port)


def _ipv6_address(literal: str) -> str:
    import ipaddress  # only such URIs pay for it

    address = _decoded("address", literal)
    try:
        ipaddress.IPv6Address(address)
    except ValueError as error:
        raise _wrong(f"[{printable(literal)}] is no IPv6 address: {printable(str(error))}") from error
    return address


def _host_name(text: str) -> str:
    host = _decoded("host", text)
    if host.startswith("-"):
        raise _wrong(f"the host {printable(host)!r} begins with '-': no host name does, and a program would read an option")
    wrong = next((char for char in host if char in ":[]/\\@" or char.isspace() or not char.isprintable()), None)
    if wrong is not None and wrong != "\0":  # NUL is the value's own check
        raise _wrong(f"the host {printable(host)!r} holds {printable(wrong)!r}: a host name has no such character")
    return host


def _port(digits: str) -> int | None:
    if not digits:
        return None
    if not digits.isdecimal() or len(digits.lstrip("0")) > _PORT_DIGITS:
        raise _wrong(f"the port {printable(digits)!r} must be a decimal number, such as 10809")
    return int(digits)


def _query(text: str) -> Iterable[tuple[str, str]]:
    for piece in re.split("[&;]", text):
        if not piece:
            continue
        name, _, value = piece.partition("=")
        if not name:
            raise _wrong(f"the query parameter {printable(piece)!r} has no name: write NAME=VALUE")
        yield _decoded("query", name).lower(), _decoded(f"value of {printable(name)!r}", value)


def _decoded(what: str, text: str) -> str:
    """Undo percent escapes, once (RFC 3986 section 2.1)."""
    bad = re.search(_BAD_ESCAPE, text)
    if bad:
        raise _wrong(f"{bad[0]!r} in the {what} is no percent escape: write % and two hex digits, or %25 for a plain '%'")
    octets = re.sub(_ESCAPE, lambda escape: bytes((int(escape[1], 16),)), text.encode("ascii"))
    return octets.decode("utf-8", "surrogateescape")


def _quoted(text: str, safe: frozenset[int]) -> str:
    try:
        octets = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise _wrong(f"{text!r} cannot be written in a URI: it holds half of a surrogate pair") from error
    return "".join(chr(octet) if octet in safe else f"%{octet:02X}" for octet in octets)


def _refuse_raw_characters(text: str) -> None:
    wrong = next((char for char in text if not "!" <= char <= "~"), None)
    if wrong is not None:
        escapes = "".join(f"%{octet:02X}" for octet in wrong.encode("utf-8", "surrogatepass"))
        hint = "a NUL belongs in no name" if wrong == "\0" else f"write {escapes}"
        raise _wrong(f"a URI cannot hold the character {wrong!r} as it is ({printable(text)!r}): {hint}")


def _refuse_nul(what: str, text: str) -> None:
    if "\0" in text:
        raise _wrong(f"the {what} holds a NUL character (%00), which no name may hold")


def _advice(text: str) -> str:
    if text.startswith(("/", "./", "../")):
        return f"for a unix socket write nbd+unix:///EXPORT?socket={printable(text)}"
    scheme, colon, _ = text.partition(":")
    if colon and scheme.partition("+")[0].lower() in ("nbd", "nbds"):
        return f"'//' is missing after '{scheme}:'; write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
    return "write nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH or nbd+vsock://CID:PORT/EXPORT"


def _wrong(message: str) -> UsageError:
    return UsageError(errno.EINVAL, message)
