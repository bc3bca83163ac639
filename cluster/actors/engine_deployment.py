"""The engine as a Serve deployment: one unary call per request, its tokens on a link."""

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ray import serve

from cluster.actors.engine_choice import engine_name
from cluster.actors.process_log import log_to_stderr
from cluster.actors.reports import EngineReport, ModelReport, Process
from cluster.actors.router_client import RouterClient
from cluster.engine.request import Generated, GenerationRequest
from cluster.settings import ModelSettings
from router.controller import Progress

REPORT_PERIOD_S = 0.5


class Engine:
    """One replica: the model's weights except its experts, the KV cache, and the steps.

    `avoided`, in every call, is read by EngineChoice on the way here.
    """

    def __init__(self, model: ModelSettings, checkpoint: str, secret: bytes) -> None:
        log_to_stderr()
        # Not above: whoever only names this class - the command line, Serve's controller - needs no torch.
        from cluster.actors.engine_process import EngineProcess

        self._name = engine_name(model.name, serve.get_replica_context().replica_tag)
        self._router = RouterClient()
        self._process = EngineProcess(model, Path(checkpoint), secret, self._name, self._router)
        self._router.report_every(REPORT_PERIOD_S, self._report, self._process.follow_engines)

    async def generate(
        self, request: GenerationRequest, gateway: str, avoided: frozenset[str] = frozenset()
    ) -> Generated:
        """Serve one request; its events go over the link to `gateway`. Cancelling this call aborts it."""
        future = self._process.loop.submit(request, gateway)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._process.loop.abort(request.id)
            raise

    async def ping(self, avoided: frozenset[str] = frozenset()) -> None:
        """Return, and so say that this engine answers."""

    async def model_report(self, avoided: frozenset[str] = frozenset()) -> ModelReport:
        """Return the state of all processes of the model."""
        return await self._router.model_report()

    async def scale_experts(self, num_groups: int, avoided: frozenset[str] = frozenset()) -> Progress:
        """Wish for another number of expert groups. Raises ValueError if they are too few."""
        return await self._router.scale(num_groups)

    async def drain_experts(self, group: str, avoided: frozenset[str] = frozenset()) -> Progress:
        """Replace an expert group by another. Raises ValueError if there is none of that name."""
        return await self._router.drain(group)

    async def rebalance_experts(self, avoided: frozenset[str] = frozenset()) -> Progress:
        """Plan anew what each expert group should hold."""
        return await self._router.rebalance()

    def _report(self) -> tuple[EngineReport, NDArray[np.int64] | None]:
        stats, dispatch = self._process.observer.stats, self._process.report_dispatch()
        if dispatch:
            self._process.observer.saw_dispatch(dispatch.counts)
        report = EngineReport(
            Process.this("Engine", self._name),
            dispatch.epoch if dispatch else 0,
            stats.num_running,
            stats.num_waiting,
            stats.used_blocks,
            stats.total_blocks,
            self._process.observer.tokens_per_s(),
            self._process.shards,
            self._process.copies_address,
        )
        return report, dispatch.load_LE if dispatch else None
