"""What only a group over NCCL has: a buffer of the device, and a stream beside the caller's."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from router.groups.nccl import NcclGroup
from tests.router.nccl_double import World


@pytest.fixture
def groups() -> Iterator[list[NcclGroup]]:
    world = World()
    devices = [world.device(f"device {rank}") for rank in range(2)]
    unique_id = devices[0].nccl.get_unique_id()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: NcclGroup(devices[rank], unique_id, rank, 2), range(2)))
    yield groups
    for group in groups:
        group.close()
    world.check()


def reduce_all(groups: list[NcclGroup], *shapes: tuple[int, int]) -> None:
    def call(group: NcclGroup) -> None:
        for shape in shapes:
            group.all_reduce(torch.ones(shape))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, groups))


def test_the_buffer_is_reused_and_grows(groups):
    reduce_all(groups, (1, 8), (1, 4), (1, 8), (4, 8), (1, 8))
    assert groups[0]._device.allocated == [2, 64, 256]


def test_a_groups_collectives_run_behind_what_the_callers_stream_holds(groups):
    kernel = groups[0]._device.current_stream().run(lambda: None)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(group.all_reduce, torch.ones(1, 1)) for group in groups]
        with pytest.raises(TimeoutError):
            running[1].result(0.05)
        kernel.open()
        assert [each.result(5).item() for each in running] == [2, 2]
