"""The router as a Serve deployment actor: it keeps expert groups and tells engines what they hold."""

import asyncio
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle

from cluster.actors.expert_group import ExpertGroup
from cluster.actors.group_keeper import GroupKeeper
from cluster.actors.process_log import log_to_stderr
from cluster.actors.quiet_start import QUIET_START
from cluster.actors.reports import EngineReport, ModelReport, Process
from cluster.metrics import RouterMetrics
from cluster.settings import ModelSettings
from router.autoscale import AutoscalePolicy
from router.controller import Controller, Progress
from router.epochs import Epochs
from router.links.address import Address
from router.links.base import Link
from router.links.stream import connect
from router.placement import Placement
from router.policy import Policy
from shards.config import ModelConfig

logger = logging.getLogger(__name__)

SPARE_SLOTS = 2  # of a group: for what is on its way while what it replaces is still in use
NAMESPACE = "tradewind"  # of expert groups, in which a new router finds those of its predecessor
REPORT_TIMEOUT_S = 1.0
ENGINE_REPORT_TTL_S = 5.0  # an engine that has not reported for this long is no longer shown

T = TypeVar("T")

_ExpertGroup = ray.remote(ExpertGroup)  # once: Ray disassembles a class whenever it is given one


@ray.remote
class Router:
    """One per model. Control plane only: it says where experts live, and no row passes through it.

    Everything happens on one event loop, in a thread of its own.
    """

    def __init__(self, app: str, model: ModelSettings, checkpoint: str, secret: bytes) -> None:
        log_to_stderr()
        self._model = model
        self._checkpoint = checkpoint
        self._secret = secret
        # Groups are taken over from an earlier router only if they hold this checkpoint, for just us.
        digest = hashlib.sha256(secret + repr((model.name, checkpoint)).encode()).hexdigest()[:12]
        self._actor_prefix = f"{app}/{digest}/"
        self._engines: dict[str, tuple[float, EngineReport]] = {}
        self._began_at = time.monotonic()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="router", daemon=True).start()
        self._epochs = Epochs()
        self._keeper = self._keep_groups() if model.expert_groups else None

    async def placement_after(self, epoch: int, timeout_s: float) -> Placement | None:
        """Wait for a placement newer than `epoch`; None if none comes in time.

        Raises ValueError with the reason if the groups can't be started.
        """
        return await self._on_loop(self._epochs.after(epoch, timeout_s))

    async def report_engine(
        self, report: EngineReport, load_LE: NDArray[np.int64] | None
    ) -> dict[str, str] | None:
        """Note an engine's state, and how many rows it has sent to each expert since its last report.

        Returns where the other engines take copies of its KV blocks: addresses, by their names; None while
        this router may not know them all.
        """
        return await self._on_loop(self._note(report, load_LE))

    async def report(self) -> ModelReport:
        """Return the state of the model's processes; a group that does not answer at once is left out."""
        return await self._on_loop(self._report())

    async def scale(self, num_groups: int) -> Progress:
        """Wish for another number of expert groups. Raises ValueError if they are too few, or too many."""
        return await self._on_loop(self._command(lambda controller: controller.scale(num_groups)))

    async def drain(self, group: str) -> Progress:
        """Replace a group by another, without haste. Raises ValueError if it is not here."""
        return await self._on_loop(self._command(lambda controller: controller.drain(group)))

    async def rebalance(self) -> Progress:
        """Plan anew what each group should hold."""
        return await self._on_loop(self._command(lambda controller: controller.rebalance()))

    async def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _keep_groups(self) -> GroupKeeper:
        config = ModelConfig.from_checkpoint(Path(self._checkpoint))
        self._num_slots = config.num_layers * self._model.slots_per_layer(config.num_experts) + SPARE_SLOTS
        policy = Policy(
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            num_groups=self._model.expert_groups,
            slots_per_layer=self._model.slots_per_layer(config.num_experts),
            min_replicas=self._model.expert_replicas,
            autoscale=_autoscale_policy(self._model),
        )
        controller = Controller(policy, self._epochs, f"{self._model.name}/", time.monotonic())
        keeper = GroupKeeper(controller, self._start, self._connect, RouterMetrics(), self._model.name)
        asyncio.run_coroutine_threadsafe(keeper.run(self._find()), self._loop)
        return keeper

    def _find(self) -> dict[str, ActorHandle]:
        """Return the groups of an earlier router, by name."""
        found = {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(self._actor_prefix):
                name = actor["name"].removeprefix(self._actor_prefix).rpartition("/")[0]
                with suppress(ValueError):  # it has died just now
                    found[name] = ray.get_actor(actor["name"], NAMESPACE)
        return found

    def _start(self, name: str) -> ActorHandle:
        options = _ExpertGroup.options(
            # A group may take the name of one that is dead, but Ray may not know yet that it is.
            name=f"{self._actor_prefix}{name}/{uuid.uuid4().hex[:8]}",
            namespace=NAMESPACE,
            scheduling_strategy="SPREAD",  # over nodes, which may die, too
            lifetime="detached",  # it outlives this router; if nobody is linked to it, it ends itself
            num_cpus=self._model.expert_cpus,
            runtime_env=QUIET_START,
            max_concurrency=4,
        )
        model = self._model
        return options.remote(
            model.name, name, self._checkpoint, self._num_slots, model.expert_threads, self._secret
        )

    def _connect(self, address: str) -> Link:
        return connect(Address.parse(address), self._secret, f"{self._model.name}/router")

    async def _note(self, report: EngineReport, load_LE: NDArray[np.int64] | None) -> dict[str, str] | None:
        now = time.monotonic()
        self._engines[report.process.name] = (now, report)
        self._engines = {
            name: (seen_at, its)
            for name, (seen_at, its) in self._engines.items()
            if now - seen_at < ENGINE_REPORT_TTL_S
        }
        if self._keeper and load_LE is not None:
            self._keeper.controller.saw_engine(report.process.name, report.epoch, load_LE, now)
        if now - self._began_at < ENGINE_REPORT_TTL_S:
            return None
        others = [its for _, its in self._engines.values() if its.process.name != report.process.name]
        return {its.process.name: its.copies_address for its in others if its.copies_address}

    async def _command(self, change: Callable[[Controller], None]) -> Progress:
        if self._keeper is None:
            raise ValueError(
                f"model {self._model.name!r} has no expert groups (expert_groups in its configuration)"
            )
        change(self._keeper.controller)
        self._keeper.wake()
        return self._keeper.controller.progress(time.monotonic())

    async def _report(self) -> ModelReport:
        now = time.monotonic()
        handles = self._keeper.handles.values() if self._keeper else ()
        calls = [asyncio.wrap_future(handle.report.remote().future()) for handle in handles]
        answered = (await asyncio.wait(calls, timeout=REPORT_TIMEOUT_S))[0] if calls else set()
        groups = [call.result() for call in calls if call in answered and not call.exception()]
        return ModelReport(
            self._model.name,
            self._epochs.newest.epoch,
            Process.this("Router", self._model.name),
            tuple(
                report for seen_at, report in self._engines.values() if now - seen_at < ENGINE_REPORT_TTL_S
            ),
            tuple(groups),
            self._keeper.controller.progress(now) if self._keeper else None,
        )


def _autoscale_policy(model: ModelSettings) -> AutoscalePolicy | None:
    if model.max_expert_groups is None:
        return None
    return AutoscalePolicy(
        min_groups=model.min_expert_groups or model.expert_replicas,
        max_groups=model.max_expert_groups,
        target_busy=model.expert_busy,
    )
