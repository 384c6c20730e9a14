"""libnbd's constants, as it gives them to Python: plain numbers and strings, without the prefix LIBNBD_.

The numbers are libnbd's own ABI and will not change; where the specification has one too, it is the same.
"""

from __future__ import annotations

# --- TLS, for set_tls and set_uri_allow_tls ---
TLS_DISABLE = 0
TLS_ALLOW = 1
TLS_REQUIRE = 2

# --- get_block_size ---
SIZE_MINIMUM = 0
SIZE_PREFERRED = 1
SIZE_MAXIMUM = 2
SIZE_PAYLOAD = 3

# --- flags of commands ---
CMD_FLAG_FUA = 1
CMD_FLAG_NO_HOLE = 2
CMD_FLAG_DF = 4
CMD_FLAG_REQ_ONE = 8
CMD_FLAG_FAST_ZERO = 16
CMD_FLAG_PAYLOAD_LEN = 32
CMD_FLAG_MASK = 63

# --- set_handshake_flags ---
HANDSHAKE_FLAG_FIXED_NEWSTYLE = 1
HANDSHAKE_FLAG_NO_ZEROES = 2
HANDSHAKE_FLAG_MASK = 3

# --- set_strict_mode ---
STRICT_COMMANDS = 1
STRICT_FLAGS = 2
STRICT_BOUNDS = 4
STRICT_ZERO_SIZE = 8
STRICT_ALIGN = 16
STRICT_PAYLOAD = 32
STRICT_AUTO_FLAG = 64
STRICT_MASK = 127

# --- set_uri_allow_transports ---
ALLOW_TRANSPORT_TCP = 1
ALLOW_TRANSPORT_UNIX = 2
ALLOW_TRANSPORT_VSOCK = 4
ALLOW_TRANSPORT_SSH = 8
ALLOW_TRANSPORT_MASK = 15

# --- shutdown ---
SHUTDOWN_ABANDON_PENDING = 65536
SHUTDOWN_MASK = 65536

# --- aio_get_direction ---
AIO_DIRECTION_READ = 1
AIO_DIRECTION_WRITE = 2
AIO_DIRECTION_BOTH = 3

# --- what a chunk callback is told ---
READ_DATA = 1
READ_HOLE = 2
READ_ERROR = 3

# --- metadata contexts, and flags of extents ---
NAMESPACE_BASE = "base:"
CONTEXT_BASE_ALLOCATION = "base:allocation"
STATE_HOLE = 1
STATE_ZERO = 2

NAMESPACE_QEMU = "qemu:"
CONTEXT_QEMU_DIRTY_BITMAP = "qemu:dirty-bitmap:"  # a prefix: the bitmap's name follows
STATE_DIRTY = 1
CONTEXT_QEMU_ALLOCATION_DEPTH = "qemu:allocation-depth"

#: Every constant, as `nbdcore.libnbd` exports them.
NAMES = sorted(name for name in globals() if name.isupper())
