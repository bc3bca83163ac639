"""What an expert group's process holds: slots of weights, and the service that runs rows through them."""

from pathlib import Path

import torch

from cluster.actors.node import listen
from router.placement import Group
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kernels.cpu import set_threads


def start_service(
    name: str, checkpoint: Path, slots: tuple[tuple[int, int], ...], num_threads: int, secret: bytes
) -> tuple[ExpertService, Group]:
    """Read the slots' weights and serve them. Blocks on the disk; raises BrokenCheckpoint."""
    # It shares the node's cores with engines that wait for it: it must not spin while it waits for them.
    set_threads(num_threads, spin_us=0)
    torch.set_num_threads(1)  # what torch does here is too small to share out
    config = ModelConfig.from_checkpoint(checkpoint)
    store = ExpertStore.load(Checkpoint(checkpoint), config, slots, lambda done, total: None)
    listener = listen(secret, name)
    service = ExpertService(store, listener, slots, config.hidden_size)
    service.start()
    return service, Group(name, str(listener.address), slots)
