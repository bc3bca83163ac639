"""A place to make things from as a process does whose start steps back."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shards.background import in_foreground, step_back

T = TypeVar("T")


def made_stepped_back(make: Callable[[], T]) -> T:
    """Return what `make` makes in a thread that has stepped back, with a foreground that has not."""

    def run() -> T:
        step_back()
        return make()

    in_foreground(lambda: None)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def is_in_foreground(name: str) -> bool:
    """Say whether the youngest thread of this name has the priority that this one has."""
    thread = [each for each in threading.enumerate() if each.name == name][-1]
    assert thread.native_id
    return os.getpriority(os.PRIO_PROCESS, thread.native_id) == os.getpriority(os.PRIO_PROCESS, 0)
