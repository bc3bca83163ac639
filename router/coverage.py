"""See to it that every expert of a layer has a replica, then a second one, and so on, as far as slots go."""

from collections.abc import Sequence

from router.split import Split

# G expert groups, as lists by their index


def shrink(split: Split, slots_G: Sequence[int], replicas: int) -> None:
    """Take from groups what they have no slots for: first what has more than `replicas`, then the light."""
    for group in sorted(range(len(slots_G)), key=slots_G.__getitem__):
        share = split.share_G[group]
        while len(share) > slots_G[group]:
            split.drop(group, min(share, key=lambda e: (len(split.homes_E[e]) <= replicas, split.load_E[e])))


def cover(
    split: Split, held_G: Sequence[set[int]], slots_G: Sequence[int], dealt: Sequence[int], replicas: int
) -> None:
    """Give every expert `replicas` replicas if it can be done, heavy experts first.

    Each goes to the group with the fewest rows that has a free slot, or takes the slot of an expert with more
    replicas than that. `dealt` names the groups with slots; of equal groups the first of it is next.
    What `held_G` already has stays where it is, unless there is no other way. Leaves the split unsettled.
    """
    lacking = [expert for expert, homes in enumerate(split.homes_E) if len(homes) < replicas]
    if not lacking:
        return
    load_E, homes_E, share_G = split.load_E, split.homes_E, split.share_G
    weight_E = [load / max(replicas, len(homes)) for load, homes in zip(load_E, homes_E, strict=True)]
    rows_G = [sum(weight_E[expert] for expert in share) for share in share_G]

    def hold(group: int, expert: int) -> None:
        split.hold(group, expert)
        rows_G[group] += weight_E[expert]

    def drop(group: int, expert: int) -> None:
        split.drop(group, expert)
        rows_G[group] -= weight_E[expert]

    def free(groups: Sequence[int]) -> list[int]:
        """Return those with a free slot, the one with the fewest rows first."""
        return sorted((g for g in groups if len(share_G[g]) < slots_G[g]), key=rows_G.__getitem__)

    for expert in sorted(lacking, key=lambda e: -load_E[e]):
        others = [group for group in dealt if group not in homes_E[expert]]
        if not free(others):
            surplus = [(weight_E[e], g, e) for g in others for e in share_G[g] if len(homes_E[e]) > replicas]
            # The free slots may be where the expert is already: another one goes there and leaves its slot.
            ways = [
                (weight_E[e], g, e, to)
                for to in free(dealt)
                for g in others
                for e in share_G[g] - share_G[to].keys()
            ]
            if surplus:
                drop(*min(surplus)[1:])
            elif ways:
                _, group, moved, to = min(ways)
                drop(group, moved)
                hold(to, moved)
        for group in free(others)[:1]:
            hold(group, expert)

    # What is new anyway may go elsewhere for nothing. Each move levels two groups, so this comes to an end.
    for _ in lacking:
        moves = [
            (rows_G[high], high, expert, low)
            for low in free(dealt)[:1]
            for high in dealt
            for expert in share_G[high].keys() - held_G[high] - share_G[low].keys()
            if rows_G[high] - rows_G[low] > 1.001 * weight_E[expert]
        ]
        if not moves:
            break
        _, high, expert, low = max(moves)
        drop(high, expert)
        hold(low, expert)
