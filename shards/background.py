"""Work that should not be felt by others."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_NICE = 10
# One thread, of the whole process, since it is the only one that a process that steps back can leave behind.
_FOREGROUND = ThreadPoolExecutor(1, "foreground")


def step_back() -> None:
    """Give the calling thread a ninth of the weight of others, where threads have weights (Linux).

    Not the lowest: a thread that hardly ever runs may keep the interpreter's lock from those that serve, and
    would need minutes for what must be done in seconds (docs/decisions/0011-staging-steps-back.md).
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)


def step_back_whole() -> None:
    """Have the calling thread, and all that it will start, step back; `in_foreground` leads to where it was.

    For the first lines of a process. Priority that is given up can't be had back without privileges, but a
    thread that was there before keeps it, and hands it on to the threads that it starts.
    """
    in_foreground(lambda: None)  # there is a thread from now on
    step_back()


def in_foreground(work: Callable[[], T]) -> T:
    """Run `work` where the process has not stepped back, and return what it does, or raise what it raises.

    Threads that `work` starts stay in the foreground. Blocks on it, and on what others do there meanwhile.
    """
    return _FOREGROUND.submit(work).result()
