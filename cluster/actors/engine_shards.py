"""Ranks 1 and up of a tensor-parallel engine, as rank 0 sees them."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from cluster.actors.node import listen, node_address
from cluster.actors.quiet_start import QUIET_START
from cluster.actors.rank import DispatchReport, meet_ranks
from cluster.actors.reports import Process
from cluster.actors.shard_actor import Shard as ShardActor
from cluster.actors.shard_seat import ShardSeat
from cluster.settings import ModelSettings
from router.dispatch import Placements
from router.groups.base import GroupLost
from router.groups.gloo import GlooGroup, MeetingPoint
from router.links.base import Frame, Kind, Link, LinkLost
from router.links.rows import frame_of
from shards.shard import Shard
from shards.step import StepBatch
from shards.step_wire import encode_block_ids, encode_step

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 1800.0  # of reading a shard's weights
LINK_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 5.0
POLL_TIMEOUT_S = 10.0
ACTOR_THREADS = 4  # placements and reports, beside the making of the shard


@dataclass(frozen=True)
class LeadingShard:
    """Rank 0 of an engine: runs each step with all ranks; implements the engine's `Runner`."""

    shard: Shard
    links: tuple[Link, ...]

    def run(self, batch: StepBatch) -> Tensor:
        """Compute one step, as `Shard.run` does. Raises GroupLost or LinkLost if a rank is gone."""
        frame = Frame(Kind.STEP, meta=encode_step(batch))
        for link in self.links:
            link.send(frame)
        return self.shard.run(batch)

    def read_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """Gather what all ranks have in some blocks, as `Shard.read_blocks` does. Raises as `run` does."""
        frame = Frame(Kind.READ, meta=encode_block_ids(block_ids))
        for link in self.links:
            link.send(frame)
        return self.shard.read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], rows_BN: Tensor) -> None:
        """Fill some blocks of every rank with its part. Raises LinkLost if a rank is gone."""
        meta = encode_block_ids(block_ids)
        mine_BN, *parts = torch.split(rows_BN, list(self.shard.block_sizes), dim=1)
        for link, part_BN in zip(self.links, parts, strict=True):
            link.send(frame_of(Kind.WRITE, part_BN.contiguous(), meta=meta))
        self.shard.write_blocks(block_ids, mine_BN)


class EngineShards:
    """Shard actors that an engine starts, leads, and takes along when it ends.

    Each is used in this order: `meet`, `lead`, then the rest.
    """

    def __init__(
        self, model: ModelSettings, checkpoint: Path, num_blocks: int, secret: bytes, name: str
    ) -> None:
        """Let Ray start them; does not wait."""
        self._model = model
        self._listener = listen(secret, name)
        self._meeting_point = MeetingPoint(node_address())
        actor = ray.remote(ShardActor).options(
            num_cpus=model.engine_cpus, max_concurrency=ACTOR_THREADS, runtime_env=QUIET_START
        )
        self._actors = []
        for rank in range(1, model.tensor_parallel):
            seat = ShardSeat(
                f"{name}/{rank}",
                rank,
                num_blocks,
                self._meeting_point.address,
                str(self._listener.address),
            )
            self._actors.append(actor.remote(model, str(checkpoint), secret, seat))
        self.processes: tuple[Process, ...] = ()  # of ranks 1 and up; known when they are led

    def meet(self) -> GlooGroup:
        """Wait until all shards run. Raises ValueError if they do not."""
        try:
            return meet_ranks(self._model, self._meeting_point.address, rank=0)
        except GroupLost as error:
            raise ValueError(
                f"tensor_parallel is {self._model.tensor_parallel}, but not all of its shards could be "
                f"started; does the cluster have the CPUs that they ask for? {error}"
            ) from None

    def lead(self, shard: Shard, on_lost: Callable[[], None]) -> LeadingShard:
        """Wait until all shards have read their weights. Raises ValueError with the reason of one that can't.

        `on_lost()` is called, from a thread of its own, when one of them ends, even if no step runs.
        """
        try:
            self.processes = tuple(
                ray.get([actor.process.remote() for actor in self._actors], timeout=LOAD_TIMEOUT_S)
            )
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"a shard could not be started: {reason}") from None
        links = tuple(self._listener.accept(LINK_TIMEOUT_S) for _ in self._actors)
        self._listener.close()
        for link in links:
            threading.Thread(target=_watch, args=(link, on_lost), name="watch-shard", daemon=True).start()
        return LeadingShard(shard, links)

    def follow(self, placements: Placements) -> None:
        """Tell the shards every placement that comes, from a thread of its own."""

        def run() -> None:
            epoch = 0
            while True:
                placement = placements.wait_newer(epoch, POLL_TIMEOUT_S)
                if placement.epoch > epoch:
                    epoch = placement.epoch
                    for actor in self._actors:
                        actor.follow.remote(placement)

        threading.Thread(target=run, name="tell-shards", daemon=True).start()

    def reports(self) -> list[DispatchReport]:
        """Ask the shards what their dispatchers did. Raises RayError, also if one takes too long."""
        reports: list[DispatchReport] = ray.get(
            [actor.report.remote() for actor in self._actors], timeout=REPORT_TIMEOUT_S
        )
        return reports


def _watch(link: Link, on_lost: Callable[[], None]) -> None:
    try:
        link.receive()  # a shard never sends anything: this ends when the shard does
    except LinkLost as error:
        logger.error("a shard is lost, and this engine with it: %s", error)
    else:
        logger.error("shard %r broke the protocol; this engine ends", link.peer)
    on_lost()
