"""The table that says where each expert lives."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# L layers   E experts of a layer   R replicas of an expert   G groups   N rows
#
# A place is one slot of one group. Places are numbered group by group, so rows sorted by place are sorted by
# group, then by slot.


@dataclass(frozen=True)
class Group:
    """One expert group: slot s of it holds expert `slots[s][1]` of layer `slots[s][0]`."""

    name: str
    address: str  # str(Address) of its listener
    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Placement:
    """Which group holds which experts, as the router published it under this epoch."""

    epoch: int
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups must have different names, but they are {names}")
        for group in self.groups:
            for slot in group.slots:
                if min(slot) < 0:
                    raise ValueError(f"group {group.name!r} has slot {slot}; layer and expert count from 0")

    def without(self, name: str) -> "Placement":
        """Return the same table, under the same epoch, as if the group had never been there."""
        return Placement(self.epoch, tuple(group for group in self.groups if group.name != name))

    def choose(self, layer: int, expert_N: NDArray[np.int64], row_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the place of a replica for each row, -1 where its expert has none.

        The choice depends on nothing but the layer, the row and the expert's replicas; consecutive rows and
        layers take turns, so the replicas share the load.
        """
        place_LER, num_replicas_LE = self._tables
        try:
            replica_N = (row_N + layer) % num_replicas_LE[layer, expert_N]
            place_N: NDArray[np.int64] = place_LER[layer, expert_N, replica_N]
            return place_N
        except IndexError:  # an expert behind the last one that anybody holds
            known_N = (expert_N < place_LER.shape[1]) & (layer < len(place_LER))
            place_N = np.full_like(expert_N, -1)
            if known_N.any():
                place_N[known_N] = self.choose(layer, expert_N[known_N], row_N[known_N])
            return place_N

    @cached_property
    def first_place_G1(self) -> NDArray[np.int64]:
        """The place of each group's slot 0; behind the last group, the number of places."""
        return np.cumsum([0, *(len(group.slots) for group in self.groups)])

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of each expert's replicas, padded with -1, and how many those are, but 1 for none."""
        places: dict[tuple[int, int], list[int]] = {}  # by (layer, expert)
        for place, held in enumerate(slot for group in self.groups for slot in group.slots):
            places.setdefault(held, []).append(place)
        num_layers = 1 + max((layer for layer, _ in places), default=-1)
        num_experts = 1 + max((expert for _, expert in places), default=-1)
        most = max(map(len, places.values()), default=1)
        place_LER = np.full((num_layers, num_experts, most), -1, np.int64)
        num_replicas_LE = np.ones((num_layers, num_experts), np.int64)
        for (layer, expert), replicas in places.items():
            num_replicas_LE[layer, expert] = len(replicas)
            place_LER[layer, expert, : len(replicas)] = replicas
        return place_LER, num_replicas_LE


def even(num_layers: int, num_experts: int, num_groups: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Deal every (layer, expert) to exactly one of `num_groups` groups; return the slots of each group.

    The groups' numbers of experts differ by at most one, in each layer and in total.
    """
    for name, value in (("num_layers", num_layers), ("num_experts", num_experts), ("num_groups", num_groups)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if num_groups > num_layers * num_experts:
        raise ValueError(
            f"num_groups is {num_groups}, but {num_layers} layers of {num_experts} experts fill at most "
            f"{num_layers * num_experts} groups"
        )
    deck = [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    return tuple(tuple(deck[group::num_groups]) for group in range(num_groups))
