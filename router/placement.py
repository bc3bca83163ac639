"""The table that says which groups hold which experts, and how the rows of a layer are shared out by it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from router.crowds import Crowd, asked_groups
from router.links.address import Address

# A few rows take an expert as long as reading its weights does: as long as computing this many. (For a core
# that reads 12 GB/s and computes 110 GFLOP/s: docs/decisions/0001-own-cpu-kernels.md.)
VISIT_ROWS = 9
# An expert with fewer rows than this is not divided among its replicas: each would have to read its weights.
DIVIDE_ROWS = 2 * VISIT_ROWS
_PASSES = 2  # over the experts that can be divided: more do not make groups more even


@dataclass(frozen=True)
class Group:
    """One expert group, and the (layer, expert)s that it holds."""

    name: str
    address: str  # str(Address) of its listener
    slots: tuple[tuple[int, int], ...]
    abreast: int | None = None  # groups that its host's cores can run at once; None: any number


@dataclass(frozen=True)
class Share:
    """The rows of one expert that go to one group."""

    expert: int
    group: int  # index in the placement's groups
    num_rows: int


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

    def replicas(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the groups that hold the expert, as indices in `groups`, rising."""
        return self._replicas.get((layer, expert), ())

    def share_out(self, layer: int, rows: Iterable[tuple[int, int]], turn: int = 0) -> list[Share]:
        """Share out the rows of a layer, pairs (expert, number of rows), over the experts' replicas.

        Each group should get about as much to do. Experts with little choice come first, then those with
        many rows; each goes to the group that has the least so far, or is divided if it has DIVIDE_ROWS or
        more. Those are then divided once more, now that everybody's load is known. Where groups are equal,
        `turn` says who is first, so that callers who count it up spread small batches, too. On a host with
        more groups than it can run at once, only so many get rows, or as many more as it takes to have every
        expert. An expert without a replica gets no share.
        """
        num_groups = len(self.groups)
        load_G = [0] * num_groups
        parts_E: dict[int, list[tuple[int, int]]] = {}  # (group, rows) of each expert

        def place(expert: int, replicas: tuple[int, ...], num_rows: int) -> None:
            ranked = sorted(replicas, key=lambda group: (load_G[group], (group - turn) % num_groups))
            parts_E[expert] = _divide(ranked, load_G, num_rows)
            for group, part in parts_E[expert]:
                load_G[group] += max(part, VISIT_ROWS)

        choices = [(expert, self._asked(layer, expert), num_rows) for expert, num_rows in rows if num_rows]
        choices = [choice for choice in choices if choice[1]]
        for choice in sorted(choices, key=lambda choice: (len(choice[1]), -choice[2])):
            place(*choice)
        divisible = [choice for choice in choices if len(choice[1]) > 1 and choice[2] >= DIVIDE_ROWS]
        for choice in divisible * _PASSES if len(choices) > 1 else ():
            for group, part in parts_E[choice[0]]:
                load_G[group] -= max(part, VISIT_ROWS)
            place(*choice)
        return [Share(expert, group, part) for expert, parts in parts_E.items() for group, part in parts]

    def _asked(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the replicas that get rows: the same for all engines, which share the groups' cores."""
        replicas = self.replicas(layer, expert)
        if not self._crowds:
            return replicas
        if layer not in self._asked_groups:
            held_G = [held.get(layer, frozenset()) for held in self._held]
            self._asked_groups[layer] = asked_groups(held_G, self._crowds, layer)
        return tuple(group for group in replicas if group in self._asked_groups[layer])

    @cached_property
    def _crowds(self) -> list[Crowd]:
        groups_by_host: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            if group.abreast is not None:
                groups_by_host.setdefault(Address.parse(group.address).host_id, []).append(index)
        crowds = [
            Crowd(tuple(groups), min(self.groups[group].abreast or 1 for group in groups))
            for groups in groups_by_host.values()
        ]
        return [crowd for crowd in crowds if len(crowd.groups) > crowd.num_at_once]

    @cached_property
    def _asked_groups(self) -> dict[int, frozenset[int]]:
        """By layer, as far as they were needed yet."""
        return {}

    @cached_property
    def _held(self) -> list[dict[int, frozenset[int]]]:
        """The experts of each group, by layer."""
        held_G = []
        for group in self.groups:
            experts_L: dict[int, list[int]] = {}
            for layer, expert in group.slots:
                experts_L.setdefault(layer, []).append(expert)
            held_G.append({layer: frozenset(experts) for layer, experts in experts_L.items()})
        return held_G

    @cached_property
    def _replicas(self) -> dict[tuple[int, int], tuple[int, ...]]:
        replicas: dict[tuple[int, int], tuple[int, ...]] = {}
        for index, group in enumerate(self.groups):
            for slot in dict.fromkeys(group.slots):
                replicas[slot] = (*replicas.get(slot, ()), index)
        return replicas


def _divide(ranked: list[int], load_G: list[int], num_rows: int) -> list[tuple[int, int]]:
    """Divide rows among groups, ranked by load, so that their loads come as close as can be.

    A group gets VISIT_ROWS or more, or nothing, but for the first if there are not so many.
    """
    parts = [(ranked[0], num_rows)]
    for count in range(2, len(ranked) + 1):
        first = ranked[:count]
        level, rest = divmod(sum(load_G[group] for group in first) + num_rows, count)
        candidate = [(group, level - load_G[group] + (place < rest)) for place, group in enumerate(first)]
        if candidate[-1][1] < VISIT_ROWS:
            break
        parts = candidate
    return parts
