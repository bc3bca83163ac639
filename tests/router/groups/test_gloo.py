"""Ranks in threads for what they compute, and in processes for how they die."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Queue

import pytest
import torch
from torch import Tensor

from router.groups.base import GroupLost, TensorGroup
from router.groups.gloo import GlooGroup, MeetingPoint

HOST = "127.0.0.1"


def on_all_ranks(size: int, do: Callable[[TensorGroup], Tensor]) -> list[Tensor]:
    """Run `do` on each of `size` ranks, threads of this process; return what came of it, in order."""
    meeting_point = MeetingPoint(HOST)
    with ThreadPoolExecutor(size) as pool:
        # All are there before the first may leave: to leave a group that still meets is another story.
        groups = list(pool.map(lambda rank: GlooGroup(meeting_point.address, rank, size, HOST), range(size)))
        try:
            return list(pool.map(do, groups))
        finally:
            for group in groups:
                group.close()


def tensor_of(rank: int, num_rows: int = 5) -> Tensor:
    return torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_sum_is_added_up_in_the_order_of_the_ranks(size):
    expected = tensor_of(0)
    for rank in range(1, size):
        expected = expected + tensor_of(rank)
    for result in on_all_ranks(size, lambda group: group.all_reduce(tensor_of(group.rank))):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_a_row_of_a_sum_does_not_depend_on_the_rows_beside_it(size):
    many, few = (
        on_all_ranks(size, lambda group, n=n: group.all_reduce(tensor_of(group.rank, 1000)[:n]))[0]
        for n in (1000, 7)
    )
    assert torch.equal(many[:7], few)


def test_what_is_gathered_lies_side_by_side_in_the_order_of_the_ranks():
    expected = torch.cat([tensor_of(rank) for rank in range(3)], dim=1)
    for result in on_all_ranks(3, lambda group: group.all_gather(tensor_of(group.rank))):
        assert torch.equal(result, expected)


def test_columns_of_a_larger_tensor_can_be_gathered():
    results = on_all_ranks(2, lambda group: group.all_gather(tensor_of(0)[:, group.rank :: 2]))
    for result in results:
        assert torch.equal(result, torch.cat([tensor_of(0)[:, ::2], tensor_of(0)[:, 1::2]], dim=1))


def test_no_rows_are_gathered_to_no_rows():
    for result in on_all_ranks(2, lambda group: group.all_gather(torch.empty(0, 3))):
        assert result.shape == (0, 6)


def test_a_rank_that_leaves_is_missed_by_the_others():
    def leave_or_wait(group: TensorGroup) -> Tensor:
        if group.rank == 1:
            group.close()
            return torch.empty(0)
        # Or the third, if that one has noticed, and left, before.
        with pytest.raises(GroupLost, match=rf"rank [1{2 - group.rank}] of 3 is lost"):
            group.all_reduce(tensor_of(0))
        return torch.empty(0)

    on_all_ranks(3, leave_or_wait)


def test_a_group_that_lost_a_rank_stays_lost():
    def leave_or_try_twice(group: TensorGroup) -> Tensor:
        if group.rank == 0:
            with pytest.raises(GroupLost):
                group.all_reduce(tensor_of(0))
            with pytest.raises(GroupLost, match="has left the group"):
                group.all_reduce(tensor_of(0))
        return torch.empty(0)

    on_all_ranks(2, leave_or_try_twice)


def test_ranks_that_do_not_come_are_named_with_the_place_to_meet():
    meeting_point = MeetingPoint(HOST)
    with pytest.raises(GroupLost, match=rf"not all 2 ranks met at {HOST}:{meeting_point.address[1]}"):
        GlooGroup(meeting_point.address, 0, 2, HOST, meet_timeout_s=0.5)


def test_the_meeting_point_listens_at_the_given_address_only():
    meeting_point = MeetingPoint("127.0.0.2")
    socket.create_connection(meeting_point.address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.3", meeting_point.address[1]))


def serve_sums(rank: int, size: int, meeting_point: tuple[str, int], pids: "Queue[int]") -> None:
    """Take part in sums until the group is lost, in a process of its own."""
    torch.set_num_threads(1)
    group = GlooGroup(meeting_point, rank, size, HOST, timeout_s=30)
    pids.put(os.getpid())
    while True:
        group.all_reduce(tensor_of(rank))


@contextmanager
def rank_elsewhere(timeout_s: float) -> Iterator[tuple[GlooGroup, int]]:
    """Yield rank 0 of a group of two, and the pid of rank 1."""
    meeting_point, context = MeetingPoint(HOST), multiprocessing.get_context("spawn")
    pids: Queue[int] = context.Queue()
    process = context.Process(target=serve_sums, args=(1, 2, meeting_point.address, pids), daemon=True)
    process.start()
    try:
        group = GlooGroup(meeting_point.address, 0, 2, HOST, timeout_s=timeout_s)
        yield group, pids.get(timeout=30)
    finally:
        process.kill()
        process.join()


def sum_until_lost(group: TensorGroup) -> None:
    while True:
        group.all_reduce(tensor_of(0))


def test_the_death_of_a_rank_is_noticed_at_once():
    with rank_elsewhere(timeout_s=60) as (group, pid):
        group.all_reduce(tensor_of(0))
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(GroupLost, match="rank 1 of 2 is lost"):
            sum_until_lost(group)
        assert time.monotonic() - killed_at < 5  # of the 60 that a rank may take


def test_a_rank_that_stands_still_is_given_up_when_its_time_is_over():
    with rank_elsewhere(timeout_s=0.5) as (group, pid):
        group.all_reduce(tensor_of(0))
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(GroupLost, match=r"rank 1 of 2 is lost: Timed out waiting 500ms"):
            sum_until_lost(group)
