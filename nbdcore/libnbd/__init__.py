"""A drop-in for libnbd's Python module: `import nbdcore.libnbd as nbd`.

All of libnbd's API under its own names, on nbdcore's clients. Where libnbd's behaviour is a defect the right thing is done
instead; each such difference is listed in the documentation. `install()` makes a plain `import nbd` find this module.
"""

from __future__ import annotations

from nbdcore.libnbd import constants as _constants
from nbdcore.libnbd.alias import install
from nbdcore.libnbd.buffer import Buffer
from nbdcore.libnbd.constants import *  # noqa: F403 (constants are numbers and names of libnbd's own, and `NAMES` lists them)
from nbdcore.libnbd.errors import ClosedHandle, Error
from nbdcore.libnbd.handle import NBD, PACKAGE_NAME, VERSION, nbd

package_name = PACKAGE_NAME
__version__ = VERSION

__all__ = ["NBD", "Buffer", "ClosedHandle", "Error", "install", "nbd", "package_name"]
__all__.extend(_constants.NAMES)  # noqa: PYI056 (at a `+=` of names it cannot see, the one that draws the docs stops)
