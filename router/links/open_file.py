"""A file that may travel between two processes of a host."""

import os
from collections.abc import Callable


class OpenFile:
    """Owns a file descriptor: it is closed when nobody refers to this any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # also while the interpreter ends
        close(self._descriptor)
