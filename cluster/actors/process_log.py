"""Where a process of ours writes what it has to say."""

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"


def log_to_stderr() -> None:
    """Write warnings, and tracebacks that nobody caught, to this process's `worker-*-PID.err`.

    To be called first of all. In a replica, Serve has put a logger of its own in the place of sys.stderr by
    then, and drops what comes that way unless every request is logged, too.
    """
    sys.stderr = sys.__stderr__
    logging.basicConfig(stream=sys.__stderr__, format=_FORMAT)
