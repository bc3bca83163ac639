"""The router as a Serve deployment actor: it starts expert groups, keeps them, and publishes placements."""

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from cluster.actors.expert_group import LEASE_S, ExpertGroup
from cluster.actors.reports import EngineReport, GroupReport, ModelReport, Process
from cluster.settings import ModelSettings
from router.epochs import Epochs
from router.placement import Group, Placement, even
from shards.config import ModelConfig

logger = logging.getLogger(__name__)

NAMESPACE = "tradewind"  # of expert groups, in which a new router finds those of its predecessor
WATCH_PERIOD_S = 1.0
REPORT_TIMEOUT_S = 1.0
ENGINE_REPORT_TTL_S = 5.0  # an engine that has not reported for this long is no longer shown
MAX_FAILED_STARTS = 3  # of one group, before the first placement


@dataclass
class _Member:
    """An expert group that should exist."""

    name: str
    slots: tuple[tuple[int, int], ...]
    handle: ActorHandle
    group: Group | None = None  # None until its weights are read
    renewal: "ray.ObjectRef | None" = None  # the answer that we wait for
    asked_at: float = 0.0
    failed_starts: int = 0


@ray.remote
class Router:
    """One per model. Control plane only: it says where experts live, and no row passes through it.

    Its methods run in several of Ray's threads (`max_concurrency`, where it is deployed); `_members` belong
    to the watching thread, but that others read `handle` and `group`.
    """

    def __init__(self, app: str, model: ModelSettings, checkpoint: str, secret: bytes) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._secret = secret
        self._epochs = Epochs()
        self._engines: dict[str, tuple[float, EngineReport]] = {}
        self._members: list[_Member] = []
        if model.expert_groups:
            config = ModelConfig.from_checkpoint(Path(checkpoint))
            for index, slots in enumerate(even(config.num_layers, config.num_experts, model.expert_groups)):
                # A group is taken over from an earlier router only if it holds just this, for just us.
                identity = hashlib.sha256(secret + repr((checkpoint, slots)).encode()).hexdigest()[:8]
                name = f"{app}/{model.name}/{index}-{identity}"
                self._members.append(_Member(name, slots, self._start(name, slots)))
        threading.Thread(target=self._watch, name="watch-groups", daemon=True).start()

    def placement_after(self, epoch: int, timeout_s: float) -> Placement | None:
        """Wait for a placement newer than `epoch`; None if none comes in time.

        Raises ValueError with the reason if the groups can't be started.
        """
        return self._epochs.after(epoch, timeout_s)

    def report_engine(self, report: EngineReport) -> None:
        """Note an engine's state."""
        self._engines[report.process.name] = (time.monotonic(), report)

    def report(self) -> ModelReport:
        """Return the state of the model's processes; a group that does not answer at once is left out."""
        calls = [member.handle.report.remote() for member in self._members if member.group]
        ready = ray.wait(calls, num_returns=len(calls), timeout=REPORT_TIMEOUT_S)[0] if calls else []
        groups: list[GroupReport] = []
        for call in ready:
            try:
                groups.append(ray.get(call))
            except RayError as error:
                logger.info("a group could not report: %s", error)
        fresh = time.monotonic() - ENGINE_REPORT_TTL_S
        engines = tuple(report for when, report in list(self._engines.values()) if when > fresh)
        this = Process.this("Router", self._model.name)
        return ModelReport(self._model.name, self._epochs.newest.epoch, this, engines, tuple(groups))

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
            started_at = time.monotonic()
            try:
                self._renew_leases()
                self._publish()
            except Exception:  # whatever it was, groups must not lose their leases over it
                logger.exception("watching the expert groups failed; it goes on")
            time.sleep(max(0.0, started_at + WATCH_PERIOD_S - time.monotonic()))

    def _renew_leases(self) -> None:
        """Ask each group that owes no answer, and take the answers that have come; wait for nobody alone."""
        for member in self._members:
            if member.renewal is None:
                member.renewal, member.asked_at = member.handle.renew_lease.remote(), time.monotonic()
        renewals = [member.renewal for member in self._members]
        ready = ray.wait(renewals, num_returns=len(renewals), timeout=WATCH_PERIOD_S)[0] if renewals else []
        for member in self._members:
            if member.renewal in ready:
                self._take_answer(member)
            elif member.group and time.monotonic() - member.asked_at > LEASE_S:
                # One that reads its weights may take its time; this one has read them, and is stuck.
                logger.warning("%s has not answered for %s s and is ended", member.name, LEASE_S)
                ray.kill(member.handle)

    def _take_answer(self, member: _Member) -> None:
        try:
            member.group = ray.get(member.renewal)
        except RayActorError as error:
            logger.warning("%s is lost and will be replaced: %s", member.name, error)
            if member.group is None:
                member.failed_starts += 1
            if member.failed_starts >= MAX_FAILED_STARTS and self._epochs.newest.epoch == 0:
                self._epochs.fail(f"expert group {member.name} could not be started: {error}")
            member.group = None
            member.handle = self._start(member.name, member.slots)
        else:
            member.failed_starts = 0
        member.renewal = None

    def _publish(self) -> None:
        groups = tuple(member.group for member in self._members if member.group)
        # Nothing can be served before every expert is there.
        if len(groups) == len(self._members) or self._epochs.newest.epoch > 0:
            self._epochs.publish(groups)
