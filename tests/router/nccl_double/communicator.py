"""`cupy.cuda.nccl.NcclCommunicator`, of one device of the double."""

import threading
import traceback
from collections import deque

from tests.router.nccl_double.launch import Launch, Operation

_ELEMENT_BYTES = {1: 1, 7: 4, 9: 2}  # by NCCL's numbers of types
_MOMENT_S = 0.0002  # that a call takes, so that two at once can meet


class Clique:
    """What the ranks of one communicator share."""

    def __init__(self) -> None:
        self.size = 0
        self.members: dict[int, DoubleCommunicator] = {}
        self.callers: dict[tuple, set[int]] = {}  # who has come to the first exchange, by route
        self.network_error: Exception | None = None  # every call raises it


class DoubleCommunicator:
    def __init__(self, device, ndev: int, commId: bytes, rank: int, config=None) -> None:
        self.device, self.world, self.rank = device, device.world, rank
        self.pending: deque[Launch] = deque()
        self.is_aborted = self.is_blocked = False
        self.inside: threading.Thread | None = None
        with self.world.changed:
            device.check_current(f"{self}: opening")
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
            self._check_usable("check_async_error")

    def abort(self) -> None:
        with self.world.changed:
            if self.is_aborted or self.device.is_dead:
                return
            self.device.check_current(f"{self}: abort")
            if self.inside and not self.is_blocked:
                self.world.violate(f"{self} is aborted while {self.inside.name} is in it")
            self.is_aborted = True
            for launch in self.pending:
                launch.is_done = True  # the kernel ends, and leaves its memory as it happens to be
            self.pending.clear()
            self.world.progress()

    def _check_usable(self, call: str) -> None:
        if self.is_aborted:
            self.world.violate(
                f"{self}: {call} on an aborted communicator\n{''.join(traceback.format_stack())}"
            )
        if self.inside not in (None, threading.current_thread()):
            self.world.violate(f"{self}: {call} while {self.inside.name} is in the same communicator")
        if self.clique.network_error:
            raise self.clique.network_error

    def _post(self, kind: str, args, reads, writes, stream: int) -> None:
        with self.world.changed:
            self.device.check_current(f"{self}: {kind}")
            self._check_usable(kind)
            self.inside = threading.current_thread()
            with self.world.group() as group:
                group.communicators.append(self)
                self.world.changed.wait(_MOMENT_S)
                operation = Operation(self, self.world.streams[stream], kind, args, reads, writes)
                if operation.stream.device is not self.device:
                    self.world.violate("the stream is of another device", operation)
                operation.check_memory()
                group.operations.append(operation)
