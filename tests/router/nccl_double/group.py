"""Calls of NCCL that a thread has grouped. A call alone is a group of one."""

import threading

from tests.router.nccl_double.errors import NcclError
from tests.router.nccl_double.launch import Launch, Operation


class Group:
    """What a thread has called since its outermost `groupStart`; nothing of it is enqueued before the end."""

    def __init__(self, world) -> None:
        self.world, self.depth = world, 0
        self.communicators: list = []
        self.operations: list[Operation] = []

    def launch(self) -> None:
        """Enqueue all at once, as a kernel for each communicator; block until all of it is connected."""
        try:
            self._check_launching()
            calls = [
                [each for each in self.operations if each.communicator is communicator]
                for communicator in dict.fromkeys(self.communicators)
            ]
            launches = [Launch(operations) for operations in calls if operations]
            for launch in launches:
                launch.stream.entries.append(launch)
                launch.communicator.pending.append(launch)
            self.world.progress()
            for launch in launches:
                self.world.check_deadlock(launch)
            self._connect()
        finally:
            for communicator in self.communicators:
                communicator.inside = None

    def _check_launching(self) -> None:
        may_block = any(each.communicator.rank not in each.callers() for each in self.operations)
        for operation in self.operations:
            is_held = operation.stream.device.launching.owner is threading.current_thread()
            if is_held and may_block:
                self.world.violate("the first exchange may block, and with it all that launch", operation)
            if not is_held and not may_block:
                self.world.violate("kernels are launched without holding device.launching", operation)

    def _connect(self) -> None:
        for operation in self.operations:
            operation.callers().add(operation.communicator.rank)
        for communicator in self.communicators:
            communicator.is_blocked = True
        self.world.wait_for(
            lambda: all(each.is_connected() for each in self.operations) or self._is_aborted()
        )
        for communicator in self.communicators:
            communicator.is_blocked = False
        if self._is_aborted():
            raise NcclError("the communicator was aborted")

    def _is_aborted(self) -> bool:
        return any(each.is_aborted for each in self.communicators)
