"""The router as a Serve deployment actor: it starts expert groups, keeps them, and publishes placements."""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from cluster.actors.expert_group import ExpertGroup
from cluster.actors.reports import EngineReport, GroupReport, ModelReport, Process
from cluster.settings import ModelSettings
from router.placement import Group, Placement, even
from shards.config import ModelConfig

logger = logging.getLogger(__name__)

NAMESPACE = "tradewind"  # of expert groups, in which a new router finds those of its predecessor
WATCH_PERIOD_S = 1.0
ENGINE_REPORT_TTL_S = 5.0  # an engine that has not reported for this long is no longer shown


@dataclass
class _Member:
    """An expert group that should exist."""

    name: str
    slots: tuple[tuple[int, int], ...]
    handle: ActorHandle
    group: Group | None = None  # None until its weights are read


@ray.remote
class Router:
    """One per model. Control plane only: it says where experts live, and no row passes through it.

    Its methods run in several of Ray's threads (`max_concurrency`, where it is deployed).
    """

    def __init__(self, app: str, model: ModelSettings, checkpoint: str, secret: bytes) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._secret = secret
        self._changed = threading.Condition()
        self._placement = Placement(epoch=0, groups=())
        self._last_epoch = 0  # the highest that any router of this model has published
        self._engines: dict[str, tuple[float, EngineReport]] = {}
        config = ModelConfig.from_checkpoint(Path(checkpoint))
        self._members: list[_Member] = []
        if model.expert_groups:
            shares = even(config.num_layers, config.num_experts, model.expert_groups)
            for index, slots in enumerate(shares):
                name = f"{app}/{model.name}/{index}"
                self._members.append(_Member(name, slots, self._start(name, slots)))
        threading.Thread(target=self._watch, name="watch-groups", daemon=True).start()

    def placement_after(self, epoch: int, timeout_s: float) -> Placement | None:
        """Wait for a placement that is newer than `epoch`; None if none comes within `timeout_s`.

        Epochs outlive routers: a new one learns from its engines how far its predecessor has counted.
        """
        with self._changed:
            self._last_epoch = max(self._last_epoch, epoch)
            self._changed.wait_for(lambda: self._placement.epoch > epoch, timeout_s)
            return self._placement if self._placement.epoch > epoch else None

    def report_engine(self, report: EngineReport) -> None:
        """Note an engine's state."""
        with self._changed:
            self._engines[report.process.name] = (time.monotonic(), report)

    def report(self) -> ModelReport:
        """Return the state of the model's processes; a group that does not answer at once is left out."""
        calls = [member.handle.report.remote() for member in self._members if member.group]
        ready = ray.wait(calls, num_returns=len(calls), timeout=1.0)[0] if calls else []
        groups: list[GroupReport] = []
        for call in ready:
            try:
                groups.append(ray.get(call))
            except RayError as error:
                logger.info("a group could not report: %s", error)
        fresh = time.monotonic() - ENGINE_REPORT_TTL_S
        with self._changed:
            engines = tuple(report for when, report in self._engines.values() if when > fresh)
            epoch = self._placement.epoch
        return ModelReport(
            self._model.name, epoch, Process.this("Router", self._model.name), engines, tuple(groups)
        )

    def _start(self, name: str, slots: tuple[tuple[int, int], ...]) -> ActorHandle:
        options = ray.remote(ExpertGroup).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",  # it outlives this router; its lease ends it
            get_if_exists=True,
            num_cpus=self._model.expert_threads,
            max_concurrency=4,
        )
        return options.remote(
            self._model.name, name, self._checkpoint, slots, self._model.expert_threads, self._secret
        )

    def _watch(self) -> None:
        """Renew the leases of all groups, replace the dead, and publish what has changed."""
        while True:
            renewals = [member.handle.renew_lease.remote() for member in self._members]
            for member, renewal in zip(self._members, renewals, strict=True):
                self._follow(member, renewal)
            self._publish()
            time.sleep(WATCH_PERIOD_S)

    def _follow(self, member: _Member, renewal: "ray.ObjectRef[Group]") -> None:
        # Until its weights are read, a group answers nothing; nobody waits for us meanwhile.
        timeout_s = WATCH_PERIOD_S if member.group else None
        try:
            group: Group = ray.get(renewal, timeout=timeout_s)
        except RayActorError as error:
            logger.warning("%s is lost and will be replaced: %s", member.name, error)
            member.group = None
            member.handle = self._start(member.name, member.slots)
        except RayError as error:
            logger.warning("%s does not answer: %s", member.name, error)
        else:
            member.group = group

    def _publish(self) -> None:
        groups = tuple(member.group for member in self._members if member.group)
        if len(groups) < len(self._members) and self._placement.epoch == 0:
            return  # nothing can be served before every expert is there
        with self._changed:
            if groups == self._placement.groups and self._placement.epoch >= max(self._last_epoch, 1):
                return
            self._last_epoch += 1
            self._placement = Placement(self._last_epoch, groups)
            self._changed.notify_all()
        logger.info("epoch %s: %s groups", self._placement.epoch, len(groups))
