"""A shard as a Ray actor: one rank of a tensor-parallel engine. Rank 0 is the engine's own process."""

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.actors.process_log import log_to_stderr
from cluster.actors.reports import Process
from cluster.actors.shard_seat import ShardSeat
from cluster.settings import ModelSettings
from router.placement import Placement

if TYPE_CHECKING:
    from cluster.actors.rank import DispatchReport


class Shard:
    """Holds its share of the model, and runs the steps that come over the engine's link.

    It is the engine's child, to Ray as well: it ends when the engine does.
    """

    def __init__(self, model: ModelSettings, checkpoint: str, secret: bytes, seat: ShardSeat) -> None:
        log_to_stderr()
        # Not above: an engine's process names this class before it has torch.
        from cluster.actors.shard_process import ShardProcess

        self._name = seat.name
        self._process = ShardProcess(model, Path(checkpoint), secret, seat)

    def process(self) -> Process:
        """Say who this is, once the weights are read and the link to the engine is there."""
        return Process.this("Shard", self._name)

    def follow(self, placement: Placement) -> None:
        """Take in where experts live from now on."""
        self._process.placements.push(placement)

    def report(self) -> "DispatchReport | None":
        """Return what this rank's dispatcher has done since the last report; None if it has none."""
        return self._process.report()
