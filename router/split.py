"""How a layer's rows fall on its groups, if each expert's are split over its replicas as evenly as can be."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# L layers   E experts   G expert groups


class Split:
    """The groups of one layer, which experts each holds, and how many of the expert's rows it gets.

    After `settle`, no rows can go from one replica to another in a group that has less: the busiest group has
    as few rows as this placement allows, and so has the next busiest, and so on. This is what the dispatcher
    comes near to, since it sends to the replica with the least to do.
    """

    def __init__(self, load_E: Sequence[float], num_groups: int) -> None:
        """Start with empty groups; `load_E` is the number of rows that each expert gets."""
        self.load_E = load_E
        self.share_G: list[dict[int, float]] = [{} for _ in range(num_groups)]  # expert held: rows of it here
        self.rows_G = [0.0] * num_groups
        self.homes_E: list[set[int]] = [set() for _ in load_E]  # the groups that hold the expert

    def hold(self, group: int, expert: int) -> None:
        """Add a replica; it gets its rows when the expert is settled."""
        self.share_G[group].setdefault(expert, 0.0)
        self.homes_E[expert].add(group)

    def drop(self, group: int, expert: int) -> None:
        """Take a replica away; its rows go elsewhere when the expert is settled."""
        self.rows_G[group] -= self.share_G[group].pop(expert)
        self.homes_E[expert].remove(group)

    def copy(self) -> "Split":
        """Return a split that can be changed on its own."""
        twin = Split(self.load_E, 0)
        twin.share_G = [dict(share) for share in self.share_G]
        twin.rows_G = list(self.rows_G)
        twin.homes_E = [set(homes) for homes in self.homes_E]
        return twin

    def settle(self, experts: Iterable[int], precision: float) -> None:
        """Level the rows of these experts, and of others in groups that change by more than `precision` rows.

        One expert at a time is split at its best. Each time the sum of the squares of the groups' rows falls;
        where it is least, the groups are as level as can be: it is convex, and no expert limits another.
        """
        waiting = deque(dict.fromkeys(experts))
        queued = set(waiting)
        while waiting:
            expert = waiting.popleft()
            queued.discard(expert)
            for group in self.level(expert, precision):
                for other in self.share_G[group]:
                    if other != expert and other not in queued and len(self.homes_E[other]) > 1:
                        queued.add(other)
                        waiting.append(other)

    def level(self, expert: int, precision: float = 0.0) -> list[int]:
        """Pour one expert's rows over its groups like water; return the groups whose rows changed."""
        others = sorted((self.rows_G[g] - self.share_G[g][expert], g) for g in self.homes_E[expert])
        volume, level = self.load_E[expert], 0.0
        for wet, (rows, _) in enumerate(others, start=1):
            volume += rows
            level = volume / wet
            if wet == len(others) or level <= others[wet][0]:
                break
        changed = []
        for rows, group in others:
            share = max(0.0, level - rows)
            if abs(share - self.share_G[group][expert]) > precision:
                changed.append(group)
            self.share_G[group][expert] = share
            self.rows_G[group] = rows + share
        return changed


def rows_per_group(load_LE: NDArray[np.float64], held_GLE: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return rows_GL: how many rows each group gets in each layer, at the most even split.

    `load_LE` counts the rows of each expert. An expert without a replica gets none.
    """
    num_groups, num_layers, _ = held_GLE.shape
    rows_GL = np.zeros((num_groups, num_layers))
    for layer in range(num_layers):
        load_E = load_LE[layer].tolist()
        split = split_of(load_E, held_GLE[:, layer])
        split.settle(settling_order(split), 1e-9 * sum(load_E))
        rows_GL[:, layer] = split.rows_G
    return rows_GL


def split_of(load_E: Sequence[float], held_GE: NDArray[np.bool_]) -> Split:
    """Return the split of one layer under this placement, not settled yet."""
    split = Split(load_E, len(held_GE))
    for group, expert in zip(*(indices.tolist() for indices in held_GE.nonzero()), strict=True):
        split.hold(group, expert)
    return split


def settling_order(split: Split) -> list[int]:
    """Return all experts: those without a choice first; those with many replicas fill what is left."""
    load_E, homes_E = split.load_E, split.homes_E
    return sorted(range(len(load_E)), key=lambda expert: (len(homes_E[expert]), load_E[expert]))
