"""What the router decides: how many groups there are, what each holds, and what engines are told.

No clock, no process and no socket is in here: what is seen comes in, what should be done goes out.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from router.balance import balance
from router.engine_epochs import EngineEpochs
from router.epochs import Epochs
from router.expert_load import ExpertLoad
from router.group_count import GroupCount
from router.group_state import GroupState, Slot, Wish
from router.membership import Member, Membership, Standing
from router.moves import StageOrder, published, stage_orders
from router.placement import Group
from router.policy import Policy

# G groups   L layers   E experts of a layer

MAX_FAILURES = 3  # in a row, to start groups or to fill one, before the first placement: there will be none
_EAGER = {"tolerance": 1.01, "trigger": 1.02}  # of `balance`, on command


@dataclass(frozen=True)
class Orders:
    """What should be done now."""

    start: tuple[str, ...] = ()  # groups, by name
    kill: tuple[str, ...] = ()  # those that will not answer any more
    let_go: tuple[str, ...] = ()  # those that nobody needs: they may end in peace
    stage: Mapping[str, tuple[StageOrder, ...]] = field(default_factory=dict)
    free: Mapping[str, frozenset[Slot]] = field(default_factory=dict)
    share: Mapping[str, int] = field(default_factory=dict)  # cores, with how many groups


@dataclass(frozen=True)
class Progress:
    """How far the groups are from what is wished."""

    wished_groups: int
    groups: Mapping[str, int]  # number of groups by standing
    missing_replicas: int  # experts that groups should hold and do not yet
    lost_experts: int  # experts that no group holds who could be asked
    imbalance: float  # most rows of a group / mean, in the worst layer, when it was looked at last
    is_planned: bool = True  # what each should hold, for the groups that there are now
    failure: str | None = None  # why what is missing somewhere can't be staged, as far as that is known

    @property
    def is_settled(self) -> bool:
        others = sum(number for standing, number in self.groups.items() if standing != "live")
        in_place = self.is_planned and not self.missing_replicas
        return in_place and not others and self.groups["live"] == self.wished_groups


class Controller:
    """The mind of one model's router. Not thread-safe. Times are in seconds; their clock never goes back."""

    def __init__(self, policy: Policy, epochs: Epochs, prefix: str, now_s: float) -> None:
        """`prefix` begins the name of every group that is started; the lowest number that is free ends it."""
        self._policy = policy
        self._epochs = epochs
        self._prefix = prefix
        self._members = Membership(policy.patience)
        self._count = GroupCount(policy, now_s)
        self._engines = EngineEpochs(now_s)
        self._load = ExpertLoad(policy.num_layers, policy.num_experts, policy.half_life_s, now_s)
        self._balanced_at = now_s
        self._target: dict[str, frozenset[Slot]] = {}
        self._planned_for: object = None  # the groups that `_target` was made for
        self._is_asked = False  # to plan for the load alone
        self._imbalance = 1.0  # as it was when it was looked at last

    @property
    def wish(self) -> Wish:
        return self._count.wish

    @property
    def epoch(self) -> int:
        """Of the newest placement."""
        return self._epochs.newest.epoch

    def is_draining(self, name: str) -> bool:
        """Say whether the group is to leave; it should remember that, for another router to know."""
        return self._members.is_draining(name)

    def found(self, name: str, now_s: float) -> None:
        """Take over a group of an earlier router."""
        self._members.started(name, now_s, is_found=True)

    def heard(self, state: GroupState, now_s: float) -> bool:
        """Take a group's answer to a heartbeat; return whether there may be something to decide now."""
        if self._members.is_starting(state.name):
            self._count.start_succeeded()
        self._count.heard(state.wish)
        return self._members.heard(state, now_s)

    def doubt(self, name: str) -> None:
        """Suspect a group, because its link broke."""
        self._members.doubt(name)

    def lost(self, name: str, reason: str, now_s: float) -> None:
        """Give up a group that is certainly dead."""
        member = self._members.remove(name)
        if member is None or member.state or member.is_found:
            return
        self._count.start_failed(member.heard_at, now_s)
        if self._count.failed_starts >= MAX_FAILURES:
            self._fail(f"expert group {name} could not be started: {reason}")

    def saw_engine(self, name: str, epoch: int, load_LE: NDArray[np.int64], now_s: float) -> None:
        """Take an engine's word: it will send no row by an older epoch any more, and has sent `load_LE`."""
        self._engines.saw(name, epoch, now_s)
        self._epochs.name(epoch)
        self._load.add(load_LE, now_s)

    def scale(self, num_groups: int) -> None:
        """Wish for another number of groups. Raises ValueError if they are too few, or too many."""
        self._count.scale(num_groups)

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
        if self.epoch:  # before the first placement, groups have nothing to do
            self._count.follow_load([member.busy for member in groups[Standing.LIVE]], now_s)
        start, abandoned = self._fit_number(groups, now_s)
        active = groups[Standing.LIVE] + groups[Standing.DRAINING]
        self._plan(groups, now_s)
        stage = self._stage(active, now_s)
        share = self._share(active)
        asked_for = self._publish(groups)
        free, let_go = self._release(groups, asked_for, now_s)
        for name in (*abandoned, *let_go):
            self._members.remove(name)
        return Orders(start, (*kill, *abandoned), let_go, stage, free, share)

    def progress(self, now_s: float) -> Progress:
        """Return how far things are."""
        groups = self._members.by_standing(now_s)
        live, draining = groups[Standing.LIVE], groups[Standing.DRAINING]
        missing = {m.name: len(self._target.get(m.name, frozenset()) - m.held) for m in live}
        return Progress(
            self.wish.num_groups,
            {standing.value: len(its) for standing, its in groups.items()},
            sum(missing.values()),
            self._num_lost(live + draining),
            self._imbalance,
            self._planned_for == _names(live, groups[Standing.SUSPECT]),
            next((m.state.failure for m in live if m.state and m.state.failure and missing[m.name]), None),
        )

    def _fit_number(
        self, groups: Mapping[Standing, list[Member]], now_s: float
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Start groups if there are too few, drain the youngest if too many; return whom to start and end.

        While every expert can be asked for, hosts that serve are spared: each has one start at a time.
        """
        staying = [m for its in groups.values() for m in its if not m.is_draining]
        surplus = len(staying) - self.wish.num_groups
        if any(member.is_found for member in groups[Standing.STARTING]):
            surplus = min(surplus, 0)  # it may know of a wish for more, and may be at work
        abandoned = [m.name for m in reversed(groups[Standing.STARTING])][: max(surplus, 0)]
        for member in [*reversed(groups[Standing.LIVE])][: max(surplus - len(abandoned), 0)]:
            member.is_draining = True
            groups[Standing.LIVE].remove(member)
            groups[Standing.DRAINING].append(member)
        num_starts = max(-surplus, 0) if self._count.may_start(now_s) else 0
        active = groups[Standing.LIVE] + groups[Standing.DRAINING]
        if self.epoch and not self._num_lost(active):
            num_hosts = len({member.host for member in active})
            num_starts = min(num_starts, max(num_hosts - len(groups[Standing.STARTING]), 0))
        # Numbers are used again, so that metrics of groups that come and go stay few.
        free_names = (name for i in count() if (name := f"{self._prefix}{i}") not in self._members.names())
        start = tuple(islice(free_names, num_starts))
        for name in start:
            self._members.started(name, now_s)
        return start, tuple(abandoned)

    def _num_lost(self, active: list[Member]) -> int:
        """Return how many experts none of these groups holds."""
        held = frozenset[Slot]().union(*(member.held for member in active))
        return self._policy.num_layers * self._policy.num_experts - len(held)

    def _plan(self, groups: Mapping[Standing, list[Member]], now_s: float) -> None:
        """Decide anew what each group should hold, if something has changed."""
        live, suspect = groups[Standing.LIVE], groups[Standing.SUSPECT]
        if not live:
            return
        planned_for = _names(live, suspect)
        every = list(range(self._policy.num_layers))
        layers = every if planned_for != self._planned_for else self._uneven_layers(live, now_s)
        if not layers:
            return
        self._planned_for, self._balanced_at = planned_for, now_s
        wanted_GLE = balance(
            self._load.rows_LE[layers],
            self._grid([member.held | member.staging for member in live])[:, layers],
            np.full(len(live), self._policy.slots_per_layer),
            # A suspect may be back in a moment: nothing is copied for its sake but what nobody else has.
            1 if suspect else self._policy.min_replicas,
            **(_EAGER if self._is_asked else {}),
        )
        self._is_asked = False
        before, self._target = self._target, {member.name: member.held for member in suspect}
        for member, wanted_LE in zip(live, wanted_GLE, strict=True):
            others = (slot for slot in before.get(member.name, ()) if slot[0] not in layers)
            wanted = ((layers[index], int(expert)) for index, expert in np.argwhere(wanted_LE))
            self._target[member.name] = frozenset((*others, *wanted))

    def _uneven_layers(self, live: list[Member], now_s: float) -> list[int]:
        """Return, now and then, the layers whose rows are spread badly, and not only by chance."""
        if now_s - self._balanced_at < self._policy.rebalance_period_s:
            return []
        self._balanced_at = now_s
        imbalance_L, is_real_L = self._load.imbalance(self._grid([member.held for member in live]))
        self._imbalance = float(imbalance_L.max())
        return np.flatnonzero((imbalance_L > self._policy.rebalance_above) & is_real_L).tolist()

    def _stage(self, active: list[Member], now_s: float) -> dict[str, tuple[StageOrder, ...]]:
        """Return what groups should be told to stage."""
        orders = stage_orders(active, self._target, now_s)
        for member in active:
            if member.name in orders:
                member.told_to_stage(now_s)
                if member.state and member.num_retries >= MAX_FAILURES:
                    self._fail(f"expert group {member.name} can't stage {member.state.failure}")
        return orders

    def _share(self, active: list[Member]) -> dict[str, int]:
        """Return whom to tell how many groups have its host's cores.

        One that was never filled does not count for the others, who do its work.
        """
        for member in active:
            target = self._target.get(member.name, frozenset())
            member.is_filled |= bool(target) and member.held >= target
        filled = Counter(member.host for member in active if member.is_filled)
        wanted = {m.name: filled[m.host] + (not m.is_filled) for m in active}
        return {m.name: wanted[m.name] for m in active if m.state and m.state.num_sharing != wanted[m.name]}

    def _fail(self, reason: str) -> None:
        """Tell engines that wait for a first placement why there will be none.

        Not those that have a placement of an earlier router: they can wait for better days.
        """
        if self._epochs.highest == 0:
            self._epochs.fail(reason)

    def _publish(self, groups: Mapping[Standing, list[Member]]) -> dict[str, frozenset[Slot]]:
        """Publish who can be asked for what, as soon as that is every expert; return it, by group.

        A suspect is left out as soon as others hold all that it has.
        """
        active, suspects = groups[Standing.LIVE] + groups[Standing.DRAINING], groups[Standing.SUSPECT]
        slots = published(active, self._target)
        available = frozenset().union(*slots.values())
        for member in suspects:
            if not member.held <= available:
                slots[member.name] = member.held
        states = {m.name: m.state for m in (*active, *suspects) if m.state}
        is_whole = len(frozenset().union(*slots.values())) == self._load.rows_LE.size
        # Nothing can be served before every expert is there. But engines that served before this router came
        # must learn what there is now, once that is known: until they use it, no slot can be freed.
        is_known = self._epochs.highest and not any(m.is_found for m in groups[Standing.STARTING])
        if is_whole or self.epoch or is_known:
            self._epochs.publish(
                tuple(
                    Group(name, states[name].address, tuple(sorted(held)), states[name].abreast)
                    for name, held in sorted(slots.items())
                    if held
                )
            )
        return slots

    def _release(
        self,
        groups: Mapping[Standing, list[Member]],
        asked_for: Mapping[str, frozenset[Slot]],
        now_s: float,
    ) -> tuple[dict[str, frozenset[Slot]], tuple[str, ...]]:
        """Return the slots to free and the groups to let go: those that no engine can use any more."""
        if not self._engines.all_use(self.epoch, now_s):
            return {}, ()
        # Also before the first placement: a group full of what it should not hold would never make it whole.
        free: dict[str, frozenset[Slot]] = {}
        for member in groups[Standing.LIVE]:
            target = self._target.get(member.name, member.held)
            unused = (member.held | member.staging) - target - asked_for.get(member.name, frozenset())
            member.freed |= unused
            if member.freed:  # again, until it confirms
                free[member.name] = frozenset(member.freed)
        let_go = tuple(m.name for m in groups[Standing.DRAINING] if self.epoch and not asked_for[m.name])
        return free, let_go

    def _grid(self, held: list[frozenset[Slot]]) -> NDArray[np.bool_]:
        """Return held_GLE."""
        held_GLE = np.zeros((len(held), *self._load.rows_LE.shape), np.bool_)
        for group, slots in enumerate(held):
            if slots:
                layers, experts = zip(*slots, strict=True)
                held_GLE[group, layers, experts] = True
        return held_GLE


def _names(live: list[Member], suspect: list[Member]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(member.name for member in members) for members in (live, suspect))
