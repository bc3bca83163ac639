"""A GPU, as far as links and groups use it."""

import threading
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in a stream. Implemented by `torch.cuda.Event`."""

    def query(self) -> bool:
        """Return whether the device got there, without blocking."""

    def synchronize(self) -> None:
        """Block until the device got there, without a limit and without spinning."""


class Stream(Protocol):
    """Work in order, on the device. Implemented by `torch.cuda.Stream`."""

    @property
    def cuda_stream(self) -> int:
        """Its handle in CUDA."""

    def wait_stream(self, stream: Any) -> None:
        """Let later work wait for what is in `stream` now; the host does not wait."""

    def record_event(self) -> Event:
        """Return an event behind all that is in this stream now."""


class Device(Protocol):
    """The seam below NCCL: the tests put a double here that checks every call against NCCL's rules."""

    nccl: Any  # the module `cupy.cuda.nccl`, which has no types
    # Held around calls that put NCCL's kernels on the device, so that one thread does at a time; but not
    # around a first exchange, which may block until the peer makes its own.
    launching: AbstractContextManager[object]

    def use(self) -> AbstractContextManager[None]:
        """Make this the calling thread's current device."""

    def empty(self, num_bytes: int) -> Tensor:
        """Return fresh memory of the device, as a flat uint8 tensor."""

    def new_stream(self) -> Stream:
        """Return a stream that nobody else uses."""

    def current_stream(self) -> Stream:
        """Return the stream that the calling thread computes on."""


class CudaDevice:
    """Implements `Device`; needs the `gpu` extra."""

    def __init__(self, ordinal: int) -> None:
        """Use the GPU that CUDA numbers `ordinal`. Raises RuntimeError without the `gpu` extra."""
        try:
            from cupy import cuda
            from cupy.cuda import nccl
        except ImportError as error:
            raise RuntimeError(f"NCCL needs the gpu extra: pip install 'tradewind[gpu]' ({error})") from error
        if not nccl.available:
            raise RuntimeError("cupy finds no NCCL library; run pip install nvidia-nccl-cu13")
        self._cuda: Any = cuda
        self._device = torch.device("cuda", ordinal)
        self.nccl: Any = nccl
        self.launching: AbstractContextManager[object] = threading.Lock()

    def use(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self._device)

    def empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def new_stream(self) -> Stream:
        with self.use():
            return _OwnStream(self._cuda, self._device)

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self._device)


class _OwnStream:
    """A stream that cupy made.

    Not one of torch's pool: that hands the same 32 out again and again, and two communicators on one stream
    would wait for each other's peers. Above the priority of torch's (0), so that NCCL's few blocks go first.
    """

    def __init__(self, cuda: Any, device: torch.device) -> None:
        self._owner = cuda.Stream(non_blocking=True, priority=-1)
        self._torch_cuda: Any = torch.cuda  # streams and events have no types
        self._stream: Any = self._torch_cuda.ExternalStream(self._owner.ptr, device)
        self.cuda_stream: int = self._owner.ptr

    def wait_stream(self, stream: Any) -> None:
        self._stream.wait_stream(stream)

    def record_event(self) -> Event:
        # By default, who waits for an event spins.
        event: Event = self._stream.record_event(self._torch_cuda.Event(blocking=True))
        return event
