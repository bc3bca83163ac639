"""What an expert group's process holds: slots of weights, and the service that runs rows through them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.actors.node import listen
from router.links.address import Address
from router.links.base import Link, LinkLost
from router.links.stream import connect
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kernels.cpu import set_threads
from shards.staging import Stager


@dataclass(frozen=True)
class ExpertProcess:
    """An expert group at work: it holds nothing at first, and is told what to stage."""

    address: str
    store: ExpertStore
    service: ExpertService
    stager: Stager

    @classmethod
    def start(
        cls, name: str, checkpoint: Path, num_slots: int, num_threads: int, secret: bytes
    ) -> "ExpertProcess":
        """Listen and serve. Raises BrokenCheckpoint."""
        # It shares the node's cores with engines that wait for it: it must not spin while it waits for them.
        set_threads(num_threads, spin_us=0)
        torch.set_num_threads(1)  # what torch does here is too small to share out
        config = ModelConfig.from_checkpoint(checkpoint)
        store = ExpertStore(num_slots)
        stager = Stager(
            store,
            Checkpoint(checkpoint),
            config,
            lambda address: _connect_to_sibling(address, secret, name),
        )
        listener = listen(secret, name)
        service = ExpertService(store, listener, config.hidden_size)
        service.start()
        return cls(str(listener.address), store, service, stager)


def _connect_to_sibling(address: str, secret: bytes, name: str) -> Link:
    """Open a link to another group of the same model. Raises LinkLost if somebody else answers there."""
    link = connect(Address.parse(address), secret, name)
    if link.peer.rpartition("/")[0] != name.rpartition("/")[0]:  # it got the address of a group that is dead
        link.close()
        raise LinkLost(f"{link.peer!r} answers there, which is no group of this model")
    return link
