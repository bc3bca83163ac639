"""What all processes of a test share: time moves on here."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tests.router.nccl_double.communicator import Clique, DoubleCommunicator
from tests.router.nccl_double.device import DoubleDevice
from tests.router.nccl_double.errors import NcclError, Violation
from tests.router.nccl_double.group import Group
from tests.router.nccl_double.launch import Launch, Operation
from tests.router.nccl_double.stream import DoubleStream, Entry


class World:
    """All processes of a test."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())  # guards everything here
        self.streams: dict[int, DoubleStream] = {}
        self.cliques: dict[bytes, Clique] = {}
        self.groups: dict[threading.Thread, Group] = {}  # that are open
        self.current = threading.local()  # its `device` is the one that the thread uses
        self.violations: list[Violation] = []
        self.has_moved = False
        self._is_over = False

    def device(self, name: str) -> DoubleDevice:
        return DoubleDevice(self, name)

    def violate(self, rule: str, *entries: Entry | Operation) -> NoReturn:
        calls = "\n".join(f"{entry.what}, called from\n{entry.where}" for entry in entries)
        self.violations.append(Violation(f"{rule}\n{calls}"))
        raise self.violations[-1]

    def start_group(self) -> Group:
        with self.changed:
            group = self.groups.setdefault(threading.current_thread(), Group(self))
            group.depth += 1
            return group

    def end_group(self) -> None:
        with self.changed:
            group = self.groups.get(threading.current_thread())
            if group is None:
                self.violate("groupEnd without groupStart")
            group.depth -= 1
            if not group.depth:
                del self.groups[threading.current_thread()]
                group.launch()

    @contextmanager
    def group(self) -> Iterator[Group]:
        """What NCCL does around every call."""
        group = self.start_group()
        try:
            yield group
        finally:
            self.end_group()

    def check_enqueued(self, stream: DoubleStream) -> None:
        """Raise Violation if the calling thread thinks that its grouped calls are in `stream` already."""
        group = self.groups.get(threading.current_thread())
        waiting = [each for each in group.operations if each.stream is stream] if group else []
        if waiting:
            self.violate("what is grouped is not in the stream before groupEnd", *waiting)

    def progress(self) -> None:
        """Let every stream run as far as it can."""
        self.has_moved = True
        while self.has_moved:
            self.has_moved = False
            for stream in list(self.streams.values()):
                while stream.entries and not stream.device.is_dead:
                    first = stream.entries[0]
                    if not (first.is_done or first.try_finish()):
                        break
                    first.is_done = self.has_moved = True
                    stream.entries.popleft()
        self.changed.notify_all()

    def check_deadlock(self, entry: Entry, *waiting: Entry) -> None:
        """Raise Violation if `entry` waits for something that waits for `entry`."""
        if entry in waiting:
            chain = waiting[waiting.index(entry) :]
            self.violate("deadlock: each of these waits for the next, and the last for the first", *chain)
        for each in entry.waits_for():
            self.check_deadlock(each, *waiting, entry)

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
            for thread, group in self.groups.items():
                self.violate(f"{thread.name}: groupStart without groupEnd", *group.operations)
            if not ended:
                self.violate(f"{', '.join(map(str, self._held()))}: never aborted", *self._pending())

    def _held(self) -> list[DoubleCommunicator]:
        members = [member for clique in self.cliques.values() for member in clique.members.values()]
        opened = [member for member in members if len(member.clique.members) == member.clique.size]
        return [member for member in opened if not member.is_aborted and not member.device.is_dead]

    def _pending(self) -> list[Launch]:
        return [launch for member in self._held() for launch in member.pending]
