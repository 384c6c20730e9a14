"""Another platform, as far as a name can be taken away: run as `python -m tests.portability.elsewhere PYTEST_ARGUMENTS`.

Takes from this process what macOS or Windows lack, before anything of nbdcore or of the tests is imported, and then runs pytest.
"""

from __future__ import annotations

import importlib
import sys

#: Module -> names that not every platform has.
ABSENT = {
    "socket": ("AF_UNIX", "AF_VSOCK", "VMADDR_CID_ANY", "VMADDR_CID_HOST", "VMADDR_PORT_ANY", "MSG_NOSIGNAL"),
    "select": ("poll", "epoll"),
    "os": ("SEEK_DATA", "SEEK_HOLE", "fdatasync", "posix_fadvise", "posix_fallocate", "pread", "pwrite", "preadv", "pwritev"),
}
#: Modules that not every platform has.
MISSING = ("fcntl", "resource", "termios")


def take_away() -> None:
    for module in MISSING:
        sys.modules[module] = None
    for module, names in ABSENT.items():
        loaded = importlib.import_module(module)
        for name in names:
            if hasattr(loaded, name):
                delattr(loaded, name)


if __name__ == "__main__":
    take_away()
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
