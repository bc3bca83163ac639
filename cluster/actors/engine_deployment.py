"""The engine as a Serve deployment: one unary call per request, its tokens on a link."""

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ray import serve

from cluster.actors.reports import EngineReport, ModelReport, Process
from cluster.actors.router_client import RouterClient
from cluster.actors.token_links import TokenSender
from cluster.engine.engine import Engine as StepEngine
from cluster.engine.loop import EngineLoop, Generated
from cluster.engine.memory import free_bytes, num_kv_blocks
from cluster.engine.observer import EngineObserver
from cluster.engine.request import GenerationRequest
from cluster.metrics import EngineMetrics
from cluster.settings import ModelSettings
from router.dispatch import Dispatcher, ExpertUnavailable
from router.links.address import Address
from router.links.pool import LinkPool
from router.links.stream import connect
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.kernels.cpu import set_threads
from shards.kv_cache import BLOCK_SIZE
from shards.shard import load_shard

logger = logging.getLogger(__name__)

REPORT_PERIOD_S = 1.0
FIRST_PLACEMENT_TIMEOUT_S = 600.0
# With experts inside, the engine's threads go from one product to the next and wait for nobody else. With
# expert groups on the same cores, a thread that spins takes the core from the group it is waiting for.
SPIN_US_ALONE = 200


@dataclass(frozen=True)
class EngineDescription:
    """What a gateway must know of an engine."""

    context_length: int


class Engine:
    """One replica: the model's weights except its experts, the KV cache, and the steps."""

    def __init__(self, model: ModelSettings, checkpoint: str, secret: bytes) -> None:
        self._model = model
        self._name = f"{model.name}/{serve.get_replica_context().replica_tag}"
        self._router = RouterClient()
        directory = Path(checkpoint)
        config = ModelConfig.from_checkpoint(directory)
        remote_experts = model.expert_groups > 0
        set_threads(model.engine_threads or os.cpu_count() or 1, 0 if remote_experts else SPIN_US_ALONE)
        context_length = min(model.context_length or config.context_length, config.context_length)
        num_blocks = num_kv_blocks(
            config,
            context_length,
            model.max_running,
            model.kv_cache_tokens,
            model.kv_cache_fraction,
            free_bytes(),
        )
        if num_blocks * BLOCK_SIZE < context_length:
            logger.warning(
                "context cut from %s to the KV cache's %s tokens", context_length, num_blocks * BLOCK_SIZE
            )
            context_length = num_blocks * BLOCK_SIZE
        self._description = EngineDescription(context_length)
        experts = self._dispatcher(config, secret) if remote_experts else None
        shard = load_shard(Checkpoint(directory), config, experts, num_blocks, lambda done, total: None)
        if remote_experts and self._router.wait_newer(0, FIRST_PLACEMENT_TIMEOUT_S).epoch == 0:
            raise TimeoutError(f"the expert groups were not there within {FIRST_PLACEMENT_TIMEOUT_S:g} s")
        engine = StepEngine(
            shard,
            vocab_size=config.vocab_size,
            context_length=context_length,
            num_blocks=num_blocks,
            max_step_tokens=model.max_step_tokens,
            max_running=model.max_running,
            prefix_caching=model.prefix_caching,
            request_errors=(ExpertUnavailable,),
        )
        self._observer = EngineObserver(EngineMetrics(), model.name)
        sender = TokenSender(secret, self._name, on_lost=lambda gateway: self._loop.abort_gateway(gateway))
        self._loop = EngineLoop(engine, sender.send, self._observer, model.max_running + model.max_waiting)
        self._router.report_every(REPORT_PERIOD_S, self._report)

    async def generate(self, request: GenerationRequest, gateway: str) -> Generated:
        """Serve one request; its events go over the link to `gateway`. Cancelling this call aborts it."""
        future = self._loop.submit(request, gateway)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._loop.abort(request.id)
            raise

    async def describe(self) -> EngineDescription:
        """Return what a gateway must know."""
        return self._description

    async def model_report(self) -> ModelReport:
        """Return the state of all processes of the model."""
        return await self._router.model_report()

    async def check_health(self) -> None:
        """Raise if the step thread has ended; Serve then replaces this replica."""
        if self._loop.failure:
            raise RuntimeError(f"the engine's step failed: {self._loop.failure!r}")

    def _dispatcher(self, config: ModelConfig, secret: bytes) -> Dispatcher:
        links = LinkPool(lambda address: connect(Address.parse(address), secret, self._name))
        return Dispatcher(
            self._router,
            links,
            config.num_layers,
            config.num_experts,
            deadline_s=self._model.expert_deadline_s,
        )

    def _report(self) -> EngineReport:
        stats = self._observer.stats
        return EngineReport(
            Process.this("Engine", self._name),
            self._router.current().epoch,
            stats.num_running,
            stats.num_waiting,
            stats.used_blocks,
            stats.total_blocks,
            self._observer.tokens_per_s(),
        )
