"""What all ranks of an engine are made of: rank 0 in the engine's own process, the others in shards.

L layers   E experts of a layer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.actors.node import node_address
from cluster.settings import ModelSettings
from router.dispatch import DispatchCounts, Dispatcher, Placements
from router.groups.base import TensorGroup
from router.groups.gloo import GlooGroup
from router.links.address import Address
from router.links.pool import LinkPool
from router.links.stream import connect
from shards.background import in_foreground
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.cores import usable_cores
from shards.kernels.cpu import set_threads
from shards.shard import Shard, load_shard

# An engine that is one process goes from one product to the next and waits for nobody. Where it waits for
# expert groups or other ranks on the same cores, a thread that spins takes the core from those it waits for.
SPIN_US_ALONE = 200
CONNECT_TIMEOUT_S = 2.0  # to an expert group: all requests of the engine wait for it
REPLY_TIMEOUT_S = 30.0  # of an expert group
STEP_TIMEOUT_S = 10.0  # of another rank, within a step
MEET_TIMEOUT_S = 120.0  # until all ranks' processes run: Ray may have to find or start a node first


@dataclass(frozen=True)
class DispatchReport:
    """What dispatchers have been through."""

    epoch: int  # no row will any more be sent by an older placement
    load_LE: NDArray[np.int64]  # rows sent to each expert since the last report
    counts: DispatchCounts  # since the start


@dataclass(frozen=True)
class Rank:
    """One rank that is ready to run."""

    shard: Shard
    dispatcher: Dispatcher | None  # None: the model is dense, or its experts are inside

    def report(self) -> DispatchReport | None:
        """Say what the dispatcher has done since this was last asked; None if there is no dispatcher."""
        if self.dispatcher is None:
            return None
        its = self.dispatcher
        return DispatchReport(its.epoch_in_use, its.take_load(), its.counts)


def load_rank(
    model: ModelSettings,
    checkpoint: Path,
    num_blocks: int,
    group: TensorGroup,
    placements: Placements,
    secret: bytes,
    name: str,
) -> Rank:
    """Read one rank's weights. Blocks on the disk; raises ValueError for a checkpoint that does not fit."""
    config = ModelConfig.from_checkpoint(checkpoint)
    is_alone = group.size == 1 and not model.expert_groups
    threads = model.engine_threads or max(1, usable_cores() // group.size)
    in_foreground(lambda: set_threads(threads, SPIN_US_ALONE if is_alone else 0))
    torch.set_num_threads(1)  # what torch does here is too small to share out
    dispatcher = None
    if model.expert_groups:
        dispatcher = Dispatcher(
            placements,
            LinkPool(lambda address: connect(Address.parse(address), secret, name, CONNECT_TIMEOUT_S)),
            config.num_layers,
            config.num_experts,
            reply_timeout_s=REPLY_TIMEOUT_S,
            deadline_s=model.expert_deadline_s,
        )
    shard = load_shard(
        Checkpoint(checkpoint), config, dispatcher, num_blocks, lambda done, total: None, group
    )
    return Rank(shard, dispatcher)


def meet_ranks(model: ModelSettings, meeting_point: tuple[str, int], rank: int) -> GlooGroup:
    """Wait until all ranks of an engine are there. Raises GroupLost if they do not come."""
    return in_foreground(  # with gloo's threads, which receive what a step waits for
        lambda: GlooGroup(
            meeting_point,
            rank,
            model.tensor_parallel,
            node_address(),
            timeout_s=step_timeout_s(model),
            meet_timeout_s=MEET_TIMEOUT_S,
        )
    )


def step_timeout_s(model: ModelSettings) -> float:
    """Return how long one rank may wait for another: longer if that may wait for an expert meanwhile."""
    return STEP_TIMEOUT_S + (REPLY_TIMEOUT_S + model.expert_deadline_s if model.expert_groups else 0.0)


def merged(reports: Sequence[DispatchReport]) -> DispatchReport:
    """Return one report for all ranks of an engine."""
    return DispatchReport(
        min(report.epoch for report in reports),
        np.sum([report.load_LE for report in reports], axis=0),
        DispatchCounts(
            sum(report.counts.failovers for report in reports),
            sum(report.counts.rows_resent for report in reports),
        ),
    )
