"""What an engine's process holds: the model, its cache, and the thread that steps them."""

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from cluster.actors.block_links import BlockReceiver, BlockSender
from cluster.actors.engine_choice import engine_tag
from cluster.actors.engine_shards import EngineShards
from cluster.actors.node import listen
from cluster.actors.rank import DispatchReport, load_rank, merged
from cluster.actors.reports import Process
from cluster.actors.router_client import RouterClient
from cluster.actors.token_links import TokenSender
from cluster.engine.engine import Engine, Runner
from cluster.engine.loop import EngineLoop
from cluster.engine.memory import free_bytes, num_kv_blocks
from cluster.engine.observer import EngineObserver
from cluster.metrics import EngineMetrics
from cluster.settings import ModelSettings
from router.dispatch import ExpertUnavailable
from router.groups.single import SingleRank
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.kv_cache import block_bytes, block_numbers
from shards.partition import all_tensors, engine_tensors

FIRST_PLACEMENT_TIMEOUT_S = 600.0


class EngineProcess:
    """An engine at work. Making one blocks until the weights are read and the expert groups are there."""

    def __init__(
        self, model: ModelSettings, checkpoint: Path, secret: bytes, name: str, router: RouterClient
    ) -> None:
        """Raises ValueError for a checkpoint or settings that do not fit, or if others can't be started."""
        config = ModelConfig.from_checkpoint(checkpoint)
        context_length = model.served_context(config.context_length)
        weights = Checkpoint(checkpoint)
        num_blocks = _num_blocks(model, config, context_length, weights)
        self._shards: EngineShards | None = None
        if model.tensor_parallel > 1:
            self._shards = EngineShards(model, checkpoint, num_blocks, secret, name)
        group = self._shards.meet() if self._shards else SingleRank()
        self._rank = load_rank(model, checkpoint, num_blocks, group, router.placements, secret, name)
        runner: Runner = self._rank.shard
        if self._shards:
            runner = self._shards.lead(self._rank.shard, on_lost=_end)
        if model.expert_groups:
            router.wait_first(FIRST_PLACEMENT_TIMEOUT_S)
            if self._shards:
                self._shards.follow(router.placements)
        self._block_sender = BlockSender(secret, name) if model.copies_blocks else None
        engine = Engine(
            runner,
            vocab_size=config.vocab_size,
            context_length=context_length,
            num_blocks=num_blocks,
            max_step_tokens=model.max_step_tokens,
            max_running=model.max_running,
            prefix_caching=model.prefix_caching,
            model=_identity(model, config, weights) if self._block_sender else b"",
            standbys=self._block_sender,
            block_bytes=block_bytes(config),
            request_errors=(ExpertUnavailable,),
        )
        self.observer = EngineObserver(EngineMetrics(), model.name)
        token_sender = TokenSender(secret, name, lambda gateway, then: self.loop.abort_gateway(gateway, then))
        self.loop = EngineLoop(
            engine,
            token_sender.send,
            self.observer,
            model.max_running + model.max_waiting,
            on_failure=_end,
        )
        self._block_receiver: BlockReceiver | None = None
        if self._block_sender:
            self._block_receiver = BlockReceiver(listen(secret, name), block_numbers(config), self.loop.adopt)

    @property
    def copies_address(self) -> str | None:
        """Where other engines may send copies of their blocks; None if nowhere."""
        return self._block_receiver.address if self._block_receiver else None

    def follow_engines(self, addresses: Mapping[str, str]) -> None:
        """Send copies of blocks to these engines from now on: the `copies_address` of each, by its name."""
        if self._block_sender:
            self._block_sender.follow({engine_tag(name): address for name, address in addresses.items()})

    @property
    def shards(self) -> tuple[Process, ...]:
        """The processes of ranks 1 and up, which this process has started."""
        return self._shards.processes if self._shards else ()

    def report_dispatch(self) -> DispatchReport | None:
        """Say what all ranks' dispatchers have done since this was last asked; None without expert groups.

        Blocks until the shards have answered; raises RayError if they do not.
        """
        others = self._shards.reports() if self._shards and self._rank.dispatcher else []
        own = self._rank.report()
        return merged([own, *others]) if own else None


def _end() -> None:
    """End this process, and its shards with it.

    Gone is seen at once, by Serve and by the gateways; only refusing is not.
    """
    os._exit(1)


def _identity(model: ModelSettings, config: ModelConfig, weights: Checkpoint) -> bytes:
    """Return what keys and values depend on, beside tokens: 32 bytes."""
    depends_on = (config, model.tensor_parallel, weights.fingerprint())
    return blake2b(repr(depends_on).encode(), digest_size=32).digest()


def _num_blocks(model: ModelSettings, config: ModelConfig, context_length: int, weights: Checkpoint) -> int:
    """Return how many KV blocks settings and memory allow. Raises ValueError if a context does not fit."""
    # Of all ranks together, as if all were on this node: whether Ray puts them elsewhere is not known yet.
    held = engine_tensors(config) if model.expert_groups else all_tensors(config)
    weight_bytes = sum(weights.tensors[name].num_bytes for name in held if name in weights.tensors)
    return num_kv_blocks(
        config,
        context_length,
        model.max_running,
        model.kv_cache_tokens,
        model.kv_cache_fraction,
        max(free_bytes() - weight_bytes, 0),  # the weights are still to come
    )
