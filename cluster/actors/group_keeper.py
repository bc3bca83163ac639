"""Carries out what a controller decides: starts and ends expert groups, listens to them, passes orders on."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayError,
    RuntimeEnvSetupError,
)

from cluster.metrics import RouterMetrics
from router.controller import Controller, Orders
from router.group_state import GroupState, StagedBytes
from router.links.base import Link, LinkLost

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
TICK_S = 0.25  # how long nothing may happen before the controller is asked again
FIRST_ROUND_S = 2.0  # for groups of an earlier router to answer, before anything is decided
METRICS_PERIOD_S = 1.0
# What calls to a dead actor raise, by what it died of; OutOfMemoryError is Ray's memory monitor.
DEAD = (ActorDiedError, OutOfMemoryError, RuntimeEnvSetupError, ActorUnschedulableError)


class GroupKeeper:
    """One task for each group asks how it is, four times a second, and holds a link to it.

    The link says nothing: its end of file is the fastest news of a death. Whether a group is dead, Ray says;
    whether it is stopped, or cut off, its silence says.
    """

    def __init__(
        self,
        controller: Controller,
        start: Callable[[str], ActorHandle],
        connect: Callable[[str], Link],
        metrics: RouterMetrics,
        model: str,
        kill: Callable[[ActorHandle], None] = ray.kill,
    ) -> None:
        """`start` makes the group of a name; `connect` opens a link to an address, and may block."""
        self._kill = kill
        self.controller = controller
        self._start = start
        self._connect = connect
        self._metrics = metrics
        self._model = model
        self._handles: dict[str, ActorHandle] = {}
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._staged_bytes: dict[str, StagedBytes] = {}  # counted so far
        self._moving_since: float | None = None

    @property
    def handles(self) -> Mapping[str, ActorHandle]:
        """The groups that exist, by name."""
        return self._handles

    def wake(self) -> None:
        """Have the controller asked again now."""
        self._news.set()

    async def run(self, found: Mapping[str, ActorHandle]) -> None:
        """Keep the groups for ever; `found` are those of an earlier router."""
        for name, handle in found.items():
            self.controller.found(name, time.monotonic())
            self._watch(name, handle)
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ROUND_S):
                while any(count and standing == "starting" for standing, count in self._standings().items()):
                    await self._wait_for_news()
        metrics_at = 0.0
        while True:
            try:
                now = time.monotonic()
                self._carry_out(self.controller.tick(now))
                if now - metrics_at > METRICS_PERIOD_S:
                    metrics_at = now
                    self._count(now)
            except Exception:  # whatever it was, the groups must be kept
                logger.exception("keeping the expert groups failed; it goes on")
                await asyncio.sleep(TICK_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wait_for_news(), TICK_S)

    def _standings(self) -> Mapping[str, int]:
        return self.controller.progress(time.monotonic()).groups

    async def _wait_for_news(self) -> None:
        await self._news.wait()
        self._news.clear()

    def _carry_out(self, orders: Orders) -> None:
        for name in (*orders.kill, *orders.let_go):
            logger.warning("%s %s", name, "is given up" if name in orders.kill else "has been drained")
            if handle := self._handles.pop(name, None):
                self._kill(handle)
        for name in orders.start:
            self._staged_bytes[name] = StagedBytes()
            self._watch(name, self._start(name))
        for name, stage in orders.stage.items():
            if handle := self._handles.get(name):
                self._spawn(self._order(name, handle, handle.stage.remote(stage)))
        for name, slots in orders.free.items():
            if handle := self._handles.get(name):
                self._spawn(self._order(name, handle, handle.free.remote(slots)))
        for name, num_groups in orders.share.items():
            if handle := self._handles.get(name):
                self._spawn(self._order(name, handle, handle.share.remote(num_groups)))

    def _watch(self, name: str, handle: ActorHandle) -> None:
        self._handles[name] = handle
        self._spawn(self._listen(name, handle))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(self._tasks.discard)
        return task

    async def _order(self, name: str, handle: ActorHandle, call: "ray.ObjectRef") -> None:
        """Take the answer to an order; if there is none, the heartbeats know why."""
        with suppress(RayError):
            self._heard(name, handle, await _answer(call))

    async def _listen(self, name: str, handle: ActorHandle) -> None:
        link: asyncio.Task[None] | None = None
        over = asyncio.Event()  # that link, or its need
        try:
            while self._is_kept(name, handle):
                asked_at = time.monotonic()
                try:
                    is_draining = self.controller.is_draining(name)
                    state = await _answer(handle.state.remote(self.controller.wish, is_draining))
                except DEAD as error:
                    self._lose(name, handle, error)
                    return
                except RayError as error:
                    logger.warning("%s did not answer: %s", name, error)
                else:
                    self._heard(name, handle, state)
                    # In a task of its own: opening it may take seconds, in which heartbeats go on.
                    if link is None or link.done():
                        over = asyncio.Event()
                        link = self._spawn(self._hold_link(name, handle, state.address, over))
                await asyncio.sleep(max(0.0, asked_at + HEARTBEAT_S - time.monotonic()))
        finally:
            over.set()

    def _is_kept(self, name: str, handle: ActorHandle) -> bool:
        """Say whether this is the process of that name; another one may have taken its place."""
        return self._handles.get(name) is handle

    def _heard(self, name: str, handle: ActorHandle, state: GroupState) -> None:
        if not self._is_kept(name, handle):  # it was given up while its answer was on the way
            return
        # What a group had staged for an earlier router, that one has counted.
        before = asdict(self._staged_bytes.get(name, state.staged_bytes))
        after = {source: max(number, before[source]) for source, number in asdict(state.staged_bytes).items()}
        for source, number in after.items():
            self._metrics.rebalance_bytes.labels(self._model, source).inc(number - before[source])
        self._staged_bytes[name] = StagedBytes(**after)
        if self.controller.heard(state, time.monotonic()):
            self.wake()

    def _lose(self, name: str, handle: ActorHandle, error: Exception) -> None:
        logger.warning("%s is lost: %s", name, error)
        if self._is_kept(name, handle):
            del self._handles[name]
            self.controller.lost(name, str(error), time.monotonic())
            self.wake()

    async def _hold_link(self, name: str, handle: ActorHandle, address: str, over: asyncio.Event) -> None:
        """Hold the link whose end tells of the group's, until `over`; return if none can be opened now."""
        try:
            link = await asyncio.to_thread(self._connect, address)
        except LinkLost as error:
            logger.info("no link to %s: %s", name, error)
            return
        number, loop = link.fileno(), asyncio.get_running_loop()
        loop.add_reader(number, over.set)  # a group sends nothing over it, but the end of file
        try:
            await over.wait()
        finally:
            loop.remove_reader(number)
            link.close()
        if self._is_kept(name, handle):
            self.controller.doubt(name)
            self.wake()

    def _count(self, now: float) -> None:
        """Bring the metrics up to date."""
        progress = self.controller.progress(now)
        for standing, number in progress.groups.items():
            self._metrics.groups.labels(self._model, standing).set(number)
        self._metrics.imbalance.labels(self._model).set(progress.imbalance)
        self._metrics.epoch.labels(self._model).set(self.controller.epoch)
        if not progress.is_settled:
            self._moving_since = self._moving_since or now
        elif self._moving_since:
            self._metrics.rebalance_seconds.labels(self._model).observe(now - self._moving_since)
            self._moving_since = None


async def _answer(call: "ray.ObjectRef") -> GroupState:
    state: GroupState = await asyncio.wrap_future(call.future())
    return state
