"""How many expert groups there should be, and when another may be started."""

import logging

from router.autoscale import Autoscaler
from router.backoff import pause_s
from router.group_state import Wish
from router.policy import Policy

_log = logging.getLogger(__name__)


class GroupCount:
    """The wish for a number of groups, and how well starting them went. Times are in seconds."""

    def __init__(self, policy: Policy, now_s: float) -> None:
        self._policy = policy
        self._autoscaler = Autoscaler(policy.autoscale) if policy.autoscale else None
        self._wish = Wish(0, policy.num_groups)
        self._failed_starts = 0
        self._failed_at = self._start_after = now_s

    @property
    def wish(self) -> Wish:
        return self._wish

    @property
    def failed_starts(self) -> int:
        """How many starts failed in a row; of groups that were started together, one counts."""
        return self._failed_starts

    def heard(self, wish: Wish) -> None:
        """Take over what a group has heard of another router."""
        self._wish = max(self._wish, wish, key=lambda each: each.number)

    def scale(self, num_groups: int) -> None:
        """Wish for another number of groups. Raises ValueError if they are too few, or too many."""
        policy = self._policy
        if num_groups < policy.smallest_num_groups:
            often = f", {policy.min_replicas} replicas of each" if policy.min_replicas > 1 else ""
            raise ValueError(
                f"groups is {num_groups}, but with {policy.slots_per_layer} slots for each layer it takes at "
                f"least {policy.smallest_num_groups} groups to hold {policy.num_experts} experts{often}"
            )
        if num_groups > policy.largest_num_groups:
            raise ValueError(
                f"groups is {num_groups}, but there are only {policy.num_experts} experts to share out; "
                f"it may be {policy.largest_num_groups} at most"
            )
        self._wish = Wish(self._wish.number + 1, num_groups)

    def follow_load(self, busy: list[float], now_s: float) -> None:
        """Wish for as many groups as the load needs, once those that were wished for are there.

        `busy` has the share of time that each live group computes.
        """
        if self._autoscaler is None or len(busy) != self._wish.num_groups:
            return
        mean = sum(busy) / len(busy)
        num_groups = self._policy.bounded(self._autoscaler.decide(mean, len(busy), now_s))
        if num_groups != len(busy):
            _log.info("%d expert groups are busy for %.0f %%: now %d", len(busy), 100 * mean, num_groups)
            self.scale(num_groups)

    def start_succeeded(self) -> None:
        """Note that a group has answered for the first time."""
        self._failed_starts = 0

    def start_failed(self, started_at: float, now_s: float) -> None:
        """Note the loss of a group that never answered: the next start has to wait, longer and longer."""
        if started_at < self._failed_at:  # together with one that has failed already
            return
        self._failed_starts += 1
        self._failed_at = now_s
        self._start_after = now_s + pause_s(self._failed_starts)

    def may_start(self, now_s: float) -> bool:
        """Say whether a group may be started now."""
        return now_s >= self._start_after
