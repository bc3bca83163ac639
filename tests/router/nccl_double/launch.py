"""What NCCL puts on a device: calls, and the kernels that they become."""

import ctypes
import traceback

from tests.router.nccl_double.stream import DoubleStream, Entry


class Operation:
    """One call."""

    def __init__(self, communicator, stream: DoubleStream, kind: str, args, reads, writes) -> None:
        self.communicator, self.stream, self.kind = communicator, stream, kind
        self.count, self.dtype, self.peer = args
        self.reads, self.writes = reads, writes  # (pointer, number of bytes)
        self.is_done = False
        aim = {"send": f" to rank {self.peer}", "recv": f" from rank {self.peer}", "allGather": ""}[kind]
        self.what = f"{communicator}: {kind} of {self.count} x type {self.dtype}{aim}"
        self.where = "".join(traceback.format_stack(limit=10)[:-2])

    def route(self) -> tuple:
        """Return what has to be connected, and the ranks that do it."""
        if self.kind == "allGather":
            return "ring", *range(self.communicator.clique.size)
        ranks = (self.communicator.rank, self.peer)
        return "pair", *(ranks if self.kind == "send" else reversed(ranks))

    def callers(self) -> set[int]:
        """Return the ranks that have come to connect the route; who comes adds itself."""
        return self.communicator.clique.callers.setdefault(self.route(), set())

    def is_connected(self) -> bool:
        return self.callers() == set(self.route()[1:])

    def check_memory(self) -> None:
        for pointer, num_bytes in (self.reads, self.writes):
            if num_bytes and not self.stream.device.holds(pointer, num_bytes):
                self.stream.world.violate(f"{num_bytes} bytes are not in live memory of the device", self)

    def fits(self, other: "Operation") -> bool:
        """Return whether the two are sides of one exchange."""
        if self.kind == "allGather":
            return other.kind == "allGather"
        ranks = (other.communicator.rank, self.communicator.rank)
        return {self.kind, other.kind} == {"send", "recv"} and (self.peer, other.peer) == ranks

    def partners(self) -> list:
        """Return the communicators of the other ranks that this needs."""
        members = self.communicator.clique.members
        ranks = members if self.kind == "allGather" else [self.peer]
        return [members[rank] for rank in ranks if rank != self.communicator.rank]


class Launch(Entry):
    """A kernel: the calls of one group on one communicator. They progress independently of each other.

    Only those of one kind with one peer run in order.
    """

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__(operations[0].stream, " and ".join(each.what for each in operations))
        self.where = "\n".join(each.where for each in operations)
        self.communicator, self.operations = operations[0].communicator, operations
        if any(each.stream is not self.stream for each in operations):
            self.stream.world.violate("the double knows one stream of a group's on a communicator", self)

    def is_running(self) -> bool:
        is_alive = not self.stream.device.is_dead and not self.communicator.is_aborted
        return is_alive and self.communicator.pending[0] is self and self.stream.entries[0] is self

    def to_do(self) -> list[Operation]:
        return [each for each in self.operations if not each.is_done]

    def try_finish(self) -> bool:
        if self.is_running():
            for operation in self.to_do():
                self._try_exchange(operation)
        return self.is_done

    def waits_for(self) -> list[Entry]:
        held_up_by = super().waits_for()
        if self.is_done:
            return held_up_by
        if self.communicator.pending[0] is not self:
            held_up_by.append(self.communicator.pending[0])
        for operation in self.to_do():
            nexts = [partner.pending[0] for partner in operation.partners() if partner.pending]
            for launch in nexts:
                if not any(map(operation.fits, launch.to_do())):
                    held_up_by.append(launch)  # all of it
                elif launch.stream.entries[0] is not launch:
                    held_up_by.append(launch.stream.entries[0])
        return held_up_by

    def _try_exchange(self, operation: Operation) -> None:
        sides = [(operation, self)]
        for partner in operation.partners():
            launch = partner.pending[0] if partner.pending else None
            fitting = filter(operation.fits, launch.to_do() if launch and launch.is_running() else [])
            if (other := next(fitting, None)) is None:
                return
            sides.append((other, launch))
        _exchange(sorted(sides, key=lambda side: side[0].communicator.rank))

    def _count_with(self, operation: Operation) -> int:
        """Return how many calls are grouped that go where `operation` goes, or come from there."""
        return sum(each.peer == operation.peer for each in self.operations)


def _exchange(sides: list[tuple[Operation, Launch]]) -> None:
    """Move the data of one exchange; `sides` are in the order of the ranks."""
    operations, launches = zip(*sides, strict=True)
    world = operations[0].stream.world
    if len({(each.count, each.dtype) for each in operations}) > 1:
        world.violate("count and type differ", *operations)
    if len({launch._count_with(operation) for operation, launch in sides}) > 1:
        world.violate(
            "one side groups what the other does not (github.com/NVIDIA/nccl/issues/1279)", *launches
        )
    for operation in operations:
        operation.check_memory()
    data = [ctypes.string_at(*operation.reads) for operation in operations]
    for operation, launch in sides:
        if operation.writes[1]:
            ctypes.memmove(operation.writes[0], b"".join(data), operation.writes[1])
        operation.is_done = world.has_moved = True
        if not launch.to_do():
            launch.is_done = True
            launch.communicator.pending.popleft()
