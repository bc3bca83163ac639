"""From what groups hold to what they should hold, without anybody missing an expert. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.group_state import Slot
from router.membership import Member

MAX_STAGING = 32  # experts that one group has in its queue: more would only make a change of plan cost more

Target = Mapping[str, frozenset[Slot]]  # by the name of the group


@dataclass(frozen=True)
class StageOrder:
    """Tells a group to fill a slot."""

    layer: int
    expert: int
    peer: str | None  # address of a group that holds it; None: read the checkpoint


def published(live: Sequence[Member], target: Target) -> dict[str, frozenset[Slot]]:
    """Return which of their experts groups should be asked for.

    An expert that is to leave a group is still asked for there until all groups that are to have it do; or
    until one of them does, if the group is full and waits for others.
    """
    slots: dict[str, frozenset[Slot]] = {}
    wanted = frozenset[Slot]().union(*(target.get(member.name, frozenset()) for member in live))
    arrived = frozenset[Slot]().union(*(member.held & _of(target, member) for member in live))
    awaited = frozenset[Slot]().union(*(_of(target, member) - member.held for member in live))
    for member in live:
        leaves = arrived if _is_stuck(member, target) else wanted - awaited
        slots[member.name] = member.held & _of(target, member) | member.held - leaves
    return slots


def stage_orders(live: Sequence[Member], target: Target, now_s: float) -> dict[str, tuple[StageOrder, ...]]:
    """Return what each group should be told to stage now, of what it should hold and does not.

    Weights come from a group that holds them, one on the same host if there is any, else from the checkpoint;
    while one group reads an expert, others wait for it, so that nothing is read twice. Experts that nobody
    holds come first, then those that groups exchange: taking one makes room where it was. All others leave a
    group's last slot free, or groups that are full could wait for each other for ever.
    """
    holders: dict[Slot, list[Member]] = {}
    for member in live:
        for slot in member.held:
            holders.setdefault(slot, []).append(member)
    being_read = frozenset[Slot]().union(*(member.staging for member in live))
    exchanged = {
        slot
        for slot, its_holders in holders.items()
        if any(not member.is_draining and slot not in _of(target, member) for member in its_holders)
    }
    lacking: dict[Slot, list[Member]] = {}
    for member in live:
        if now_s < member.stage_after:
            continue
        for slot in _of(target, member) - member.held - member.staging - member.freed:
            lacking.setdefault(slot, []).append(member)

    hosts = {member.name: member.host for member in live}
    orders: dict[str, list[StageOrder]] = {member.name: [] for member in live}
    num_fetches: dict[str, int] = dict.fromkeys(orders, 0)  # by the group that is fetched from
    for slot in sorted(lacking, key=lambda slot: (slot in holders, slot not in exchanged, slot)):
        is_urgent = slot not in holders or slot in exchanged
        takers = [m for m in lacking[slot] if len(orders[m.name]) < _room(m) - (not is_urgent)]
        if slot not in holders:
            takers = sorted(takers, key=lambda m: len(orders[m.name]))[: slot not in being_read]
        for taker in takers:
            its_holders, host = holders.get(slot, ()), hosts[taker.name]
            near = [member for member in its_holders if hosts[member.name] == host]
            giver = min(near or its_holders, key=lambda m: num_fetches[m.name], default=None)
            if giver:
                num_fetches[giver.name] += 1
            peer = giver.state.address if giver and giver.state else None
            orders[taker.name].append(StageOrder(*slot, peer))
    return {name: tuple(its_orders) for name, its_orders in orders.items() if its_orders}


def _of(target: Target, member: Member) -> frozenset[Slot]:
    return target.get(member.name, frozenset())


def _is_stuck(member: Member, target: Target) -> bool:
    """Say whether the group is full of what it should not hold, and can't take what it should."""
    return bool(_of(target, member) - member.held - member.staging) and _room(member) <= 1


def _room(member: Member) -> int:
    """How many experts the group may be told to stage."""
    if member.state is None:
        return 0
    free = member.state.num_slots - len(member.state.held) - len(member.state.staging)
    return min(free, MAX_STAGING - len(member.state.staging))
