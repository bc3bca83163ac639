"""The double catches communicators that open, are aborted or are left behind as NCCL does not allow."""

import pytest

from tests.router.nccl_double import NcclError, Violation
from tests.router.nccl_sides import Side, background, devices, fresh, join, sides, world

__all__ = ["background", "devices", "fresh", "sides", "world"]  # fixtures, which tests ask for by name


def test_opening_waits_for_all_ranks(background, devices):
    unique_id = devices[0].nccl.get_unique_id()
    opening = background(join, devices[0], 2, unique_id, 0)
    with pytest.raises(TimeoutError):
        opening.result(0.05)
    join(devices[1], 2, unique_id, 1)
    assert opening.result(5).communicator.rank == 0


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
