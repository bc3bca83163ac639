"""One NCCL communicator that waits for nobody longer than it should."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from router.device import Device, Event
from router.links.base import DeviceRows, Dtype

_LOOK_S = 0.005  # how often an opening communicator looks whether it is open, or still wanted
_WATCH_S = 1.0  # how often, at least, an open one looks for errors of the network
_ABORT_PATIENCE_S = 1.0  # for a thread of ours to return from NCCL by itself


class CommunicatorLost(ConnectionError):
    """A rank is gone, did not come in time, or NCCL failed; this communicator will not come back."""


@dataclass
class _Operation:
    deadline: float
    memory: object  # what the device reads or writes until then
    done: Event | None = None  # behind the operation; None until NCCL has taken it

    def is_done(self) -> bool:
        return self.done is not None and self.done.query()


class Communicator:
    """The place of one rank in an NCCL communicator, and the stream on which its operations run in order.

    NCCL offers through cupy only calls that may block for ever, on the host (to open, and in the first
    exchange of two ranks, which connects them) or on the device (for a rank that never comes), and one
    remedy, `abort`. So each communicator has a thread of its own that opens it, watches what runs, and aborts
    it; the others only put operations on the stream, one thread at a time, and ask whether they are done.
    What aborting may wait for (docs/gpu.md), only that thread waits for.
    """

    def __init__(
        self,
        device: Device,
        unique_id: bytes,
        rank: int,
        size: int,
        first: Callable[["Communicator"], None],
        *,
        open_timeout_s: float,
        timeout_s: float,
        on_lost: Callable[[], None] = lambda: None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Wait until all ranks are there and have run `first`, the same operation on all of them, to connect.

        An operation that takes longer than `timeout_s` loses the communicator; `on_lost` is then called, from
        another thread. Raises CommunicatorLost after `open_timeout_s`, or when `is_wanted` says so. If a rank
        dies while all open, the thread that opens stays blocked in NCCL: nothing can end that.
        """
        self.rank, self.size = rank, size
        self._device = device
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._lost: str | None = None  # why
        self._comm: Any = None  # a cupy.cuda.nccl.NcclCommunicator
        self._stream = device.new_stream()
        self._in_nccl = threading.Lock()  # one thread at a time
        self._abort_once = threading.Lock()  # held for ever by who aborts
        self._running: deque[_Operation] = deque()
        self._opened, self._ended = threading.Event(), threading.Event()
        threading.Thread(
            target=self._live, args=(unique_id, size, first), name=f"nccl rank {rank} of {size}", daemon=True
        ).start()
        deadline = time.monotonic() + open_timeout_s
        while not self._opened.wait(_LOOK_S):
            if time.monotonic() > deadline:
                self._lose(f"not all {size} ranks came within {open_timeout_s:g} s")
            elif not is_wanted():
                self._lose("it is not wanted any more")
            else:
                continue
            # The other thread may hang in the first exchange.
            threading.Thread(target=self._abort, name="nccl abort", daemon=True).start()
            break
        self.check()

    def send(self, rows: DeviceRows, dtype: Dtype, peer: int) -> None:
        """Send to rank `peer`, behind what the calling thread's current stream holds; keep `rows` so long."""
        count = rows.nbytes // dtype.element_bytes
        self._start(
            lambda stream: self._comm.send(rows.data_ptr(), count, self._nccl(dtype), peer, stream), rows
        )

    def receive(self, rows: DeviceRows, dtype: Dtype, peer: int) -> Event:
        """Receive all of `rows` from rank `peer`, behind what the calling thread's current stream holds.

        Returns the event behind it, which comes also when the communicator is lost.
        """
        count = rows.nbytes // dtype.element_bytes
        return self._start(
            lambda stream: self._comm.recv(rows.data_ptr(), count, self._nccl(dtype), peer, stream), rows
        )

    def all_gather(self, parts: DeviceRows) -> None:
        """Fill `parts`: one per rank, of equal size and in their order; this rank's own is there already."""
        count = parts.nbytes // self.size
        own, all_parts = parts.data_ptr() + self.rank * count, parts.data_ptr()
        uint8 = self._nccl(Dtype.UINT8)
        self._start(lambda stream: self._comm.allGather(own, all_parts, count, uint8, stream), parts)

    def check(self) -> None:
        """Raise CommunicatorLost if it is lost; from any thread."""
        if self._lost is not None:
            raise CommunicatorLost(self._lost)

    def is_idle(self) -> bool:
        """Return whether all operations are done, without blocking. Raises CommunicatorLost."""
        try:
            while self._running and self._running[0].is_done():
                self._running.popleft()
        except RuntimeError as error:  # of the device
            self._lose(repr(error))
        idle = not self._running
        self.check()  # last: aborting ends operations, too, and what those leave is worth nothing
        return idle

    def wait(self) -> None:
        """Wait until all operations are done. Raises CommunicatorLost."""
        began = time.monotonic()
        while not self.is_idle():
            # Most take less than a millisecond, and then the thread had better be here.
            time.sleep(0 if time.monotonic() - began < 0.001 else 0.0001)

    def close(self) -> None:
        """Give the communicator up, with all that runs on it, without waiting. Closing twice does no harm."""
        self._lose("it was closed on this side")

    def _nccl(self, dtype: Dtype) -> int:
        code: int = getattr(self._device.nccl, f"NCCL_{dtype.name}")
        return code

    def _start(self, call: Callable[[int], None], memory: object) -> Event:
        self.check()
        operation = _Operation(time.monotonic() + self._timeout_s, memory)
        self._running.append(operation)  # before the call, which may block
        try:
            with self._in_nccl, self._launching(), self._device.use():
                self.check()
                self._stream.wait_stream(self._device.current_stream())
                call(self._stream.cuda_stream)
                operation.done = self._stream.record_event()
                return operation.done
        except (RuntimeError, KeyError) as error:  # KeyError: from cupy, for an error that it has no name for
            self._lose(repr(error))
            raise CommunicatorLost(self._lost) from error

    def _launching(self) -> AbstractContextManager[object]:
        # Not while opening, when the call may block until the peer makes its own.
        return self._device.launching if self._opened.is_set() else nullcontext()

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
        self._ended.set()

    def _live(self, unique_id: bytes, size: int, first: Callable[["Communicator"], None]) -> None:
        try:
            with self._device.use():
                self._comm = self._device.nccl.NcclCommunicator(size, unique_id, self.rank)
                first(self)
                self.wait()
                self._opened.set()
                while not self._ended.wait(min(self._timeout_s / 4, _WATCH_S)):
                    self._watch()
        except CommunicatorLost as error:
            self._lose(str(error))
        except Exception as error:  # whatever it is: nothing else would bound the others' waiting
            self._lose(repr(error))
        self._opened.set()
        self._on_lost()
        self._abort()

    def _watch(self) -> None:
        # A copy: other threads add and remove. What is done stays in there until somebody asks.
        running = next((each for each in tuple(self._running) if not each.is_done()), None)
        if running is None:
            return
        if time.monotonic() > running.deadline:
            raise CommunicatorLost(f"the other side did not take part within {self._timeout_s:g} s")
        if self._in_nccl.acquire(blocking=False):
            try:
                self._comm.check_async_error()
            finally:
                self._in_nccl.release()

    def _abort(self) -> None:
        if self._comm is None or not self._abort_once.acquire(blocking=False):
            return
        # NCCL wants no thread inside the communicator now. One that hangs there is freed by nothing else.
        is_alone = self._in_nccl.acquire(timeout=_ABORT_PATIENCE_S)
        with self._device.use():
            self._comm.abort()
        if is_alone:
            self._in_nccl.release()
