"""Which expert groups take part in a layer, where a host has more of them than it can run at once."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# G groups, by index


class Crowd(NamedTuple):
    """Groups of one host, more than its cores can run at once."""

    groups: tuple[int, ...]
    num_at_once: int


def asked_groups(held_G: Sequence[frozenset[int]], crowds: Iterable[Crowd], first: int) -> frozenset[int]:
    """Return the groups to be asked in a layer: of each crowd as many as can run at once, and all others.

    More only if it takes them to have every expert of `held_G`, which is what each group holds. Groups with
    experts that nobody has yet come first, then those whose experts are there least often, then those that
    hold most; of equals, whoever comes next from `first` on.
    """
    crowds = list(crowds)
    crowded = {group for crowd in crowds for group in crowd.groups}
    asked = set(range(len(held_G))) - crowded
    times = Counter(expert for group in asked for expert in held_G[group])

    def value(group: int) -> tuple[int, float, int, int]:
        held = held_G[group]
        num_new = sum(not times[expert] for expert in held)
        mean_times = sum(times[expert] for expert in held) / len(held)
        return num_new, -mean_times, len(held), -((group - first) % len(held_G))

    def ask_best_of(groups: Iterable[int]) -> bool:
        best = max(
            (group for group in groups if group not in asked and held_G[group]), key=value, default=None
        )
        if best is None:
            return False
        asked.add(best)
        times.update(held_G[best])
        return True

    for crowd in crowds:
        for _ in range(crowd.num_at_once):
            ask_best_of(crowd.groups)
    num_experts = len(frozenset().union(*held_G))
    while len(times) < num_experts and ask_best_of(crowded):
        pass
    return frozenset(asked)
