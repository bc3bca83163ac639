"""Expert groups and engines in virtual time, around a real Controller: no process, no socket, no clock.

`step` lets a quarter of a second pass and then checks what must hold at every moment.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from router.autoscale import AutoscalePolicy
from router.controller import Controller
from router.epochs import Epochs
from router.group_state import GroupState, Slot, Wish
from router.links.address import Address
from router.placement import Placement
from router.policy import Policy

STEP_S = 0.25
NUM_LAYERS, NUM_EXPERTS = 2, 4
ALL = frozenset((layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS))
SPARE_SLOTS = 2
PREFIX = "model/"


@dataclass
class SimulatedGroup:
    """One process. `process` tells it from an earlier one of the same name."""

    name: str
    process: int
    num_slots: int
    steps_to_start: int
    held: set[Slot] = field(default_factory=set)
    queue: dict[Slot, str | None] = field(default_factory=dict)  # what is being staged, and from where
    wish: Wish = field(default_factory=lambda: Wish(0, 0))
    busy_s: float = 0.0
    is_silent: bool = False  # stopped, or cut off from the router
    is_leaving: bool = False
    failure: str | None = None
    num_orders: int = 0  # to stage
    num_answers: int = 0
    host: str = "host"
    num_sharing: int = 1

    @property
    def address(self) -> str:
        return str(Address(self.host, f"/{self.name}#{self.process}", "127.0.0.1", 1))

    @property
    def answers(self) -> bool:
        return not self.is_silent and not self.steps_to_start

    def state(self) -> GroupState:
        self.num_answers += 1
        return GroupState(
            self.name,
            self.address,
            self.num_slots,
            frozenset(self.held),
            frozenset(self.queue),
            busy_s=self.busy_s,
            wish=self.wish,
            is_leaving=self.is_leaving,
            failure=self.failure,
            number=self.num_answers,
            num_sharing=self.num_sharing,
        )


@dataclass
class SimulatedEngine:
    """Follows placements a step or more behind, and may still send rows by the one it has."""

    name: str
    placement: Placement = field(default_factory=lambda: Placement(0, ()))
    is_stalled: bool = False  # in a long step: it takes no newer placement meanwhile


class Fleet:
    """All processes of a model."""

    def __init__(
        self,
        num_groups: int = 2,
        slots_per_layer: int = 4,
        min_replicas: int = 2,
        autoscale: AutoscalePolicy | None = None,
    ) -> None:
        self.policy = Policy(
            NUM_LAYERS, NUM_EXPERTS, num_groups, slots_per_layer, min_replicas, autoscale=autoscale
        )
        self.start_steps = 3  # until a new process answers
        self.staged_per_step = 2
        self.unreadable: set[Slot] = set()  # in the checkpoint
        self.deaf_steps = 0  # for which the router hears no group
        self.work = 0.0  # in groups that compute all the time
        self.now_s = 0.0
        self.num_started = 0
        self.hosts = cycle(["host"])  # of groups that are started, in turn
        self.groups: dict[str, SimulatedGroup] = {}
        self.lost: list[str] = []  # dead, and the router has not been told yet
        self.engines = [SimulatedEngine("engine 0"), SimulatedEngine("engine 1")]
        self.load_LE = np.ones((NUM_LAYERS, NUM_EXPERTS), np.int64)
        self.num_read = 0  # experts read from the checkpoint
        self.num_fetched = 0  # experts that came from a peer
        self.new_router()

    @property
    def placement(self) -> Placement:
        return self.epochs.newest

    def new_router(self, deaf_steps: int = 0) -> None:
        """Kill the router, if there is one; another one finds the groups, and hears nobody for a while."""
        self.deaf_steps = deaf_steps
        self.epochs = Epochs()
        self.controller = Controller(self.policy, self.epochs, PREFIX, self.now_s)
        for group in self.groups.values():
            self.controller.found(group.name, self.now_s)
            if group.answers and not deaf_steps:
                self.controller.heard(group.state(), self.now_s)

    def kill(self, name: str, is_known: bool = True) -> None:
        """End a process at once; if it `is_known`, Ray tells the router in the next step."""
        del self.groups[name]
        if is_known:
            self.lost.append(name)

    def step(self) -> None:
        """Let time pass: the processes go on, the router looks and decides, its orders are carried out."""
        self.now_s += STEP_S
        for group in self.groups.values():
            self._go_on(group)
        for name in self.lost:
            self.controller.lost(name, "killed", self.now_s)
        self.lost.clear()
        for group in self.groups.values():
            if group.answers and not self.deaf_steps:
                group.wish = max(group.wish, self.controller.wish, key=lambda wish: wish.number)
                group.is_leaving |= self.controller.is_draining(group.name)
                self.controller.heard(group.state(), self.now_s)
        self.deaf_steps = max(0, self.deaf_steps - 1)
        for engine in self.engines:
            if not engine.is_stalled and self.placement.epoch > engine.placement.epoch:
                engine.placement = self.placement
            self.controller.saw_engine(engine.name, engine.placement.epoch, self.load_LE, self.now_s)
        self._carry_out()
        self.check()

    def settle(self, num_steps: int = 200) -> None:
        """Let time pass until nothing is left to do. Fails if that does not come."""
        for _ in range(num_steps):
            self.step()
            if self.controller.progress(self.now_s).is_settled:
                return
        raise AssertionError(f"not settled after {num_steps} steps: {self.controller.progress(self.now_s)}")

    def _go_on(self, group: SimulatedGroup) -> None:
        if group.steps_to_start:
            group.steps_to_start -= 1
            return
        group.busy_s += STEP_S * min(1.0, self.work / len(self.groups))
        for slot in list(group.queue)[: self.staged_per_step]:
            source = group.queue.pop(slot)
            giver = next((g for g in self.groups.values() if g.address == source), None)
            if giver and slot in giver.held and not giver.is_silent:
                self.num_fetched += 1
            elif slot in self.unreadable:
                group.failure = f"layer {slot[0]} expert {slot[1]}: the disk is broken"
                continue
            else:
                self.num_read += 1
            group.held.add(slot)
            group.failure = None

    def _carry_out(self) -> None:
        orders = self.controller.tick(self.now_s)
        for name in (*orders.kill, *orders.let_go):
            group = self.groups.pop(name, None)
            is_known = group is not None and group.answers and group.num_answers
            assert name in orders.let_go or not is_known, f"{name} answers, and is killed"
        for name in orders.start:
            assert name not in self.groups, f"{name} was started twice"
            num_slots = NUM_LAYERS * self.policy.slots_per_layer + SPARE_SLOTS
            self.num_started += 1
            self.groups[name] = SimulatedGroup(
                name, self.num_started, num_slots, self.start_steps, host=next(self.hosts)
            )
        for name, stage in orders.stage.items():
            group = self.groups.get(name)
            if group:
                group.num_orders += 1
            for order in stage if group else ():
                slot = order.layer, order.expert
                if slot not in group.held and slot not in group.queue:
                    group.queue[slot] = order.peer
        for name, num_groups in orders.share.items():
            if group := self.groups.get(name):
                group.num_sharing = num_groups
        for name, slots in orders.free.items():
            if group := self.groups.get(name):
                group.held -= slots
                for slot in slots & group.queue.keys():
                    del group.queue[slot]

    def check(self) -> None:
        """What must hold at every moment."""
        for group in self.groups.values():
            filled = len(group.held) + len(group.queue)
            assert filled <= group.num_slots, f"{group.name} has {filled} of {group.num_slots} slots filled"
        for engine in self.engines:
            for listed in engine.placement.groups:
                group = self.groups.get(listed.name)
                if group is None or group.address != listed.address:
                    continue  # dead: the engine's link says so
                gone = set(listed.slots) - group.held
                assert not gone, (
                    f"{group.name} has freed {gone}, but {engine.name} uses epoch {engine.placement.epoch}"
                )
        if self.placement.epoch:
            self._check_coverage()

    def _check_coverage(self) -> None:
        """An expert that somebody holds who lives and answers can be found in the table."""
        listed = {slot for group in self.placement.groups for slot in group.slots}
        for group in self.groups.values():
            if group.answers:
                missing = (group.held & ALL) - listed
                assert not missing, f"{group.name} holds {missing}, but nobody is told"


def settled_fleet(**policy) -> Fleet:
    fleet = Fleet(**policy)
    fleet.settle()
    return fleet


def replicas(fleet: Fleet) -> Counter[tuple[int, int]]:
    """Count each expert's replicas in the newest placement."""
    return Counter(slot for group in fleet.placement.groups for slot in group.slots)


def run_until(fleet: Fleet, condition, num_steps: int = 100) -> int:
    for step in range(num_steps):
        if condition():
            return step
        fleet.step()
    raise AssertionError(f"it did not come about in {num_steps} steps")
