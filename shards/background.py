"""Work that should not be felt by others."""

import os
import sys
import threading
from importlib import import_module

_NICE = 5


def step_back() -> None:
    """Give the calling thread a third of the weight of others, where threads have weights (Linux).

    Not the lowest: a thread that hardly ever runs may keep the interpreter's lock from those that serve, and
    would need minutes for what must be done in seconds (docs/decisions/0011-staging-steps-back.md).
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)


def import_stepped_back(module: str) -> None:
    """Import a module without being felt by who serves on the same cores; blocks until that is done.

    Most of the start of a process is importing torch. What goes wrong is for the next import to raise.
    """

    def run() -> None:
        step_back()
        import_module(module)

    thread = threading.Thread(target=run, name=f"import {module}")
    thread.start()
    thread.join()
