"""What an operator wants of a model's expert groups."""

from dataclasses import dataclass, field

from router.autoscale import AutoscalePolicy
from router.membership import Patience


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
        """How many groups it takes to hold every replica that there should be at least."""
        return -(-self.num_experts * self.min_replicas // self.slots_per_layer)

    @property
    def largest_num_groups(self) -> int:
        """How many groups there may be: more would have nothing to hold but copies."""
        return max(self.num_experts, self.smallest_num_groups)

    def bounded(self, num_groups: int) -> int:
        """Return the number of groups that may be wished for and comes closest."""
        return min(max(num_groups, self.smallest_num_groups), self.largest_num_groups)
