"""The double moves what sides send, in order, and catches the calls that NCCL would not forgive."""

from contextlib import nullcontext

import pytest

from tests.router.nccl_double import Violation
from tests.router.nccl_sides import (
    FLOAT32,
    UINT8,
    Side,
    background,
    connect,
    devices,
    fresh,
    open_all,
    sides,
    world,
)

__all__ = ["background", "devices", "fresh", "sides", "world"]  # fixtures, which tests ask for by name


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
