"""Where our processes have their Unix sockets. Imports little: whoever only starts a worker needs it, too."""

import os
import tempfile
from pathlib import Path


def socket_folder() -> Path:
    """Return this user's folder for sockets on this node; it need not be there yet."""
    return Path(tempfile.gettempdir()) / f"tradewind-{os.getuid()}"
