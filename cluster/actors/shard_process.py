"""What a shard's process holds: one rank of a model, and the thread that runs the engine's steps on it."""

import contextlib
import logging
import os
import threading
from pathlib import Path

from cluster.actors.rank import DispatchReport, load_rank, meet_ranks
from cluster.actors.shard_seat import ShardSeat
from cluster.settings import ModelSettings
from router.dispatch import ExpertUnavailable
from router.links.address import Address
from router.links.base import Frame, Kind, LinkLost
from router.links.rows import rows_of
from router.links.stream import connect
from router.pushed_placements import PushedPlacements
from shards.background import in_foreground
from shards.shard import Shard
from shards.step_wire import decode_block_ids, decode_step

logger = logging.getLogger(__name__)


class ShardProcess:
    """A shard at work. Making one blocks until the other ranks are met and the weights are read."""

    def __init__(self, model: ModelSettings, checkpoint: Path, secret: bytes, seat: ShardSeat) -> None:
        """Raises ValueError for a checkpoint that does not fit, GroupLost or LinkLost without an engine."""
        self.placements = PushedPlacements()
        group = meet_ranks(model, seat.meeting_point, seat.rank)
        self._rank = load_rank(model, checkpoint, seat.num_blocks, group, self.placements, secret, seat.name)
        self._link = connect(Address.parse(seat.engine_address), secret, seat.name)
        in_foreground(threading.Thread(target=self._run, name="shard-steps", daemon=True).start)

    def report(self) -> DispatchReport | None:
        """Say what this rank's dispatcher has done since this was last asked; None if it has none."""
        return self._rank.report()

    def _run(self) -> None:
        """Run what the engine runs, until it is gone or a step fails; this process ends with it."""
        try:
            while True:
                follow(self._link.receive(), self._rank.shard)
        except LinkLost as error:
            logger.info("the engine is gone, and so is this shard: %s", error)
        except BaseException:
            logger.exception("the shard's step failed; this engine is lost")
        finally:
            os._exit(1)


def follow(frame: Frame, shard: Shard) -> None:
    """Do what rank 0 does at this moment. Raises ValueError for a frame that it does not send."""
    match frame.kind:
        case Kind.STEP:
            # If an expert can't be had, all ranks give up this step, and the engine says so.
            with contextlib.suppress(ExpertUnavailable):
                shard.run(decode_step(frame.meta))
        case Kind.READ:
            shard.read_blocks(decode_block_ids(frame.meta))
        case Kind.WRITE:
            part_BN = rows_of(frame, shard.block_sizes[shard.decoder.group.rank])
            shard.write_blocks(decode_block_ids(frame.meta), part_BN)
        case _:
            raise ValueError(f"rank 0 sends no {frame.kind.name}")
