"""What every group of ranks promises, whatever it is made of."""

import functools
import operator
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from router.groups.base import GroupLost, TensorGroup
from tests.router.groups.group_kinds import KINDS, Kind

# T tokens   C columns of one rank   R ranks

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PARAMS = [pytest.param(kind, marks=[pytest.mark.gpu, NO_GPU] if kind == "cuda" else []) for kind in KINDS]


@pytest.fixture(params=PARAMS)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    with KINDS[request.param]() as kind:
        yield kind


@pytest.fixture
def join_all(kind: Kind) -> Iterator[Callable[..., list[TensorGroup]]]:
    """Return a maker of all ranks of a group; they leave with the test."""
    joined: list[TensorGroup] = []

    def join(size: int, **knobs: float) -> list[TensorGroup]:
        joined.extend(kind.join_all(size, **knobs))
        return joined

    yield join
    for group in joined:
        group.close()


def parts(
    size: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Return a tensor per rank, of such different magnitudes that every order of adding shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) * 10**rank for rank in range(size)]
    return [tensor.to(dtype) for tensor in tensors]


def in_order(tensors: list[Tensor]) -> Tensor:
    return functools.reduce(operator.add, tensors)


def all_ranks(kind: Kind, groups: list[TensorGroup], tensors: list[Tensor], name: str) -> list[Tensor]:
    """Make the call of all ranks at once."""

    def call(rank: int) -> Tensor:
        return getattr(groups[rank], name)(tensors[rank].to(kind.place)).cpu()

    return kind.run(call, len(groups))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_knows_its_place(kind: Kind, join_all, size: int):
    assert [(group.rank, group.size) for group in join_all(size)] == [(rank, size) for rank in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (300, 1024)])
def test_all_ranks_get_the_sum_in_the_order_of_the_ranks_bit_for_bit(kind: Kind, join_all, shape, dtype):
    tensors = parts(3, shape, dtype)
    for result in all_ranks(kind, join_all(3), tensors, "all_reduce"):
        assert torch.equal(result, in_order(tensors))


def test_the_order_of_the_ranks_can_be_told_from_others():
    tensors = parts(3, (7, 33))
    assert not torch.equal(in_order(tensors), in_order(tensors[::-1]))


def test_a_row_of_a_sum_depends_on_no_other_row(kind: Kind, join_all):
    groups, tensors = join_all(3), parts(3, (200, 64))
    together = all_ranks(kind, groups, tensors, "all_reduce")
    for row in (0, 117, 199):
        alone = all_ranks(kind, groups, [tensor[row : row + 1] for tensor in tensors], "all_reduce")
        assert torch.equal(alone[0], together[0][row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 12), (0, 8)])
def test_all_ranks_get_the_columns_of_all_side_by_side(kind: Kind, join_all, shape, dtype):
    tensors = parts(3, shape, dtype)
    for result in all_ranks(kind, join_all(3), tensors, "all_gather"):
        assert torch.equal(result, torch.cat(tensors, dim=-1))


def test_a_tensor_need_not_be_contiguous_and_is_not_changed(kind: Kind, join_all):
    tensors = [tensor.T for tensor in parts(2, (4, 6))]
    before = [tensor.clone() for tensor in tensors]
    (result, _) = all_ranks(kind, join_all(2), tensors, "all_reduce")
    assert torch.equal(result, in_order(before))
    assert all(map(torch.equal, tensors, before))


def test_a_result_outlives_the_calls_after_it(kind: Kind, join_all):
    groups, tensors = join_all(2), parts(2, (4, 8))

    def call_often(rank: int) -> list[Tensor]:
        group, x_TC = groups[rank], tensors[rank].to(kind.place)
        return [group.all_reduce(x_TC), group.all_gather(x_TC), group.all_reduce(x_TC * 0)]

    for total, gathered, zero in kind.run(call_often, 2):
        assert torch.equal(total.cpu(), in_order(tensors))
        assert torch.equal(gathered.cpu(), torch.cat(tensors, dim=-1))
        assert not zero.any()


def test_a_group_whose_ranks_do_not_all_come_is_lost_in_time(kind: Kind):
    began = time.monotonic()
    with pytest.raises(GroupLost):
        kind.join(0, 2, timeout_s=1, meet_timeout_s=1)
    assert time.monotonic() - began < 10


def test_a_rank_that_has_left_can_call_no_more(kind: Kind, join_all):
    groups = join_all(2)
    groups[0].close()
    groups[0].close()
    with pytest.raises(GroupLost):
        groups[0].all_reduce(torch.zeros(1, 1, device=kind.place))


@pytest.mark.parametrize("name", ["all_reduce", "all_gather"])
def test_when_a_rank_leaves_the_others_next_call_is_lost_in_time(kind: Kind, join_all, name: str):
    groups = join_all(3, timeout_s=1)
    groups[1].close()
    began = time.monotonic()

    def call(rank: int) -> None:
        if rank != 1:
            getattr(groups[rank], name)(torch.zeros(2, 2, device=kind.place))

    assert [type(outcome) for outcome in kind.run(call, 3)] == [GroupLost, type(None), GroupLost]
    assert time.monotonic() - began < 10


def test_a_rank_that_does_not_call_loses_the_group_in_time(kind: Kind, join_all):
    groups = join_all(2, timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(GroupLost):
        groups[0].all_reduce(torch.zeros(2, 2, device=kind.place))
    assert time.monotonic() - began < 10
    with pytest.raises(GroupLost):
        groups[0].all_reduce(torch.zeros(2, 2, device=kind.place))
