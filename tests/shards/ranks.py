"""The ranks of a tensor-parallel engine as threads of this process, over real gloo groups."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from router.groups.gloo import GlooGroup, MeetingPoint
from shards.layers.moe import Experts
from shards.shard import Shard, load_shard
from shards.step import StepBatch
from tests.shards.tiny_models import TinyModel

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Ranks:
    """Runs each step on all ranks, as `Shard` runs it on one."""

    shards: tuple[Shard, ...]
    pool: ThreadPoolExecutor

    def run(self, batch: StepBatch) -> Tensor:
        """Return rank 0's logits, after checking that the other ranks have the same, bit for bit."""
        steps = [self.pool.submit(shard.run, batch) for shard in self.shards]
        errors = [step.exception() for step in steps]
        if errors[0]:
            assert all(type(error) is type(errors[0]) for error in errors), errors
            raise errors[0]
        first, *others = (step.result() for step in steps)
        assert all(torch.equal(first, other) for other in others)
        return first


@contextmanager
def ranks_of(
    model: TinyModel, size: int, experts: Callable[[int], Experts | None] = lambda rank: None
) -> Iterator[Ranks]:
    """Load a model on `size` ranks, whose experts `experts` makes, or which hold them themselves."""
    meeting_point = MeetingPoint(HOST)
    with ThreadPoolExecutor(size) as pool:
        meetings = [
            pool.submit(GlooGroup, meeting_point.address, rank, size, HOST, timeout_s=30)
            for rank in range(size)
        ]
        groups = [meeting.result() for meeting in meetings]
        try:
            shards = [
                load_shard(
                    model.checkpoint, model.config, experts(group.rank), 64, lambda done, total: None, group
                )
                for group in groups
            ]
            yield Ranks(tuple(shards), pool)
        finally:
            for group in groups:
                group.close()
