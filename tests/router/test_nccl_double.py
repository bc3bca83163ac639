"""The double catches what it says it catches: else the tests on it would prove nothing."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import pytest

from tests.router.nccl_double import DoubleCommunicator, DoubleDevice, NcclError, Violation, World

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


def test_what_one_side_sends_the_other_receives(sides):
    sides[0].memory[:4] = sides[0].memory.new_tensor([1, 2, 3, 4])
    sides[0].send()
    assert not sides[0].stream.record_event().query()
    sides[1].receive()
    assert sides[1].memory[:4].tolist() == [1, 2, 3, 4]
    assert sides[0].stream.record_event().query()


def test_all_ranks_gather_the_parts_of_all(world, background):
    sides = open_all(background, [world.device(f"device {rank}") for rank in range(3)])
    for rank, side in enumerate(sides):
        side.memory[2 * rank : 2 * rank + 2] = rank
    for each in [background(side.gather, 2) for side in sides]:
        each.result(5)
    assert [side.memory[:6].tolist() for side in sides] == [[0, 0, 1, 1, 2, 2]] * 3


def test_opening_waits_for_all_ranks(background, devices):
    unique_id = devices[0].nccl.get_unique_id()
    opening = background(join, devices[0], 2, unique_id, 0)
    with pytest.raises(TimeoutError):
        opening.result(0.05)
    join(devices[1], 2, unique_id, 1)
    assert opening.result(5).communicator.rank == 0


def test_the_first_exchange_in_each_direction_blocks_the_host_until_the_other_side_calls_too(
    background, fresh
):
    for sender, receiver in (fresh, fresh[::-1]):
        sending = background(sender.send)
        with pytest.raises(TimeoutError):
            sending.result(0.05)
        receiver.receive()
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


def test_two_communicators_on_one_stream_in_different_orders_are_a_deadlock(background, devices, sides):
    others = open_all(background, devices)
    connect(background, others)
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


def test_two_threads_in_one_communicator_are_a_violation(background, fresh):
    blocked = background(fresh[0].send)  # the first exchange
    with pytest.raises(TimeoutError):
        blocked.result(0.05)
    with pytest.raises(Violation, match=r"while ThreadPoolExecutor.* is in the same communicator"):
        fresh[0].receive()


def test_aborting_frees_a_thread_that_hangs_in_the_first_exchange(background, fresh):
    blocked = background(fresh[0].send)
    with pytest.raises(TimeoutError):
        blocked.result(0.05)
    fresh[0].abort()
    with pytest.raises(NcclError, match="aborted"):
        blocked.result(5)


def test_aborting_ends_what_runs_without_moving_data(sides):
    before = sides[1].memory.tolist()
    sides[1].receive()
    done = sides[1].stream.record_event()
    sides[1].abort()
    assert done.query()
    assert sides[1].memory.tolist() == before


@pytest.mark.parametrize(
    "call", [Side.send, Side.receive, lambda side: side.communicator.check_async_error()]
)
def test_using_an_aborted_communicator_is_a_violation(sides, call):
    sides[0].abort()
    sides[0].abort()  # cupy ignores this one
    with pytest.raises(Violation, match="on an aborted communicator"):
        call(sides[0])


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (3, 1), (2, 2)])
def test_ranks_that_do_not_fit_together_are_a_violation(world, background, devices, size: int, rank: int):
    unique_id = devices[0].nccl.get_unique_id()
    background(join, devices[0], 2, unique_id, 0)
    with world.changed:
        world.changed.wait_for(lambda: world.cliques[unique_id].members, 5)
    with pytest.raises(Violation, match=r"ranks|rank"):
        join(devices[1], size, unique_id, rank)


def test_an_id_that_nobody_made_is_a_violation(devices):
    with pytest.raises(Violation, match="an id that nobody made"):
        join(devices[0], 2, bytes(128), 0)


def test_a_network_error_shows_when_asked_for(sides):
    sides[0].communicator.check_async_error()
    sides[0].communicator.clique.network_error = NcclError("remote process exited")
    with pytest.raises(NcclError, match="remote process exited"):
        sides[1].communicator.check_async_error()


def test_a_communicator_that_is_never_aborted_is_a_violation_that_names_what_hangs(sides):
    sides[0].send()
    sides[1].abort()
    with pytest.raises(Violation, match=r"device 0: never aborted(.|\n)*device 0: send"):
        sides[0].device.world.check(timeout_s=0)


def test_the_end_of_a_test_brings_back_what_a_thread_swallowed(sides):
    with pytest.raises(Violation):
        sides[0].send(pointer=0)
    for side in sides:
        side.abort()
    with pytest.raises(Violation, match="not in live memory"):
        sides[0].device.world.check()


def test_a_dead_process_owes_nothing_and_moves_nothing(sides):
    sides[0].send()
    sides[0].device.die()
    sides[1].receive()
    assert not sides[1].stream.record_event().query()
    sides[1].abort()
    sides[0].device.world.check()


def test_a_thread_that_did_not_make_the_device_current_is_a_violation(devices, sides):
    unique_id = devices[0].nccl.get_unique_id()
    for call in (
        lambda: devices[0].nccl.NcclCommunicator(2, unique_id, 0),
        lambda: sides[0].communicator.send(sides[0].pointer, 4, UINT8, 1, sides[0].stream.cuda_stream),
        lambda: sides[0].communicator.abort(),
    ):
        with (
            devices[1].use(),
            devices[0].launching,
            pytest.raises(Violation, match="another device is current"),
        ):
            call()


def test_a_launch_without_the_devices_lock_is_a_violation(sides):
    sides[0].launching = nullcontext()
    with pytest.raises(Violation, match=r"without holding device\.launching(.|\n)*device 0: send"):
        sides[0].send()


def test_a_first_exchange_with_the_devices_lock_is_a_violation(fresh):
    fresh[0].launching = fresh[0].device.launching
    with pytest.raises(Violation, match=r"may block, and with it all that launch(.|\n)*device 0: send"):
        fresh[0].send()


def test_who_waits_for_an_event_blocks_until_the_device_got_there(background, sides):
    sides[0].send()
    waiting = background(sides[0].stream.record_event().synchronize)
    with pytest.raises(TimeoutError):
        waiting.result(0.05)
    sides[1].receive()
    waiting.result(5)


def test_grouped_calls_complete_at_the_groups_end(sides):
    nccl = sides[0].device.nccl
    sides[1].receive()
    done = sides[1].stream.record_event()
    with sides[0].group():
        nccl.groupStart()
        sides[0].send()
        nccl.groupEnd()  # the inner one
        assert not done.query()
    assert done.query()


def test_a_send_and_a_receive_in_a_group_do_not_wait_for_each_other(sides):
    for side in sides:
        side.memory[:4] = side.communicator.rank
        exchange(side)
    assert [side.memory[:8].tolist() for side in sides] == [[0] * 4 + [1] * 4, [1] * 4 + [0] * 4]


def test_sends_in_a_group_arrive_in_the_order_of_the_calls(sides):
    sides[0].memory[:2] = sides[0].memory.new_tensor([1, 2])
    for side, call in zip(sides, (Side.send, Side.receive), strict=True):
        with side.group():
            call(side, 1)
            call(side, 1, pointer=side.pointer + 1)
    assert sides[1].memory[:2].tolist() == [1, 2]


def test_a_group_progresses_on_all_its_communicators(background, devices, sides):
    others = open_all(background, devices)
    connect(background, others)
    others[0].launching = nullcontext()  # the end of the group takes it
    with sides[0].group():
        sides[0].send()
        others[0].send()
    others[1].receive()  # in the other order
    sides[1].receive()
    assert others[0].stream.record_event().query()
    assert sides[0].stream.record_event().query()


def test_the_end_of_a_group_blocks_for_the_first_exchange_of_all_its_calls(background, fresh):
    first = background(exchange, fresh[0])
    with pytest.raises(TimeoutError):
        first.result(0.05)
    exchange(fresh[1])
    first.result(5)


def test_grouping_what_the_other_side_does_not_is_a_violation(sides):
    with sides[0].group():
        sides[0].send()
        sides[0].send()
    with pytest.raises(Violation, match="one side groups what the other does not"):
        sides[1].receive()


def test_groups_in_different_orders_are_a_deadlock(background, devices, sides):
    others = open_all(background, devices)
    connect(background, others)
    exchange(sides[0])
    others[0].send(stream=sides[0].stream)
    others[1].receive(stream=sides[1].stream)
    with pytest.raises(Violation, match=r"deadlock(.|\n)*device 0: send.* and rank 0 on device 0: recv"):
        exchange(sides[1])


@pytest.mark.parametrize("look", ["record_event", "wait_stream"])
def test_looking_for_a_grouped_call_before_the_groups_end_is_a_violation(sides, look: str):
    stream, other = sides[0].stream, sides[0].device.current_stream()
    with sides[0].group():
        sides[0].send()
        with pytest.raises(Violation, match="not in the stream before groupEnd"):
            stream.record_event() if look == "record_event" else other.wait_stream(stream)


def test_the_end_of_no_group_is_a_violation(devices):
    with pytest.raises(Violation, match="groupEnd without groupStart"):
        devices[0].nccl.groupEnd()


def test_a_group_that_is_left_open_is_a_violation(world, devices):
    devices[0].nccl.groupStart()
    with pytest.raises(Violation, match="MainThread: groupStart without groupEnd"):
        world.check(timeout_s=0)
