"""A communicator waits for nobody longer than it should. The double stands in for NCCL."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from router.communicator import Communicator, CommunicatorLost
from router.links.base import Dtype
from tests.router.nccl_double import DoubleDevice, NcclError, World

KNOBS = {"open_timeout_s": 10.0, "timeout_s": 10.0}


def hello(communicator: Communicator) -> None:
    if communicator.rank == 0:
        communicator.send(communicator._device.empty(1), Dtype.UINT8, 1)
    else:
        communicator.receive(communicator._device.empty(1), Dtype.UINT8, 0)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.check()


@pytest.fixture
def devices(world: World) -> tuple[DoubleDevice, DoubleDevice]:
    return world.device("a"), world.device("b")


@pytest.fixture
def open_pair(devices) -> Iterator[Callable[..., tuple[Communicator, Communicator]]]:
    """Return a maker of both ranks; they are closed with the test."""
    made: list[Communicator] = []

    def open_both(**knobs) -> tuple[Communicator, Communicator]:
        unique_id = devices[0].nccl.get_unique_id()
        with ThreadPoolExecutor(2) as pool:
            args = [(device, unique_id, rank, 2, hello) for rank, device in enumerate(devices)]
            made.extend(pool.map(lambda each: Communicator(*each, **KNOBS | knobs), args))
        return made[0], made[1]

    yield open_both
    for communicator in made:
        communicator.close()


@pytest.fixture
def background() -> Iterator[Callable[..., Future]]:
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


def test_opening_gives_up_when_not_all_ranks_come(world: World, devices):
    with pytest.raises(CommunicatorLost, match=r"not all 2 ranks came within 0\.05 s"):
        Communicator(
            devices[0], devices[0].nccl.get_unique_id(), 0, 2, hello, open_timeout_s=0.05, timeout_s=10
        )


def test_opening_ends_when_nobody_wants_it_any_more(devices):
    wanted = iter([True, True, False])
    with pytest.raises(CommunicatorLost, match="not wanted"):
        Communicator(
            devices[0], devices[0].nccl.get_unique_id(), 0, 2, hello, is_wanted=lambda: next(wanted), **KNOBS
        )


def test_a_rank_that_comes_too_late_finds_a_communicator_that_is_taken_down(devices, background):
    """The thread that gave up is still in NCCL; when the other rank lets it go, it must abort."""
    unique_id = devices[0].nccl.get_unique_id()
    with pytest.raises(CommunicatorLost):
        Communicator(devices[0], unique_id, 0, 2, hello, open_timeout_s=0.05, timeout_s=10)
    with pytest.raises(CommunicatorLost, match="not all 2 ranks"):
        Communicator(devices[1], unique_id, 1, 2, hello, open_timeout_s=0.2, timeout_s=10)


def test_an_error_of_nccl_while_opening_says_so(devices):
    def fail(communicator: Communicator) -> None:
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR")

    unique_id = devices[0].nccl.get_unique_id()
    with pytest.raises(CommunicatorLost, match="SYSTEM_ERROR"):
        Communicator(devices[0], unique_id, 0, 1, fail, **KNOBS)


def test_an_operation_without_its_other_side_loses_the_communicator_in_time(open_pair):
    lost = threading.Event()
    _, ours = open_pair(timeout_s=0.1, on_lost=lost.set)
    ours.receive(ours._device.empty(8), Dtype.FLOAT32, 0)
    assert not ours.is_idle()
    assert lost.wait(5)  # nobody asks: the communicator notices by itself
    with pytest.raises(CommunicatorLost, match=r"did not take part within 0\.1 s"):
        ours.is_idle()
    with pytest.raises(CommunicatorLost):
        ours.send(ours._device.empty(8), Dtype.UINT8, 0)


def test_an_idle_communicator_outlives_its_timeout(open_pair):
    lost = threading.Event()
    open_pair(timeout_s=0.02, on_lost=lost.set)
    assert not lost.wait(0.2)


def test_an_operation_that_hangs_behind_one_that_is_done_loses_the_communicator_in_time(open_pair):
    lost = threading.Event()
    ours, theirs = open_pair(timeout_s=0.1, on_lost=lost.set)
    for _ in range(2):
        ours.send(ours._device.empty(8), Dtype.UINT8, 1)
    theirs.receive(theirs._device.empty(8), Dtype.UINT8, 0)
    assert lost.wait(5)  # nobody asks, so the first is still in the list
    with pytest.raises(CommunicatorLost, match="did not take part"):
        ours.check()


# cupy looks up a name for each error, but has none for ncclInProgress, which is 7.
@pytest.mark.parametrize("error", [NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited"), KeyError(7)])
def test_an_error_of_the_network_loses_the_communicator(open_pair, error: Exception):
    lost = threading.Event()
    _, ours = open_pair(timeout_s=0.4, on_lost=lost.set)
    ours.receive(ours._device.empty(8), Dtype.UINT8, 0)
    ours._comm.clique.network_error = error
    assert lost.wait(5)
    with pytest.raises(CommunicatorLost, match=re.escape(repr(error))):
        ours.wait()


@pytest.mark.parametrize("error", [NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited"), KeyError(7)])
def test_an_error_of_a_call_loses_the_communicator(open_pair, error: Exception):
    ours, _ = open_pair()
    ours._comm.clique.network_error = error
    with pytest.raises(CommunicatorLost, match=re.escape(repr(error))):
        ours.send(ours._device.empty(8), Dtype.UINT8, 1)


def test_what_an_abort_leaves_in_memory_is_not_taken_for_a_result(open_pair):
    _, ours = open_pair()
    ours.receive(ours._device.empty(8), Dtype.UINT8, 0)
    ours.close()
    deadline = time.monotonic() + 5
    while not ours._running[0].done.query() and time.monotonic() < deadline:
        pass  # the abort ends the operation, as far as the device can tell
    with pytest.raises(CommunicatorLost, match="closed on this side"):
        ours.is_idle()


def test_closing_frees_a_thread_that_waits(open_pair, background):
    _, ours = open_pair()
    ours.receive(ours._device.empty(8), Dtype.UINT8, 0)
    waiting = background(ours.wait)
    ours.close()
    with pytest.raises(CommunicatorLost):
        waiting.result(5)


def test_memory_is_kept_until_the_operation_is_done(open_pair):
    """The double raises if it reads memory that nobody holds any more."""
    ours, theirs = open_pair()
    rows = ours._device.empty(8)
    rows.fill_(3)
    ours.send(rows, Dtype.UINT8, 1)
    del rows
    target = theirs._device.empty(8)
    theirs.receive(target, Dtype.UINT8, 0)
    theirs.wait()
    assert target.tolist() == [3] * 8


def test_an_operation_runs_behind_what_the_callers_stream_holds(open_pair):
    ours, theirs = open_pair()
    rows, target = ours._device.empty(8), theirs._device.empty(8)
    kernel = ours._device.current_stream().run(lambda: rows.fill_(9))
    ours.send(rows, Dtype.UINT8, 1)
    theirs.receive(target, Dtype.UINT8, 0)
    assert not theirs.is_idle()
    kernel.open()
    theirs.wait()
    assert target.tolist() == [9] * 8
