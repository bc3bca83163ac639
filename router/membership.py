"""Which expert groups there are, and what is believed about each."""

import logging
from dataclasses import dataclass, field
from enum import Enum

from router.backoff import pause_s
from router.group_state import GroupState, Slot
from router.links.address import Address

_log = logging.getLogger(__name__)

_SMOOTHING = 0.2  # weight of the newest answer in what is believed of a group's load


class Standing(Enum):
    """What a router believes about a group."""

    STARTING = "starting"  # it has never answered
    LIVE = "live"
    SUSPECT = "suspect"  # it owes an answer for too long, or its link broke
    DRAINING = "draining"  # it lives, and leaves as soon as others hold its experts


@dataclass(frozen=True)
class Patience:
    """How long a silent group is believed in, in seconds."""

    suspect_after_s: float = 1.0
    dead_after_s: float = 10.0
    start_s: float = 120.0  # for the first answer: a process must be started, and torch imported
    found_s: float = 30.0  # the same, of a group that an earlier router has started


@dataclass
class Member:
    """An expert group that should exist."""

    name: str
    heard_at: float  # when it answered last; before that, when it was started
    state: GroupState | None = None
    is_doubted: bool = False  # its link broke behind its last answer
    is_draining: bool = False
    is_found: bool = False  # another router has started it
    is_filled: bool = False  # it has once held all that it should
    busy: float = 0.0  # share of its time that it computes, smoothed
    freed: set[Slot] = field(default_factory=set)  # told to free them; it has not confirmed that yet
    num_retries: int = 0  # orders to stage after a failure, since something was staged
    stage_after: float = 0.0  # no such order before

    @property
    def held(self) -> frozenset[Slot]:
        """What can be run there, now and in the future."""
        return self.state.held - self.freed if self.state else frozenset()

    @property
    def staging(self) -> frozenset[Slot]:
        return self.state.staging if self.state else frozenset()

    @property
    def host(self) -> str | None:
        return Address.parse(self.state.address).host_id if self.state else None

    def told_to_stage(self, now_s: float) -> None:
        """Note an order to stage; if the last one failed, the next has to wait, for longer and longer."""
        if self.state and self.state.failure:
            self.num_retries += 1
            self.stage_after = now_s + pause_s(self.num_retries)


class Membership:
    """The groups, oldest first. Times are in seconds, of any clock that never goes back."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._members: dict[str, Member] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def started(self, name: str, now_s: float, is_found: bool = False) -> None:
        """Note that a group was started, or found."""
        self._members[name] = Member(name, now_s, is_found=is_found)

    def heard(self, state: GroupState, now_s: float) -> bool:
        """Note a group's answer; return whether it tells more than that the group lives, and how busy it is.

        An answer of a group that was let go is ignored, and one that a later answer has overtaken.
        """
        member = self._members.get(state.name)
        if member is None or (member.state and state.number < member.state.number):
            return False
        known = member.state
        is_news = (
            known is None
            or self.standing(member, now_s) is Standing.SUSPECT
            or (known.held, known.staging, known.is_leaving, known.wish)
            != (state.held, state.staging, state.is_leaving, state.wish)
        )
        if known and now_s > member.heard_at:
            share = (state.busy_s - known.busy_s) / (now_s - member.heard_at)
            member.busy += _SMOOTHING * (share - member.busy)
        if state.failure is None or (known and state.held - known.held):
            member.num_retries = 0
        if state.failure and (known is None or state.failure != known.failure):
            _log.warning("%s can't stage: %s", state.name, state.failure)
        member.state, member.heard_at, member.is_doubted = state, now_s, False
        member.is_draining |= state.is_leaving
        member.freed &= state.held | state.staging
        return is_news

    def is_starting(self, name: str) -> bool:
        return name in self._members and self._members[name].state is None

    def doubt(self, name: str) -> None:
        """Suspect a group until it answers again."""
        if member := self._members.get(name):
            member.is_doubted = True

    def drain(self, name: str) -> None:
        """Have a group leave. Raises ValueError if it is not here."""
        if name not in self._members:
            raise ValueError(f"there is no expert group {name!r}; there are {', '.join(self._members)}")
        self._members[name].is_draining = True

    def is_draining(self, name: str) -> bool:
        return name in self._members and self._members[name].is_draining

    def remove(self, name: str) -> Member | None:
        """Forget a group that is dead, or has left."""
        return self._members.pop(name, None)

    def overdue(self, now_s: float) -> tuple[str, ...]:
        """Return those that have been silent for so long that they must be given up."""
        return tuple(
            member.name
            for member in self._members.values()
            if now_s - member.heard_at > self._patience_with(member)
        )

    def _patience_with(self, member: Member) -> float:
        if member.state:
            return self._patience.dead_after_s
        return self._patience.found_s if member.is_found else self._patience.start_s

    def standing(self, member: Member, now_s: float) -> Standing:
        if member.state is None:
            return Standing.STARTING
        if member.is_doubted or now_s - member.heard_at > self._patience.suspect_after_s:
            return Standing.SUSPECT
        return Standing.DRAINING if member.is_draining else Standing.LIVE

    def by_standing(self, now_s: float) -> dict[Standing, list[Member]]:
        """Return all groups, by what is believed about them."""
        groups: dict[Standing, list[Member]] = {standing: [] for standing in Standing}
        for member in self._members.values():
            groups[self.standing(member, now_s)].append(member)
        return groups
