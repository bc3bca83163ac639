"""What this process has open: files, sockets and threads."""

import gc
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Belongings:
    """The files and threads of one moment."""

    files: frozenset[str]
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls) -> "Belongings":
        gc.collect()
        files = set()
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the listing itself
                files.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        return cls(frozenset(files), frozenset(threading.enumerate()))

    def leaks(self) -> list[tuple[str, str]]:
        """Return what is there now and was not then; threads on their way out are waited for."""
        deadline = time.monotonic() + 2
        for thread in threading.enumerate():
            if thread not in self.threads and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        now = Belongings.now()
        leaks = [("threads", thread.name) for thread in now.threads - self.threads]
        return leaks + [("fds", file) for file in sorted(now.files - self.files)]
