"""What an engine's process holds: the model, its cache, and the thread that steps them."""

import logging
import os
from pathlib import Path

import torch

from cluster.actors.router_client import RouterClient
from cluster.actors.token_links import TokenSender
from cluster.engine.engine import Engine
from cluster.engine.loop import EngineLoop
from cluster.engine.memory import free_bytes, num_kv_blocks
from cluster.engine.observer import EngineObserver
from cluster.metrics import EngineMetrics
from cluster.settings import ModelSettings
from router.dispatch import Dispatcher, ExpertUnavailable
from router.links.address import Address
from router.links.pool import LinkPool
from router.links.stream import connect
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.cores import usable_cores
from shards.kernels.cpu import set_threads
from shards.kv_cache import BLOCK_SIZE
from shards.partition import all_tensors, engine_tensors
from shards.shard import load_shard

logger = logging.getLogger(__name__)

FIRST_PLACEMENT_TIMEOUT_S = 600.0
# With experts inside, the engine's threads go from one product to the next and wait for nobody else. With
# expert groups on the same cores, a thread that spins takes the core from the group it is waiting for.
SPIN_US_ALONE = 200


class EngineProcess:
    """An engine at work. Making one blocks until the weights are read and the expert groups are there."""

    def __init__(
        self, model: ModelSettings, checkpoint: Path, secret: bytes, name: str, router: RouterClient
    ) -> None:
        """Raises ValueError for a checkpoint or settings that do not fit, or if experts can't be started."""
        config = ModelConfig.from_checkpoint(checkpoint)
        remote_experts = model.expert_groups > 0
        set_threads(model.engine_threads or usable_cores(), 0 if remote_experts else SPIN_US_ALONE)
        torch.set_num_threads(1)  # what torch does here is too small to share out
        weights = Checkpoint(checkpoint)
        self.context_length, num_blocks = _fit(model, config, weights)
        experts = _dispatcher(model, config, secret, name, router) if remote_experts else None
        shard = load_shard(weights, config, experts, num_blocks, lambda done, total: None)
        if remote_experts:
            router.wait_first(FIRST_PLACEMENT_TIMEOUT_S)
        engine = Engine(
            shard,
            vocab_size=config.vocab_size,
            context_length=self.context_length,
            num_blocks=num_blocks,
            max_step_tokens=model.max_step_tokens,
            max_running=model.max_running,
            prefix_caching=model.prefix_caching,
            request_errors=(ExpertUnavailable,),
        )
        self.observer = EngineObserver(EngineMetrics(), model.name)
        sender = TokenSender(secret, name, lambda gateway, then: self.loop.abort_gateway(gateway, then))
        self.loop = EngineLoop(
            engine,
            sender.send,
            self.observer,
            model.max_running + model.max_waiting,
            # Gone is seen at once, by Serve and by the gateways; only refusing is not.
            on_failure=lambda: os._exit(1),
        )


def _fit(model: ModelSettings, config: ModelConfig, weights: Checkpoint) -> tuple[int, int]:
    """Return the context length and the number of KV blocks that settings, checkpoint and memory allow."""
    held = engine_tensors(config) if model.expert_groups else all_tensors(config)
    weight_bytes = sum(weights.tensors[name].num_bytes for name in held if name in weights.tensors)
    context_length = min(model.context_length or config.context_length, config.context_length)
    num_blocks = num_kv_blocks(
        config,
        context_length,
        model.max_running,
        model.kv_cache_tokens,
        model.kv_cache_fraction,
        max(free_bytes() - weight_bytes, 0),  # the weights are still to come
    )
    fitting = num_blocks * BLOCK_SIZE
    if fitting < context_length:
        logger.warning("the context is cut from %s to the KV cache's %s tokens", context_length, fitting)
    return min(context_length, fitting), num_blocks


def _dispatcher(
    model: ModelSettings, config: ModelConfig, secret: bytes, name: str, router: RouterClient
) -> Dispatcher:
    links = LinkPool(lambda address: connect(Address.parse(address), secret, name))
    return Dispatcher(
        router, links, config.num_layers, config.num_experts, deadline_s=model.expert_deadline_s
    )
