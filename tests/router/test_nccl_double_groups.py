"""The double enqueues a group's calls at its end, all at once, and catches sides that group unlike."""

from contextlib import nullcontext

import pytest

from tests.router.nccl_double import Violation
from tests.router.nccl_sides import (
    Side,
    background,
    connect,
    devices,
    exchange,
    fresh,
    open_all,
    sides,
    world,
)

__all__ = ["background", "devices", "fresh", "sides", "world"]  # fixtures, which tests ask for by name


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
