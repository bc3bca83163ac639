"""Processes that call the double of NCCL by hand, side by side in this one; and their fixtures."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import pytest

from tests.router.nccl_double import DoubleCommunicator, DoubleDevice, Violation, World

UINT8, FLOAT32 = 1, 7


class Side:
    """One process that calls NCCL by hand."""

    def __init__(self, device: DoubleDevice, communicator: DoubleCommunicator) -> None:
        self.device, self.communicator = device, communicator
        self.stream = device.new_stream()
        self.memory = device.empty(64)
        self.launching: AbstractContextManager = nullcontext()  # until it is connected

    @property
    def pointer(self) -> int:
        return self.memory.data_ptr()

    def run(self, call: Callable[..., None], *args: int) -> None:
        with self.device.use(), self.launching:
            call(*args)

    def send(self, count: int = 4, datatype: int = UINT8, pointer: int | None = None, stream=None) -> None:
        pointer, stream = self.pointer if pointer is None else pointer, stream or self.stream
        peer = 1 - self.communicator.rank
        self.run(self.communicator.send, pointer, count, datatype, peer, stream.cuda_stream)

    def receive(self, count: int = 4, datatype: int = UINT8, pointer: int | None = None, stream=None) -> None:
        pointer, stream = self.pointer if pointer is None else pointer, stream or self.stream
        peer = 1 - self.communicator.rank
        self.run(self.communicator.recv, pointer, count, datatype, peer, stream.cuda_stream)

    def gather(self, num_bytes: int) -> None:
        own = self.pointer + num_bytes * self.communicator.rank
        self.run(self.communicator.allGather, own, self.pointer, num_bytes, UINT8, self.stream.cuda_stream)

    def abort(self) -> None:
        with self.device.use():
            self.communicator.abort()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Group the calls within, and launch them at the end."""
        launching, self.launching = self.launching, nullcontext()
        self.device.nccl.groupStart()
        yield
        with launching:
            self.device.nccl.groupEnd()
        self.launching = launching


def join(device: DoubleDevice, size: int, unique_id: bytes, rank: int) -> Side:
    with device.use():
        return Side(device, device.nccl.NcclCommunicator(size, unique_id, rank))


def open_all(background, devices: list[DoubleDevice]) -> list[Side]:
    unique_id = devices[0].nccl.get_unique_id()
    joining = [background(join, device, len(devices), unique_id, rank) for rank, device in enumerate(devices)]
    return [each.result(5) for each in joining]


def connect(background, sides: list[Side]) -> None:
    """Have the first exchange of two sides, in both directions."""
    for sender, receiver in (sides, sides[::-1]):
        sending = background(sender.send)
        receiver.receive()
        sending.result(5)
    for side in sides:
        side.launching = side.device.launching


def exchange(side: Side) -> None:
    """Send and receive at once."""
    with side.group():
        side.send()
        side.receive(pointer=side.pointer + 4)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    with suppress(Violation):  # the test has seen it
        world.check(timeout_s=0)  # lets every thread go


@pytest.fixture
def background(world: World) -> Iterator[Callable[..., Future]]:
    pool = ThreadPoolExecutor(4)
    yield pool.submit
    pool.shutdown(wait=False)


@pytest.fixture
def devices(world: World) -> list[DoubleDevice]:
    return [world.device("device 0"), world.device("device 1")]


@pytest.fixture
def fresh(background, devices) -> list[Side]:
    """Two sides that have never exchanged anything."""
    return open_all(background, devices)


@pytest.fixture
def sides(background, fresh) -> list[Side]:
    """Two sides that are connected."""
    connect(background, fresh)
    return fresh
