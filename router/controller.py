"""What the router decides: how many groups there are, what each holds, and what engines are told.

No clock, no process and no socket is in here: what is seen comes in, what should be done goes out.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from router.autoscale import AutoscalePolicy, Autoscaler
from router.balance import balance
from router.epochs import Epochs
from router.group_state import GroupState, Slot, Wish
from router.membership import Member, Membership, Patience, Standing
from router.moves import StageOrder, published, stage_orders
from router.placement import Group
from router.split import rows_per_group

# G groups   L layers   E experts of a layer

_log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3  # in a row, before the first placement: then there will be none
LONGEST_PAUSE_S = 30.0  # between two starts that fail
_EAGER = {"tolerance": 1.01, "trigger": 1.02}  # of `balance`, on command
ENGINE_TTL_S = 5.0  # an engine that has said nothing for this long uses no placement any more


@dataclass(frozen=True)
class Policy:
    """What an operator wants of a model's expert groups."""

    num_layers: int
    num_experts: int
    num_groups: int  # at first
    slots_per_layer: int  # experts of one layer that a group may be given
    min_replicas: int = 1  # of each expert, if there is room
    patience: Patience = field(default_factory=Patience)
    autoscale: AutoscalePolicy | None = None  # None: only commands change the number of groups
    half_life_s: float = 10.0  # of a row in the load that is balanced
    rebalance_above: float = (
        1.25  # imbalance (most rows of a group / mean) at which experts move by themselves
    )
    rebalance_period_s: float = 5.0

    @property
    def smallest_num_groups(self) -> int:
        """How many groups it takes to hold every expert once."""
        return -(-self.num_experts // self.slots_per_layer)


@dataclass(frozen=True)
class Orders:
    """What should be done now."""

    start: tuple[str, ...] = ()  # groups, by name
    kill: tuple[str, ...] = ()  # those that will not answer any more
    let_go: tuple[str, ...] = ()  # those that nobody needs: they may end in peace
    stage: Mapping[str, tuple[StageOrder, ...]] = field(default_factory=dict)
    free: Mapping[str, frozenset[Slot]] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far the groups are from what is wished."""

    wished_groups: int
    groups: Mapping[str, int]  # number of groups by standing
    missing_replicas: int  # experts that groups should hold and do not yet
    lost_experts: int  # experts that no group holds who could be asked
    imbalance: float  # most rows of a group / mean, in the worst layer, when it was looked at last
    is_planned: bool = True  # what each should hold, for the groups that there are now

    @property
    def is_settled(self) -> bool:
        others = sum(number for standing, number in self.groups.items() if standing != "live")
        in_place = self.is_planned and not self.missing_replicas
        return in_place and not others and self.groups["live"] == self.wished_groups


@dataclass
class _Engine:
    epoch: int
    seen_at: float


class Controller:
    """The mind of one model's router. Not thread-safe. Times are in seconds; their clock never goes back."""

    def __init__(self, policy: Policy, epochs: Epochs, prefix: str, now_s: float) -> None:
        """`prefix` begins the name of every group that is started; the lowest number that is free ends it."""
        self._policy = policy
        self._epochs = epochs
        self._prefix = prefix
        self._members = Membership(policy.patience)
        self._autoscaler = Autoscaler(policy.autoscale) if policy.autoscale else None
        self._wish = Wish(0, policy.num_groups)
        self._engines: dict[str, _Engine] = {}
        self._load_LE = np.zeros((policy.num_layers, policy.num_experts))
        self._decayed_at = self._balanced_at = self._began_at = now_s
        self._target: dict[str, frozenset[Slot]] = {}
        self._planned_for: object = None  # the groups that `_target` was made for
        self._is_asked = False  # to plan for the load alone
        self._imbalance = 1.0  # as it was when it was looked at last
        self._failed_starts = 0
        self._start_after = now_s

    @property
    def wish(self) -> Wish:
        return self._wish

    @property
    def epoch(self) -> int:
        """Of the newest placement."""
        return self._epochs.newest.epoch

    def is_draining(self, name: str) -> bool:
        """Say whether the group is to leave; it should remember that, for another router to know."""
        return self._members.is_draining(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups that should exist."""
        return self._members.names()

    def found(self, name: str, now_s: float) -> None:
        """Take over a group of an earlier router."""
        self._members.started(name, now_s, is_found=True)

    def heard(self, state: GroupState, now_s: float) -> bool:
        """Take a group's answer to a heartbeat; return whether there may be something to decide now."""
        if self._members.is_starting(state.name):
            self._failed_starts = 0
        is_news = self._members.is_news(state, now_s)
        self._members.heard(state, now_s)
        self._wish = max(self._wish, state.wish, key=lambda wish: wish.number)
        return is_news

    def doubt(self, name: str) -> None:
        """Suspect a group, because its link broke."""
        self._members.doubt(name)

    def lost(self, name: str, reason: str, now_s: float) -> None:
        """Give up a group that is certainly dead."""
        member = self._members.remove(name)
        if member and member.state is None:
            self._failed_starts += 1
            self._start_after = now_s + min(0.25 * 2**self._failed_starts, LONGEST_PAUSE_S)
            # Not where engines have a placement of an earlier router: they can wait for better days.
            if self._failed_starts >= MAX_FAILED_STARTS and self._epochs.highest == 0:
                self._epochs.fail(f"expert group {name} could not be started: {reason}")

    def saw_engine(self, name: str, epoch: int, load_LE: NDArray[np.int64], now_s: float) -> None:
        """Take an engine's word: it will send no row by an older epoch any more, and has sent `load_LE`."""
        self._engines[name] = _Engine(epoch, now_s)
        self._epochs.name(epoch)
        self._load_LE *= 0.5 ** ((now_s - self._decayed_at) / self._policy.half_life_s)
        self._decayed_at = now_s
        self._load_LE += load_LE

    def scale(self, num_groups: int) -> None:
        """Wish for another number of groups. Raises ValueError if they could not hold every expert."""
        if num_groups < self._policy.smallest_num_groups:
            raise ValueError(
                f"groups is {num_groups}, but with {self._policy.slots_per_layer} slots for each layer it "
                f"takes at least {self._policy.smallest_num_groups} groups to hold "
                f"{self._policy.num_experts} experts"
            )
        self._wish = Wish(self._wish.number + 1, num_groups)

    def drain(self, name: str) -> None:
        """Replace a group by another, without haste. Raises ValueError if it is not here."""
        self._members.drain(name)

    def rebalance(self) -> None:
        """Plan anew for the load of the last seconds, however small the gain."""
        self._planned_for = None
        self._is_asked = True

    def tick(self, now_s: float) -> Orders:
        """Decide what to do now, and publish the placement that is right now. Costs up to a second."""
        kill = self._members.overdue(now_s)
        for name in kill:
            self.lost(name, "it did not answer", now_s)
        groups = self._members.by_standing(now_s)
        self._follow_load(groups[Standing.LIVE], now_s)
        start, abandoned = self._fit_number(groups, now_s)
        active = groups[Standing.LIVE] + groups[Standing.DRAINING]
        self._plan(groups, now_s)
        orders = stage_orders(active, self._target)
        asked_for = self._publish(active, groups[Standing.SUSPECT])
        free, let_go = self._release(groups, asked_for, now_s)
        for name in (*abandoned, *let_go):
            self._members.remove(name)
        return Orders(start, (*kill, *abandoned), let_go, orders, free)

    def progress(self, now_s: float) -> Progress:
        """Return how far things are."""
        groups = self._members.by_standing(now_s)
        live, draining = groups[Standing.LIVE], groups[Standing.DRAINING]
        missing = sum(len(self._target.get(m.name, frozenset()) - m.held) for m in live)
        held = frozenset[Slot]().union(*(m.held for m in live + draining))
        return Progress(
            self._wish.num_groups,
            {standing.value: len(its) for standing, its in groups.items()},
            missing,
            self._policy.num_layers * self._policy.num_experts - len(held),
            self._imbalance,
            self._planned_for == _names(live, groups[Standing.SUSPECT]),
        )

    def _follow_load(self, live: list[Member], now_s: float) -> None:
        """Wish for as many groups as the load needs, once those that were wished for are there."""
        if self._autoscaler is None or len(live) != self._wish.num_groups:
            return
        busy = sum(member.busy for member in live) / len(live)
        num_groups = self._autoscaler.decide(busy, len(live), now_s)
        if num_groups != len(live):
            _log.info("%d expert groups are busy for %.0f %%: now %d", len(live), 100 * busy, num_groups)
            self.scale(num_groups)

    def _fit_number(
        self, groups: Mapping[Standing, list[Member]], now_s: float
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Start groups if there are too few, drain the youngest if too many; return whom to start and end."""
        staying = [m for its in groups.values() for m in its if not m.is_draining]
        surplus = len(staying) - self._wish.num_groups
        abandoned = [m.name for m in reversed(groups[Standing.STARTING])][: max(surplus, 0)]
        for member in [*reversed(groups[Standing.LIVE])][: max(surplus - len(abandoned), 0)]:
            member.is_draining = True
            groups[Standing.LIVE].remove(member)
            groups[Standing.DRAINING].append(member)
        num_starts = max(-surplus, 0) if now_s >= self._start_after else 0
        # Numbers are used again, so that metrics of groups that come and go stay few.
        free_names = (name for i in count() if (name := f"{self._prefix}{i}") not in self._members.names())
        start = tuple(islice(free_names, num_starts))
        for name in start:
            self._members.started(name, now_s)
        return start, tuple(abandoned)

    def _plan(self, groups: Mapping[Standing, list[Member]], now_s: float) -> None:
        """Decide anew what each group should hold, if something has changed."""
        live, suspect = groups[Standing.LIVE], groups[Standing.SUSPECT]
        if not live:
            return
        planned_for = _names(live, suspect)
        if planned_for == self._planned_for and not self._is_out_of_balance(live, now_s):
            return
        self._planned_for, self._balanced_at = planned_for, now_s
        wanted_GLE = balance(
            self._load_LE,
            self._grid([member.held | member.staging for member in live]),
            np.full(len(live), self._policy.slots_per_layer),
            # A suspect may be back in a moment: nothing is copied for its sake but what nobody else has.
            1 if suspect else self._policy.min_replicas,
            **(_EAGER if self._is_asked else {}),
        )
        self._is_asked = False
        self._target = {member.name: member.held for member in suspect}
        for member, wanted_LE in zip(live, wanted_GLE, strict=True):
            self._target[member.name] = frozenset(
                (int(layer), int(expert)) for layer, expert in np.argwhere(wanted_LE)
            )

    def _is_out_of_balance(self, live: list[Member], now_s: float) -> bool:
        if now_s - self._balanced_at < self._policy.rebalance_period_s:
            return False
        self._balanced_at = now_s
        rows_GL = rows_per_group(self._load_LE, self._grid([member.held for member in live]))
        mean_L = rows_GL.mean(0)
        self._imbalance = max(1.0, float((rows_GL.max(0)[mean_L > 0] / mean_L[mean_L > 0]).max(initial=1.0)))
        return self._imbalance > self._policy.rebalance_above

    def _publish(self, active: list[Member], suspects: list[Member]) -> dict[str, frozenset[Slot]]:
        """Publish who can be asked for what, as soon as that is every expert; return it, by group.

        A suspect is left out as soon as others hold all that it has.
        """
        slots = published(active, self._target)
        available = frozenset().union(*slots.values())
        for member in suspects:
            if not member.held <= available:
                slots[member.name] = member.held
        addresses = {m.name: m.state.address for m in (*active, *suspects) if m.state}
        groups = tuple(
            Group(name, addresses[name], tuple(sorted(held))) for name, held in sorted(slots.items()) if held
        )
        is_whole = len(frozenset().union(*slots.values())) == self._load_LE.size
        if is_whole or self._epochs.newest.epoch:  # nothing can be served before every expert is there
            self._epochs.publish(groups)
        return slots

    def _release(
        self,
        groups: Mapping[Standing, list[Member]],
        asked_for: Mapping[str, frozenset[Slot]],
        now_s: float,
    ) -> tuple[dict[str, frozenset[Slot]], tuple[str, ...]]:
        """Return the slots to free and the groups to let go: those that no engine can use any more."""
        if now_s - self._began_at < ENGINE_TTL_S:  # engines that we know nothing of yet may use anything
            return {}, ()
        for name in [n for n, engine in self._engines.items() if now_s - engine.seen_at > ENGINE_TTL_S]:
            del self._engines[name]
        newest = self._epochs.newest
        if any(engine.epoch < newest.epoch for engine in self._engines.values()):
            return {}, ()
        # Also before the first placement: a group full of what it should not hold would never make it whole.
        free: dict[str, frozenset[Slot]] = {}
        for member in groups[Standing.LIVE]:
            target = self._target.get(member.name, member.held)
            unused = (member.held | member.staging) - target - asked_for.get(member.name, frozenset())
            member.freed |= unused
            if member.freed:  # again, until it confirms
                free[member.name] = frozenset(member.freed)
        let_go = tuple(m.name for m in groups[Standing.DRAINING] if newest.epoch and not asked_for[m.name])
        return free, let_go

    def _grid(self, held: list[frozenset[Slot]]) -> NDArray[np.bool_]:
        """Return held_GLE."""
        held_GLE = np.zeros((len(held), *self._load_LE.shape), np.bool_)
        for group, slots in enumerate(held):
            if slots:
                layers, experts = zip(*slots, strict=True)
                held_GLE[group, layers, experts] = True
        return held_GLE


def _names(live: list[Member], suspect: list[Member]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(member.name for member in members) for members in (live, suspect))
