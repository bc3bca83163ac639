"""How many expert groups the load needs."""

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class AutoscalePolicy:
    """Bounds of the number of groups, and how eager to move between them."""

    min_groups: int
    max_groups: int
    target_busy: float = 0.5  # share of time that a group should spend computing
    tolerance: float = 0.1  # of the target: no change while the mean group is so close to it
    up_after_s: float = 5.0  # of steady need
    down_after_s: float = 60.0


class Autoscaler:
    """Follows how busy groups are, and says how many there should be.

    It goes up to what was needed in all of the last `up_after_s`, and down to the most that was needed in
    the last `down_after_s`, so that neither a burst nor a lull changes anything. The number it aims at is
    groups * busy / target: what the Kubernetes horizontal autoscaler computes.
    """

    def __init__(self, policy: AutoscalePolicy) -> None:
        self._policy = policy
        self._needs: deque[tuple[float, int]] = deque()  # (when, number of groups that would have been right)

    def decide(self, busy: float, num_groups: int, now_s: float) -> int:
        """Return the number of groups to wish for; `busy` is the mean share of `num_groups` groups."""
        policy = self._policy
        need = num_groups
        if abs(busy / policy.target_busy - 1) > policy.tolerance:
            need = math.ceil(num_groups * busy / policy.target_busy - 1e-9)
        self._needs.append((now_s, min(max(need, policy.min_groups), policy.max_groups)))
        up = self._over(policy.up_after_s, now_s)
        if up and min(up) > num_groups:
            return min(up)
        down = self._over(policy.down_after_s, now_s)
        if down and max(down) < num_groups:
            return max(down)
        while now_s - self._needs[0][0] > max(policy.up_after_s, policy.down_after_s) + 1:
            self._needs.popleft()
        return num_groups

    def _over(self, seconds: float, now_s: float) -> list[int]:
        """Return the needs of the last seconds; nothing if they are not known for so long yet."""
        if now_s - self._needs[0][0] < seconds:
            return []
        return [need for when, need in self._needs if now_s - when <= seconds]
