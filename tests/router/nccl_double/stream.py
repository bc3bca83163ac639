"""Work in order, on a device of the double."""

import itertools
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable


class Entry(ABC):
    """Something in a stream, which ends when everything before it has ended and `try_finish` allows it."""

    def __init__(self, stream: "DoubleStream", what: str) -> None:
        self.stream, self.what, self.is_done = stream, what, False
        self.where = "".join(traceback.format_stack(limit=10)[:-3])

    @abstractmethod
    def try_finish(self) -> bool:
        """End this now if everything that it needs is there, and say whether it did."""

    def waits_for(self) -> "list[Entry]":
        """Return what holds this up; nothing if that is still to come."""
        return [] if self.is_done or self.stream.entries[0] is self else [self.stream.entries[0]]


class Wait(Entry):
    def __init__(self, stream: "DoubleStream", target: Entry) -> None:
        super().__init__(stream, "a wait for another stream")
        self.target = target

    def try_finish(self) -> bool:
        return self.target.is_done

    def waits_for(self) -> list[Entry]:
        return [*super().waits_for(), self.target]


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

    def __init__(self, device) -> None:
        self.device, self.world = device, device.world
        self.entries: deque[Entry] = deque()
        self.cuda_stream = next(self.handles)
        self.world.streams[self.cuda_stream] = self

    def wait_stream(self, stream: "DoubleStream") -> None:
        with self.world.changed:
            self.world.check_enqueued(stream)
            if stream.entries:
                self.entries.append(Wait(self, stream.entries[-1]))

    def record_event(self) -> "DoubleEvent":
        with self.world.changed:
            self.world.check_enqueued(self)
            return DoubleEvent(self.world, self.entries[-1] if self.entries else None)

    def run(self, action: Callable[[], None]) -> Gate:
        """Put a kernel on the stream that runs when the test opens it."""
        with self.world.changed:
            self.entries.append(Gate(self, action))
            return self.entries[-1]


class DoubleEvent:
    def __init__(self, world, target: Entry | None) -> None:
        self._world, self._target = world, target

    def query(self) -> bool:
        return self._target is None or self._target.is_done

    def synchronize(self) -> None:
        with self._world.changed:
            self._world.wait_for(self.query)
