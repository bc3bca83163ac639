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

    An expert that is to leave a group is still asked for there until all groups that are to have it do.
    """
    awaited: set[Slot] = set()
    wanted: set[Slot] = set()
    for member in live:
        its_target = target.get(member.name, frozenset())
        wanted |= its_target
        awaited |= its_target - member.held
    settled = wanted - awaited
    return {
        member.name: member.held & target.get(member.name, frozenset()) | member.held - settled
        for member in live
    }


def stage_orders(live: Sequence[Member], target: Target) -> dict[str, tuple[StageOrder, ...]]:
    """Return what each group should be told to stage now, of what it should hold and does not.

    Weights come from a group that holds them, else from the checkpoint; while one group reads an expert,
    others wait for it, so that nothing is read twice. Experts that nobody holds come first, then those that
    will make room elsewhere.
    """
    holders: dict[Slot, list[Member]] = {}
    being_read: set[Slot] = set()
    for member in live:
        being_read |= member.staging
        for slot in member.held:
            holders.setdefault(slot, []).append(member)
    lacking: dict[Slot, list[Member]] = {}
    room: dict[str, int] = {}
    for member in live:
        state = member.state
        assert state is not None, "a live group has answered"
        room[member.name] = min(
            state.num_slots - len(state.held) - len(state.staging), MAX_STAGING - len(state.staging)
        )
        for slot in target.get(member.name, frozenset()) - state.held - state.staging - member.freed:
            lacking.setdefault(slot, []).append(member)

    def urgency(slot: Slot) -> tuple[bool, bool, Slot]:
        makes_room = any(slot not in target.get(member.name, ()) for member in holders.get(slot, ()))
        return bool(holders.get(slot)), not makes_room, slot

    orders: dict[str, list[StageOrder]] = {}
    fetches: dict[str, int] = {}  # by the group that is fetched from
    for slot in sorted(lacking, key=urgency):
        takers = sorted(
            (member for member in lacking[slot] if len(orders.get(member.name, ())) < room[member.name]),
            key=lambda member: len(orders.get(member.name, ())),
        )
        if slot not in holders:
            takers = [] if slot in being_read else takers[:1]
        for taker in takers:
            peer = None
            if slot in holders:
                giver = min(holders[slot], key=lambda member: fetches.get(member.name, 0))
                fetches[giver.name] = fetches.get(giver.name, 0) + 1
                assert giver.state is not None, "whoever holds an expert has answered"
                peer = giver.state.address
            orders.setdefault(taker.name, []).append(StageOrder(*slot, peer))
    return {name: tuple(its_orders) for name, its_orders in orders.items()}
