"""Run by a Python that has no vsock transport: connecting must say why; prints what it says."""

from __future__ import annotations

import errno

import nbdcore

try:
    nbdcore.connect_vsock(cid=1, port=10809, timeout=20)
except nbdcore.TransportUnavailable as error:
    print(errno.errorcode[error.errno], error)
