"""Work that should not be felt by others."""

import os
import sys
import threading

_NICE = 5


def step_back() -> None:
    """Give the calling thread a third of the weight of others, where threads have weights (Linux).

    Not the lowest: a thread that hardly ever runs may keep the interpreter's lock from those that serve, and
    would need minutes for what must be done in seconds (docs/decisions/0011-staging-steps-back.md).
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
