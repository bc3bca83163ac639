"""What an expert group's process holds: slots of weights, and the service that runs rows through them."""

import resource
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster.actors.node import listen
from router.links.address import Address
from router.links.base import Link, LinkLost
from router.links.stream import connect
from shards.background import in_foreground
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.cores import usable_cores
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kernels.cpu import set_threads
from shards.staging import Stager


@dataclass
class ExpertProcess:
    """An expert group at work: it holds nothing at first, and is told what to stage."""

    address: str
    store: ExpertStore
    service: ExpertService
    stager: Stager
    fixed_threads: int  # 0: as many as its share of the cores
    abreast: int  # groups like this one that the host's cores can run at once, with at least a core each
    num_threads: int = 1  # that it computes with now
    num_sharing: int = 1  # groups of the model that this host's cores are for
    _sharing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(
        cls, name: str, checkpoint: Path, num_slots: int, num_threads: int, secret: bytes
    ) -> "ExpertProcess":
        """Listen and serve. Raises BrokenCheckpoint."""
        torch.set_num_threads(1)  # what torch does here is too small to share out
        _allow_files()
        config = ModelConfig.from_checkpoint(checkpoint)
        store = ExpertStore(num_slots)
        weights = Checkpoint(checkpoint)
        stager = in_foreground(  # from where it steps back by itself
            lambda: Stager(store, weights, config, lambda address: _connect_to_sibling(address, secret, name))
        )
        listener = in_foreground(lambda: listen(secret, name))  # a step may wait for a link
        service = ExpertService(store, listener, config.hidden_size)
        in_foreground(service.start)
        abreast = max(1, usable_cores() // (num_threads or 1))
        process = cls(str(listener.address), store, service, stager, num_threads, abreast)
        process.share_cores(1)
        return process

    def share_cores(self, num_groups: int) -> None:
        """Compute with this group's share of the host's cores, unless the number of threads is settled.

        Waits for a product that runs.
        """
        with self._sharing:  # orders may come side by side
            self.num_threads = self.fixed_threads or max(1, usable_cores() // num_groups)
            # Engines on the same cores wait for this group: it must not spin while it waits for them.
            in_foreground(lambda: set_threads(self.num_threads, spin_us=0))
            self.num_sharing = num_groups


def _allow_files() -> None:
    """Raise the limit of open files as far as the system lets us: shared weights take two for each slot."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # not everywhere may a process have as many as it is allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _connect_to_sibling(address: str, secret: bytes, name: str) -> Link:
    """Open a link to another group of the same model. Raises LinkLost if somebody else answers there."""
    link = connect(Address.parse(address), secret, name)
    if link.peer.rpartition("/")[0] != name.rpartition("/")[0]:  # it got the address of a group that is dead
        link.close()
        raise LinkLost(f"{link.peer!r} answers there, which is no group of this model")
    return link
