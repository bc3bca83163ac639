"""A double of NCCL, and of the device below it, for processes that threads play.

It moves host memory and enforces what NCCL documents but does not check. Whatever breaks a rule is a
`Violation`, raised where it happens and again by `World.check`, that names the calls on both sides:

- peers post matching operations, of the same count and type; what can never match is a deadlock
- operations of a communicator, and of a stream, run in order
- memory is registered, large enough, and alive until the operation is done
- one thread at a time in a communicator; none when it is aborted, unless it hangs there
- no two of a communicator's ranks are the same, all know its size, and nobody uses it once it is aborted
- every communicator is aborted in the end: cupy's destructor would call ncclCommDestroy, which may block

As in NCCL, a communicator opens when all ranks have come, and the first exchange blocks on the host until the
other side has called, too.
"""

import ctypes
import itertools
import os
import threading
import traceback
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

NCCL_UNIQUE_ID_BYTES = 128
_ELEMENT_BYTES = {1: 1, 7: 4, 9: 2}  # by NCCL's numbers of types
_MOMENT_S = 0.0002  # that a call takes, so that two at once can meet
_GARBAGE = 0xA5


class Violation(AssertionError):
    """A rule of NCCL was broken."""


class NcclError(RuntimeError):
    """What cupy raises for a failed call."""


class Entry(ABC):
    """Something in a stream, which ends when everything before it has ended and `try_finish` allows it."""

    def __init__(self, stream: "DoubleStream", what: str) -> None:
        self.stream, self.what, self.is_done = stream, what, False
        self.where = "".join(traceback.format_stack(limit=10)[:-3])

    @abstractmethod
    def try_finish(self) -> bool:
        """End this now if everything that it needs is there, and say whether it did."""

    def waits_for(self) -> "Entry | None":
        """Return what holds this up, or None if that is still to come."""
        return self.stream.entries[0] if self.stream.entries[0] is not self else None


class Wait(Entry):
    def __init__(self, stream: "DoubleStream", target: Entry) -> None:
        super().__init__(stream, "a wait for another stream")
        self.target = target

    def try_finish(self) -> bool:
        return self.target.is_done

    def waits_for(self) -> Entry | None:
        return super().waits_for() or self.target


class Gate(Entry):
    """A kernel of the test's, which runs `action` when the test opens it."""

    def __init__(self, stream: "DoubleStream", action: Callable[[], None]) -> None:
        super().__init__(stream, "a kernel")
        self.action, self.is_open = action, False

    def try_finish(self) -> bool:
        if self.is_open:
            self.action()
        return self.is_open

    def open(self) -> None:
        with self.stream.world.changed:
            self.is_open = True
            self.stream.world.progress()


class DoubleStream:
    handles = itertools.count(0x1000)

    def __init__(self, device: "DoubleDevice") -> None:
        self.device, self.world = device, device.world
        self.entries: deque[Entry] = deque()
        self.cuda_stream = next(self.handles)
        self.world.streams[self.cuda_stream] = self

    def wait_stream(self, stream: "DoubleStream") -> None:
        with self.world.changed:
            if stream.entries:
                self.entries.append(Wait(self, stream.entries[-1]))

    def record_event(self) -> "DoubleEvent":
        with self.world.changed:
            return DoubleEvent(self.entries[-1] if self.entries else None)

    def run(self, action: Callable[[], None]) -> Gate:
        """Put a kernel on the stream that runs when the test opens it."""
        with self.world.changed:
            self.entries.append(Gate(self, action))
            return self.entries[-1]


class DoubleEvent:
    def __init__(self, target: Entry | None) -> None:
        self.target = target

    def query(self) -> bool:
        return self.target is None or self.target.is_done


class Operation(Entry):
    def __init__(self, communicator, stream, kind: str, args: tuple[int, ...], reads, writes) -> None:
        self.communicator, self.kind, self.args = communicator, kind, args
        self.reads, self.writes = reads, writes  # (pointer, number of bytes)
        self.count, self.dtype, self.peer = args
        aim = {"send": f" to rank {self.peer}", "recv": f" from rank {self.peer}", "allGather": ""}[kind]
        super().__init__(stream, f"{communicator}: {kind} of {self.count} x type {self.dtype}{aim}")

    def check_memory(self) -> None:
        for pointer, num_bytes in (self.reads, self.writes):
            if num_bytes and not self.stream.device.holds(pointer, num_bytes):
                self.stream.world.violate(f"{num_bytes} bytes are not in live memory of the device", self)

    def is_next(self) -> bool:
        is_alive = not self.stream.device.is_dead and not self.communicator.is_aborted
        return is_alive and self.communicator.pending[0] is self and self.stream.entries[0] is self

    def fits(self, other: "Operation") -> bool:
        """Return whether the two are sides of one exchange."""
        if self.kind == "allGather":
            return other.kind == "allGather"
        ranks = (other.communicator.rank, self.communicator.rank)
        return {self.kind, other.kind} == {"send", "recv"} and (self.peer, other.peer) == ranks

    def next_of_others(self) -> "list[Operation | None]":
        """Return what the other ranks that this needs will do next."""
        members = self.communicator.clique.members
        ranks = members if self.kind == "allGather" else [self.peer]
        others = [members[rank] for rank in ranks if rank != self.communicator.rank]
        return [other.pending[0] if other.pending else None for other in others]

    def waits_for(self) -> Entry | None:
        if self.communicator.pending[0] is not self:
            return self.communicator.pending[0]
        others = self.next_of_others()
        held_up = [other for other in others if other and not (self.fits(other) and other.is_next())]
        return super().waits_for() or (held_up[0] if held_up else None)

    def try_finish(self) -> bool:
        if not self.is_next():
            return False
        others = self.next_of_others()
        if not all(other and other.is_next() and self.fits(other) for other in others):
            return False
        for other in others:
            if (self.count, self.dtype) != (other.count, other.dtype):
                self.stream.world.violate("count and type differ", self, other)
        sides = sorted([self, *others], key=lambda side: side.communicator.rank)
        for side in sides:
            side.check_memory()
        data = [ctypes.string_at(*side.reads) for side in sides]
        for side in sides:
            if side.writes[1]:
                ctypes.memmove(side.writes[0], b"".join(data), side.writes[1])
            side.is_done = True
            side.communicator.pending.popleft()
        return True


class Clique:
    """What the ranks of one communicator share."""

    def __init__(self) -> None:
        self.size = 0
        self.members: dict[int, DoubleCommunicator] = {}
        self.called: dict[object, set[int]] = {}  # who has come to the first exchange
        self.network_error: str | None = None


class DoubleCommunicator:
    """`cupy.cuda.nccl.NcclCommunicator`, of one device."""

    def __init__(self, device: "DoubleDevice", ndev: int, commId: bytes, rank: int, config=None) -> None:
        self.device, self.world, self.rank = device, device.world, rank
        self.pending: deque[Operation] = deque()
        self.is_aborted = self._is_blocked = False
        self._inside: threading.Thread | None = None
        with self.world.changed:
            if commId not in self.world.cliques:
                self.world.violate(f"rank {rank} has an id that nobody made: {commId!r}")
            self.clique = self.world.cliques[commId]
            if self.clique.members and self.clique.size != ndev:
                self.world.violate(f"{self} says {ndev} ranks, others say {self.clique.size}")
            if rank in self.clique.members or not 0 <= rank < ndev:
                self.world.violate(f"{self} is the second of that rank, or there are too few")
            self.clique.size = ndev
            self.clique.members[rank] = self
            self.world.wait_for(lambda: len(self.clique.members) == ndev)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.device.name}"

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        num_bytes = count * _ELEMENT_BYTES[datatype]
        self._post("send", (count, datatype, peer), (sendbuf, num_bytes), (0, 0), stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        num_bytes = count * _ELEMENT_BYTES[datatype]
        self._post("recv", (count, datatype, peer), (0, 0), (recvbuf, num_bytes), stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        num_bytes = count * _ELEMENT_BYTES[datatype]
        writes = (recvbuf, num_bytes * self.clique.size)
        self._post("allGather", (count, datatype, -1), (sendbuf, num_bytes), writes, stream)

    def check_async_error(self) -> None:
        with self.world.changed:
            self._enter("check_async_error")
            self._inside = None
            if self.clique.network_error:
                raise NcclError(self.clique.network_error)

    def abort(self) -> None:
        with self.world.changed:
            if self.is_aborted or self.device.is_dead:
                return
            if self._inside and not self._is_blocked:
                self.world.violate(f"{self} is aborted while {self._inside.name} is in it")
            self.is_aborted = True
            for operation in self.pending:
                operation.is_done = True  # the kernel ends, and leaves its memory as it happens to be
            self.pending.clear()
            self.world.progress()

    def _enter(self, call: str) -> None:
        if self.is_aborted:
            self.world.violate(
                f"{self}: {call} on an aborted communicator\n{''.join(traceback.format_stack())}"
            )
        if self._inside:
            self.world.violate(f"{self}: {call} while {self._inside.name} is in the same communicator")
        self._inside = threading.current_thread()

    def _post(self, kind: str, args, reads, writes, stream: int) -> None:
        with self.world.changed:
            self._enter(kind)
            try:
                self.world.changed.wait(_MOMENT_S)
                operation = Operation(self, self.world.streams[stream], kind, args, reads, writes)
                if operation.stream.device is not self.device:
                    self.world.violate("the stream is of another device", operation)
                operation.check_memory()
                operation.stream.entries.append(operation)
                self.pending.append(operation)
                self.world.progress()
                self.world.check_deadlock(operation)
                self._connect(kind, args[-1])
            finally:
                self._inside = None

    def _connect(self, kind: str, peer: int) -> None:
        ranks = frozenset(range(self.clique.size) if kind == "allGather" else {self.rank, peer})
        called = self.clique.called.setdefault((kind == "allGather", ranks), set())
        called.add(self.rank)
        self._is_blocked = True
        self.world.wait_for(lambda: called == ranks or self.is_aborted)
        self._is_blocked = False
        if self.is_aborted:
            raise NcclError("the communicator was aborted")


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


class DoubleDevice:
    """Implements `Device` in host memory: one process with its GPU."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name, self.is_dead = world, name, False
        self.launching = threading.Lock()
        self.nccl = DoubleNccl(self)
        self.allocated: list[int] = []  # bytes
        self._memory: list[weakref.ref] = []
        self._current = DoubleStream(self)

    def use(self) -> AbstractContextManager[None]:
        return nullcontext()

    def empty(self, num_bytes: int) -> Tensor:
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


class World:
    """All processes of a test."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())  # guards everything here
        self.streams: dict[int, DoubleStream] = {}
        self.cliques: dict[bytes, Clique] = {}
        self.violations: list[Violation] = []
        self._is_over = False

    def device(self, name: str) -> DoubleDevice:
        return DoubleDevice(self, name)

    def violate(self, rule: str, *operations: Operation) -> None:
        calls = "\n".join(f"{operation.what}, called from\n{operation.where}" for operation in operations)
        self.violations.append(Violation(f"{rule}\n{calls}"))
        raise self.violations[-1]

    def progress(self) -> None:
        """Let every stream run as far as it can."""
        moved = True
        while moved:
            moved = False
            for stream in list(self.streams.values()):
                while stream.entries and not stream.device.is_dead:
                    first = stream.entries[0]
                    if not (first.is_done or first.try_finish()):
                        break
                    first.is_done = moved = True
                    stream.entries.popleft()
        self.changed.notify_all()

    def check_deadlock(self, entry: Entry) -> None:
        """Raise Violation if `entry` waits for something that waits for `entry`."""
        chain: list[Entry] = []
        following: Entry | None = entry
        while following and not following.is_done and following not in chain:
            chain.append(following)
            following = following.waits_for()
        if following in chain:
            self.violate("deadlock: each of these waits for the next, and the last for the first", *chain)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Block as NCCL does: without a limit, but for the end of the test."""
        self.changed.notify_all()
        self.changed.wait_for(lambda: condition() or self._is_over)
        if self._is_over:
            raise NcclError("the test is over")

    def check(self, timeout_s: float = 5.0) -> None:
        """End the test. Raises Violation if a rule was broken, or a living process holds a communicator."""
        with self.changed:
            ended = self.changed.wait_for(lambda: not self._held(), timeout_s)
            self._is_over = True
            self.changed.notify_all()
            if self.violations:
                raise self.violations[0]
            if not ended:
                self.violate(f"{', '.join(map(str, self._held()))}: never aborted", *self._pending())

    def _held(self) -> list[DoubleCommunicator]:
        members = [member for clique in self.cliques.values() for member in clique.members.values()]
        opened = [member for member in members if len(member.clique.members) == member.clique.size]
        return [member for member in opened if not member.is_aborted and not member.device.is_dead]

    def _pending(self) -> list[Operation]:
        return [operation for member in self._held() for operation in member.pending]
