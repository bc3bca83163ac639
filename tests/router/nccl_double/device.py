"""A GPU of the double, and the module through which its process calls NCCL."""

import os
import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tests.router.nccl_double.communicator import Clique, DoubleCommunicator
from tests.router.nccl_double.stream import DoubleStream

NCCL_UNIQUE_ID_BYTES = 128
_GARBAGE = 0xA5


class DoubleNccl:
    """The module `cupy.cuda.nccl`, as one process sees it."""

    NCCL_UINT8, NCCL_FLOAT32, NCCL_BFLOAT16 = 1, 7, 9

    def __init__(self, device: "DoubleDevice") -> None:
        self._world = device.world
        self._version = 23203
        self.NcclCommunicator = partial(DoubleCommunicator, device)

    def get_version(self) -> int:
        return self._version

    def get_unique_id(self) -> bytes:
        unique_id = os.urandom(NCCL_UNIQUE_ID_BYTES)
        self._world.cliques[unique_id] = Clique()
        return unique_id

    def groupStart(self) -> None:
        self._world.start_group()

    def groupEnd(self) -> None:
        self._world.end_group()


class OwnedLock:
    """A lock that knows who holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner: threading.Thread | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self.owner = threading.current_thread()

    def __exit__(self, *error: object) -> None:
        self.owner = None
        self._lock.release()


class DoubleDevice:
    """Implements `Device` in host memory: one process with its GPU."""

    def __init__(self, world, name: str) -> None:
        self.world, self.name, self.is_dead = world, name, False
        self.launching = OwnedLock()
        self.nccl = DoubleNccl(self)
        self.allocated: list[int] = []  # bytes
        self.free_bytes = 2**40
        self._memory: list[weakref.ref] = []
        self._current = DoubleStream(self)

    @contextmanager
    def use(self) -> Iterator[None]:
        before = getattr(self.world.current, "device", None)
        self.world.current.device = self
        try:
            yield
        finally:
            self.world.current.device = before

    def check_current(self, call: str) -> None:
        if getattr(self.world.current, "device", None) is not self:
            where = "".join(traceback.format_stack(limit=10))
            self.world.violate(f"{call}, but another device is current\n{where}")

    def empty(self, num_bytes: int) -> Tensor:
        if num_bytes > self.free_bytes:
            raise torch.OutOfMemoryError(f"{self.name} is out of memory")
        memory = np.full(num_bytes, _GARBAGE, np.uint8)
        self.allocated.append(num_bytes)
        self._memory.append(weakref.ref(memory))  # the tensors over it keep it alive
        return torch.from_numpy(memory)

    def new_stream(self) -> DoubleStream:
        return DoubleStream(self)

    def current_stream(self) -> DoubleStream:
        return self._current

    def holds(self, pointer: int, num_bytes: int) -> bool:
        arrays = [array for reference in self._memory if (array := reference()) is not None]
        starts = [(array.ctypes.data, array.nbytes) for array in arrays]
        return any(start <= pointer and pointer + num_bytes <= start + size for start, size in starts)

    def die(self) -> None:
        """Stop for ever, as when the process is killed."""
        with self.world.changed:
            self.is_dead = True
