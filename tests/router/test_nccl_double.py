"""The double catches what it says it catches: else the tests on it would prove nothing."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.router.nccl_double import DoubleCommunicator, DoubleDevice, NcclError, Violation, World

UINT8, FLOAT32 = 1, 7


class Side:
    """One process that calls NCCL by hand."""

    def __init__(self, device: DoubleDevice, communicator: DoubleCommunicator) -> None:
        self.device, self.communicator = device, communicator
        self.stream = device.new_stream()
        self.memory = device.empty(64)

    @property
    def pointer(self) -> int:
        return self.memory.data_ptr()

    def send(self, count: int = 4, datatype: int = UINT8, pointer: int | None = None, stream=None) -> None:
        handle = (stream or self.stream).cuda_stream
        self.communicator.send(
            self.pointer if pointer is None else pointer, count, datatype, 1 - self.communicator.rank, handle
        )

    def receive(self, count: int = 4, datatype: int = UINT8, pointer: int | None = None, stream=None) -> None:
        handle = (stream or self.stream).cuda_stream
        self.communicator.recv(
            self.pointer if pointer is None else pointer, count, datatype, 1 - self.communicator.rank, handle
        )


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


def open_all(world: World, background, size: int = 2) -> list[Side]:
    devices = [world.device(f"device {rank}") for rank in range(size)]
    unique_id = devices[0].nccl.get_unique_id()
    opening = [
        background(device.nccl.NcclCommunicator, size, unique_id, rank) for rank, device in enumerate(devices)
    ]
    return [Side(device, each.result(5)) for device, each in zip(devices, opening, strict=True)]


@pytest.fixture
def sides(world: World, background) -> list[Side]:
    """Two sides that have had their first exchange."""
    sides = open_all(world, background)
    sending = background(sides[0].send)
    sides[1].receive()
    sending.result(5)
    return sides


def test_what_one_side_sends_the_other_receives(sides):
    sides[0].memory[:4] = sides[0].memory.new_tensor([1, 2, 3, 4])
    sides[0].send()
    assert not sides[0].stream.record_event().query()
    sides[1].receive()
    assert sides[1].memory[:4].tolist() == [1, 2, 3, 4]
    assert sides[0].stream.record_event().query()


def test_all_ranks_gather_the_parts_of_all(world, background):
    sides = open_all(world, background, 3)
    for rank, side in enumerate(sides):
        side.memory[2 * rank : 2 * rank + 2] = rank

    def gather(side: Side) -> None:
        own = side.pointer + 2 * side.communicator.rank
        side.communicator.allGather(own, side.pointer, 2, UINT8, side.stream.cuda_stream)

    for each in [background(gather, side) for side in sides]:
        each.result(5)
    assert [side.memory[:6].tolist() for side in sides] == [[0, 0, 1, 1, 2, 2]] * 3


def test_opening_waits_for_all_ranks(world, background):
    first, second = world.device("first"), world.device("second")
    unique_id = first.nccl.get_unique_id()
    opening = background(first.nccl.NcclCommunicator, 2, unique_id, 0)
    with pytest.raises(TimeoutError):
        opening.result(0.05)
    second.nccl.NcclCommunicator(2, unique_id, 1)
    assert opening.result(5).rank == 0


def test_the_first_exchange_blocks_the_host_until_the_other_side_calls_too(world, background):
    sides = open_all(world, background)
    sending = background(sides[0].send)
    with pytest.raises(TimeoutError):
        sending.result(0.05)
    sides[1].receive()
    sending.result(5)


@pytest.mark.parametrize("datatype", [UINT8, FLOAT32])
def test_another_count_or_type_on_the_other_side_is_a_violation(sides, datatype):
    sides[0].send(8, UINT8)
    with pytest.raises(Violation, match="count and type differ") as caught:
        sides[1].receive(4, datatype)
    assert "rank 0 on device 0: send of 8 x type 1" in str(caught.value)
    assert f"rank 1 on device 1: recv of 4 x type {datatype}" in str(caught.value)


def test_both_sides_sending_first_on_one_communicator_is_a_deadlock_with_both_calls(sides):
    sides[0].send()
    with pytest.raises(Violation, match=r"deadlock(.|\n)*device 1: send(.|\n)*device 0: send") as caught:
        sides[1].send()
    assert str(caught.value).count("in send\n") >= 2  # the stacks of both


def test_two_communicators_on_one_stream_in_different_orders_are_a_deadlock(world, background, sides):
    other_id = sides[0].device.nccl.get_unique_id()
    opening = background(sides[0].device.nccl.NcclCommunicator, 2, other_id, 0)
    others = [None, Side(sides[1].device, sides[1].device.nccl.NcclCommunicator(2, other_id, 1))]
    others[0] = Side(sides[0].device, opening.result(5))
    first = background(others[0].send)
    others[1].receive()
    first.result(5)

    sides[0].send()
    others[0].send(stream=sides[0].stream)
    others[1].receive(stream=sides[1].stream)
    with pytest.raises(Violation, match="deadlock"):
        sides[1].receive()


def test_operations_of_a_stream_run_in_order(sides):
    kernel = sides[0].stream.run(lambda: sides[0].memory.fill_(7))
    sides[0].send()
    sides[1].receive()
    assert sides[1].memory[:4].tolist() != [7] * 4
    kernel.open()
    assert sides[1].memory[:4].tolist() == [7] * 4


@pytest.mark.parametrize("call", [Side.send, Side.receive])
def test_memory_that_is_nobodys_or_too_small_is_a_violation(sides, call):
    with pytest.raises(Violation, match="65 bytes are not in live memory"):
        call(sides[0], count=65)
    with pytest.raises(Violation, match="4 bytes are not in live memory"):
        call(sides[0], pointer=0x1000)


def test_memory_of_another_device_is_a_violation(sides):
    with pytest.raises(Violation, match="not in live memory of the device"):
        sides[0].send(pointer=sides[1].pointer)


def test_memory_freed_before_the_operation_is_done_is_a_violation(sides):
    sides[0].send()
    sides[0].memory = None
    with pytest.raises(Violation, match="not in live memory"):
        sides[1].receive()


def test_two_threads_in_one_communicator_are_a_violation(world, background):
    sides = open_all(world, background)
    blocked = background(sides[0].send)  # the first exchange
    with pytest.raises(TimeoutError):
        blocked.result(0.05)
    with pytest.raises(Violation, match=r"while ThreadPoolExecutor.* is in the same communicator"):
        sides[0].receive()


def test_aborting_frees_a_thread_that_hangs_in_the_first_exchange(world, background):
    sides = open_all(world, background)
    blocked = background(sides[0].send)
    with pytest.raises(TimeoutError):
        blocked.result(0.05)
    sides[0].communicator.abort()
    with pytest.raises(NcclError, match="aborted"):
        blocked.result(5)


def test_aborting_ends_what_runs_without_moving_data(sides):
    before = sides[1].memory.tolist()
    sides[1].receive()
    done = sides[1].stream.record_event()
    sides[1].communicator.abort()
    assert done.query()
    assert sides[1].memory.tolist() == before


@pytest.mark.parametrize(
    "call", [Side.send, Side.receive, lambda side: side.communicator.check_async_error()]
)
def test_using_an_aborted_communicator_is_a_violation(sides, call):
    sides[0].communicator.abort()
    sides[0].communicator.abort()  # cupy ignores this one
    with pytest.raises(Violation, match="on an aborted communicator"):
        call(sides[0])


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (3, 1), (2, 2)])
def test_ranks_that_do_not_fit_together_are_a_violation(world, background, size: int, rank: int):
    device, other = world.device("a"), world.device("b")
    unique_id = device.nccl.get_unique_id()
    background(device.nccl.NcclCommunicator, 2, unique_id, 0)
    with world.changed:
        world.changed.wait_for(lambda: world.cliques[unique_id].members, 5)
    with pytest.raises(Violation, match=r"ranks|rank"):
        other.nccl.NcclCommunicator(size, unique_id, rank)


def test_an_id_that_nobody_made_is_a_violation(world):
    with pytest.raises(Violation, match="an id that nobody made"):
        world.device("a").nccl.NcclCommunicator(2, bytes(128), 0)


def test_a_network_error_shows_when_asked_for(sides):
    sides[0].communicator.check_async_error()
    sides[0].communicator.clique.network_error = "remote process exited"
    with pytest.raises(NcclError, match="remote process exited"):
        sides[1].communicator.check_async_error()


def test_a_communicator_that_is_never_aborted_is_a_violation_that_names_what_hangs(sides):
    sides[0].send()
    sides[1].communicator.abort()
    with pytest.raises(Violation, match=r"device 0: never aborted(.|\n)*device 0: send"):
        sides[0].device.world.check(timeout_s=0)


def test_the_end_of_a_test_brings_back_what_a_thread_swallowed(sides):
    with pytest.raises(Violation):
        sides[0].send(pointer=0)
    for side in sides:
        side.communicator.abort()
    with pytest.raises(Violation, match="not in live memory"):
        sides[0].device.world.check()


def test_a_dead_process_owes_nothing_and_moves_nothing(sides):
    sides[0].send()
    sides[0].device.die()
    sides[1].receive()
    assert not sides[1].stream.record_event().query()
    sides[1].communicator.abort()
    sides[0].device.world.check()
