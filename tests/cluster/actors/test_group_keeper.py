"""The keeper of expert groups, around a real controller and real links; only the actors are stand-ins."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayError,
    RuntimeEnvSetupError,
)

from cluster.actors.group_keeper import GroupKeeper
from cluster.metrics import RouterMetrics
from router.controller import Controller
from router.epochs import Epochs
from router.group_state import GroupState, Slot, StagedBytes, Wish
from router.links.address import Address
from router.links.base import Link
from router.links.listener import Listener
from router.links.stream import connect
from router.membership import Patience
from router.moves import StageOrder
from router.policy import Policy

pytestmark = pytest.mark.timeout(60)

SECRET = b"one cluster's secret"
EXPERT_BYTES = 100
BYTES, FROM_PEERS = "tradewind_rebalance_bytes_total", {"model": "m", "source": "peer"}


class Call:
    """What `remote` returns: an object with a future, as Ray's references have."""

    def __init__(self) -> None:
        self.answer: Future[GroupState] = Future()

    def future(self) -> Future[GroupState]:
        return self.answer


class Method:
    def __init__(self, run: Callable[..., Call]) -> None:
        self.remote = run


class Group:
    """A group's actor: it fills a slot as soon as it is told to, and has a real listener."""

    def __init__(self, name: str, directory: Path) -> None:
        self.listener = Listener(SECRET, name, directory, "127.0.0.1")
        self.name = name
        self.held: set[Slot] = set()
        self.num_staged = 0
        self.wish = Wish(0, 0)
        self.is_stopped = False
        self._unanswered: list[Call] = []
        self.num_asked = 0
        self.died_of: RayError | None = None
        self.state = Method(self._state)
        self.stage = Method(self._stage)
        self.free = Method(self._free)
        self.share = Method(self._share)
        self.num_sharing = 1

    def go_on(self) -> None:
        """Answer what was asked meanwhile."""
        self.is_stopped = False
        for call in self._unanswered:
            call.answer.set_result(self._make_state())
        self._unanswered.clear()

    def die(self, cause: RayError | None = None) -> None:
        self.died_of = cause or ActorDiedError()
        self.listener.close()

    def _state(self, wish: Wish, is_draining: bool) -> Call:
        self.num_asked += 1
        self.wish, self.is_leaving = wish, is_draining
        return self._answer()

    def _stage(self, orders: tuple[StageOrder, ...]) -> Call:
        new = {(order.layer, order.expert) for order in orders} - self.held
        self.num_staged += len(new)
        self.held |= new
        return self._answer()

    def _free(self, slots: frozenset[Slot]) -> Call:
        self.held -= slots
        return self._answer()

    def _share(self, num_groups: int) -> Call:
        self.num_sharing = num_groups
        return self._answer()

    def _answer(self) -> Call:
        call = Call()
        if self.died_of:
            call.answer.set_exception(self.died_of)
        elif self.is_stopped:
            self._unanswered.append(call)
        else:
            call.answer.set_result(self._make_state())
        return call

    def _make_state(self) -> GroupState:
        return GroupState(
            self.name,
            str(self.listener.address),
            num_slots=10,
            held=frozenset(self.held),
            staging=frozenset(),
            busy_s=0.0,
            wish=self.wish,
            staged_bytes=StagedBytes(peer=self.num_staged * EXPERT_BYTES),
            num_sharing=self.num_sharing,
        )


class Cluster:
    """A keeper at work, and the groups that it has started."""

    def __init__(self, directory: Path) -> None:
        self.groups: list[Group] = []
        self.killed: list[Group] = []
        self.epochs = Epochs()
        self.registry = CollectorRegistry()
        self.controller = Controller(Policy(2, 4, 2, 4, 2), self.epochs, "m/", time.monotonic())
        self._directory = directory
        self.may_connect = threading.Event()
        self.may_connect.set()
        self.keeper = GroupKeeper(
            self.controller,
            self._start,
            self._connect,
            RouterMetrics(self.registry),
            "m",
            self.killed.append,
        )

    def _start(self, name: str) -> Group:
        self.groups.append(Group(name, self._directory))
        return self.groups[-1]

    def _connect(self, address: str) -> Link:
        self.may_connect.wait(20)
        return connect(Address.parse(address), SECRET, "router")

    @property
    def published(self) -> list[str]:
        return [group.address for group in self.epochs.newest.groups]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that must come about."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come about"
            await asyncio.sleep(0.005)

    async def settled(self) -> None:
        await self.until(
            lambda: self.controller.progress(time.monotonic()).is_settled, "that every group is in its place"
        )


@contextlib.asynccontextmanager
async def running(directory: Path, *found: Group) -> AsyncIterator[Cluster]:
    cluster = Cluster(directory)
    task = asyncio.ensure_future(cluster.keeper.run({group.name: group for group in found}))
    try:
        yield cluster
    finally:
        task.cancel()
        cluster.may_connect.set()
        for group in (*cluster.groups, *found):
            group.listener.close()


def test_groups_are_started_filled_and_published(tmp_path: Path):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            assert [group.name for group in cluster.groups] == ["m/0", "m/1"]
            assert all(len(group.held) == 8 for group in cluster.groups)
            assert sorted(cluster.published) == sorted(str(g.listener.address) for g in cluster.groups)

    asyncio.run(run())


def test_groups_are_told_how_many_share_their_cores(tmp_path: Path):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            await cluster.until(lambda: [g.num_sharing for g in cluster.groups] == [2, 2], "sharing")
            cluster.groups[0].die()
            await cluster.until(lambda: cluster.groups[1].num_sharing == 1, "the survivor's share of cores")

    asyncio.run(run())


def test_a_dead_group_is_replaced_under_its_name(tmp_path: Path):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            cluster.groups[0].die()
            await cluster.until(lambda: len(cluster.groups) == 3, "a replacement")
            assert cluster.groups[2].name == "m/0"
            address = str(cluster.groups[2].listener.address)
            await cluster.until(lambda: address in cluster.published, "a placement with the replacement")

    asyncio.run(run())


@pytest.mark.parametrize(
    "cause",
    [
        ActorDiedError(),
        OutOfMemoryError("killed by Ray's memory monitor"),
        RuntimeEnvSetupError("no such image"),
        ActorUnschedulableError("its node is gone"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_whatever_a_group_died_of_it_is_replaced_at_once(tmp_path: Path, cause: RayError):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            died_at = time.monotonic()
            cluster.groups[0].die(cause)
            await cluster.until(lambda: len(cluster.groups) == 3, "a replacement")
            assert time.monotonic() - died_at < Patience().dead_after_s / 2, "only its silence told"

    asyncio.run(run())


def test_a_group_is_asked_on_while_its_link_can_not_be_opened(tmp_path: Path):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            cluster.may_connect.clear()
            await cluster.until(lambda: cluster.groups, "a group")
            group = cluster.groups[0]
            await cluster.until(lambda: group.num_asked > 8, "another heartbeat")
            await cluster.settled()
            cluster.may_connect.set()
            link = await asyncio.to_thread(group.listener.accept, 10)
            link.close()

    asyncio.run(run())


def test_the_end_of_a_groups_link_is_noticed_before_ray_or_silence_tell(tmp_path: Path):
    """Its sockets are gone, while Ray still waits for its answers."""

    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            group = cluster.groups[0]
            link = await asyncio.to_thread(group.listener.accept, 10)
            group.is_stopped = True
            await asyncio.sleep(0)
            began_at = time.monotonic()
            link.close()
            await cluster.until(lambda: len(cluster.published) == 1, "a placement without it")
            assert time.monotonic() - began_at < Patience().suspect_after_s

    asyncio.run(run())


def test_a_silent_group_is_left_out_and_comes_back(tmp_path: Path):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            group = cluster.groups[0]
            group.is_stopped = True
            await cluster.until(lambda: len(cluster.published) == 1, "a placement without it")
            group.go_on()
            await cluster.until(lambda: len(cluster.published) == 2, "a placement with it again")
            assert len(cluster.groups) == 2, "it was replaced"

    asyncio.run(run())


def test_groups_of_an_earlier_router_are_taken_over(tmp_path: Path):
    async def run() -> None:
        every = {(layer, expert) for layer in range(2) for expert in range(4)}
        found = [Group(f"m/{number}", tmp_path) for number in (0, 4)]
        for group in found:
            group.held = set(every)
        async with running(tmp_path, *found) as cluster:
            await cluster.settled()
            assert cluster.groups == []
            assert [group.num_staged for group in found] == [0, 0]

    asyncio.run(run())


def test_what_a_group_staged_for_an_earlier_router_is_not_counted_again(tmp_path: Path):
    async def run() -> None:
        found = [Group(f"m/{number}", tmp_path) for number in range(2)]
        found[0].held = {(layer, expert) for layer in range(2) for expert in range(4)}
        found[0].num_staged = 8
        async with running(tmp_path, *found) as cluster:
            await cluster.settled()
            assert found[1].num_staged == 8
            assert cluster.registry.get_sample_value(BYTES, FROM_PEERS) == 800

    asyncio.run(run())


def test_a_group_that_is_not_needed_is_ended(tmp_path: Path):
    async def run() -> None:
        found = [Group(f"m/{number}", tmp_path) for number in range(3)]
        async with running(tmp_path, *found) as cluster:
            await cluster.until(lambda: cluster.killed, "the end of one of three groups")
            await cluster.settled()
            assert len(cluster.killed) == 1

    asyncio.run(run())


def test_staged_bytes_are_counted_also_over_a_replacement(tmp_path: Path):
    async def run() -> None:
        async with running(tmp_path) as cluster:
            await cluster.settled()
            cluster.groups[0].die()
            await cluster.until(lambda: len(cluster.groups) == 3, "a replacement")
            await cluster.settled()
            staged = sum(group.num_staged for group in cluster.groups)
            assert staged == 3 * 8
            await cluster.until(
                lambda: cluster.registry.get_sample_value(BYTES, FROM_PEERS) == staged * EXPERT_BYTES,
                f"a count of {staged * EXPERT_BYTES} bytes",
            )

    asyncio.run(run())
