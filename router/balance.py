"""Decide which expert group holds which experts, and copy little to get there."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from router.coverage import cover, shrink
from router.split import Split, settling_order, split_of

# L layers   E experts   G expert groups

# How wide a step is searched for. All are small: what is left out would do less good.
_EXPERTS = 4  # those with the most rows in overloaded groups
_TARGETS = 8  # groups with the fewest rows
_WIDTH = 2  # experts with the fewest rows in a group, that may leave it, and groups they may go to
_WIDTH_IF_STUCK = 6  # the same, where that finds nothing

_PRECISION = 1e-3  # of a group's mean rows: how exactly the search settles a split
_AT_LEAST = 1e-3  # of an expert's mean rows: what each counts, so that experts without rows are spread, too


@dataclass(frozen=True)
class _Goal:
    """What is asked of a layer, as `balance` explains it."""

    min_replicas: int
    tolerance: float
    trigger: float
    min_gain: float

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas must be at least 1, but is {self.min_replicas}")
        if not 1 <= self.tolerance < self.trigger:
            raise ValueError(
                "tolerance must be at least 1 and below trigger, "
                f"but they are {self.tolerance} and {self.trigger}"
            )
        if not self.min_gain > 0:
            raise ValueError(f"min_gain must be above 0, but is {self.min_gain}")


def balance(
    load_LE: NDArray[np.float64],
    held_GLE: NDArray[np.bool_],
    slots_G: NDArray[np.int64],
    min_replicas: int = 1,
    *,
    tolerance: float = 1.05,
    trigger: float = 1.1,
    min_gain: float = 0.01,
) -> NDArray[np.bool_]:
    """Return wanted_GLE: which experts each group should hold in each layer.

    `load_LE` counts the rows of each expert; where a layer has none yet, its experts are dealt out evenly.
    `held_GLE` says which group holds what, `slots_G` how many experts of one layer a group may hold; 0
    empties it. What is wanted and not held must be copied, and that is kept small: what is held stays,
    unless its slot is needed, and balancing a result again changes nothing.

    First, every expert gets a replica, then `min_replicas`, as far as slots go. Then a layer whose imbalance
    is above `trigger` is brought to `tolerance`, as long as each copy takes `min_gain` of a group's mean rows
    off overloaded groups. Imbalance is the most rows of a group over the mean of the groups with slots, if
    rows are split as evenly as replicas allow. Loads that each stay within 2 % of what they were move nothing
    in a layer that reached `tolerance`: (1 + x) / (1 - x) must be less than trigger / tolerance.

    Raises ValueError for shapes and values that make no sense, never for want of slots.
    """
    goal = _Goal(min_replicas, tolerance, trigger, min_gain)
    _check(load_LE, held_GLE, slots_G)
    wanted_GLE = np.zeros_like(held_GLE)
    num_layers, num_experts = load_LE.shape
    active = slots_G.nonzero()[0].tolist()
    if not active or not num_experts:
        return wanted_GLE
    for layer in range(num_layers):
        first = layer * num_experts % len(active)  # the deal goes on where it ended in the layer before
        dealt = active[first:] + active[:first]
        wanted_GE, is_balanced = _balance_layer(load_LE[layer], held_GLE[:, layer], slots_G, dealt, goal)
        if not is_balanced:
            # A local search may be stuck where it began. From nothing it may get further, and that is then
            # worth the copies.
            empty_GE = np.zeros_like(wanted_GE)
            fresh_GE, is_balanced = _balance_layer(load_LE[layer], empty_GE, slots_G, dealt, goal)
            kept_GE = _with_idle(fresh_GE, held_GLE[:, layer], slots_G)
            if not np.array_equal(kept_GE, fresh_GE):
                fresh_GE, is_balanced = _balance_layer(load_LE[layer], kept_GE, slots_G, dealt, goal)
            wanted_GE = fresh_GE if is_balanced else wanted_GE
        wanted_GLE[:, layer] = wanted_GE
    return wanted_GLE


def _balance_layer(
    load_E: NDArray[np.float64],
    held_GE: NDArray[np.bool_],
    slots_G: NDArray[np.int64],
    dealt: list[int],
    goal: _Goal,
) -> tuple[NDArray[np.bool_], bool]:
    """Return wanted_GE, and whether its imbalance is below the trigger."""
    # A step may open the way to others. What is returned must be a placement from which there is none.
    while True:
        search = _Search(load_E, held_GE, slots_G, dealt, goal)
        wanted_GE = search.run()
        if np.array_equal(wanted_GE, held_GE):
            return wanted_GE, search.is_balanced
        held_GE = wanted_GE


def _with_idle(
    wanted_GE: NDArray[np.bool_], held_GE: NDArray[np.bool_], slots_G: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return what is wanted, and of what is held as much as has room after all."""
    idle_GE = held_GE & ~wanted_GE
    room_G = slots_G - wanted_GE.sum(axis=1)
    has_room_GE: NDArray[np.bool_] = idle_GE.cumsum(axis=1) <= room_G[:, None]
    return wanted_GE | idle_GE & has_room_GE


def _check(load_LE: NDArray[np.float64], held_GLE: NDArray[np.bool_], slots_G: NDArray[np.int64]) -> None:
    if load_LE.ndim != 2 or held_GLE.ndim != 3 or held_GLE.shape[1:] != load_LE.shape:
        raise ValueError(
            "load_LE must be [layers, experts] and held_GLE [groups, layers, experts], "
            f"but their shapes are {load_LE.shape} and {held_GLE.shape}"
        )
    if slots_G.shape != held_GLE.shape[:1]:
        raise ValueError(
            f"slots_G must have one number per group, {len(held_GLE)}, but has shape {slots_G.shape}"
        )
    if held_GLE.dtype != np.bool_:
        raise ValueError(f"held_GLE must be of bool, but is of {held_GLE.dtype}")
    for layer, expert in np.argwhere(~(np.isfinite(load_LE) & (load_LE >= 0)))[:1].tolist():
        raise ValueError(
            f"load_LE must be finite and not negative, but is {load_LE[layer, expert]} "
            f"for expert {expert} of layer {layer}"
        )
    for group in np.flatnonzero(slots_G < 0)[:1].tolist():
        raise ValueError(f"slots_G must not be negative, but is {slots_G[group]} for group {group}")


Cell = tuple[int, int]  # a group and an expert


@dataclass(frozen=True)
class _Step:
    """Replicas to take away and to add at once."""

    gain: float  # estimated rows that it takes off overloaded groups; less than 0 if it puts rows on them
    drops: tuple[Cell, ...] = ()
    adds: tuple[Cell, ...] = ()


class _Search:
    """A local search in one layer: cover the experts, then take rows off overloaded groups, step by step."""

    def __init__(
        self,
        load_E: NDArray[np.float64],
        held_GE: NDArray[np.bool_],
        slots_G: NDArray[np.int64],
        dealt: list[int],
        goal: _Goal,
    ) -> None:
        """Begin at `held_GE`; `dealt` names the groups with slots: of equal ones, the first is given to."""
        known = bool(load_E.any())
        load_E = np.maximum(load_E, _AT_LEAST * load_E.mean()) if known else np.ones_like(load_E)
        self._held_GE = held_GE
        self._held_G = [set(np.flatnonzero(held_E).tolist()) for held_E in held_GE]
        self._slots_G = slots_G.tolist()
        self._dealt = dealt
        self._replicas = min(goal.min_replicas, len(dealt))
        self._mean = float(load_E.sum()) / len(dealt)
        # Where nothing is known, groups that differ by one expert are even: that is no reason for replicas.
        even = 0.0 if known else float(-(-len(load_E) // len(dealt)))
        self._cap = max(goal.tolerance * self._mean, even)
        self._trigger = max(goal.trigger * self._mean, even)
        self._precision = _PRECISION * self._mean
        self._min_gain = goal.min_gain * self._mean
        self._split = split_of(load_E.tolist(), held_GE)
        self._width = _WIDTH
        self._havens: list[int] = []  # the groups, those with an opening first, then those with few rows

    @property
    def is_balanced(self) -> bool:
        """Whether no group has more rows than the trigger allows, at the end of `run`."""
        return max(self._split.rows_G) <= self._trigger

    def run(self) -> NDArray[np.bool_]:
        """Return wanted_GE."""
        shrink(self._split, self._slots_G, self._replicas)
        for replicas in range(1, self._replicas + 1):
            cover(self._split, self._held_G, self._slots_G, self._dealt, replicas)
        covered = self._split
        covered.settle(settling_order(covered), self._precision)
        if max(covered.rows_G) > self._trigger:
            self._improve()
            self._tidy()
            # Not for next to nothing: loads fluctuate, and the next result would be yet another one.
            after = max(self._split.rows_G)
            if after > self._trigger and max(covered.rows_G) - after < self._trigger - self._cap:
                self._split = covered
        wanted_GE = np.zeros_like(self._held_GE)
        for group, share in enumerate(self._split.share_G):
            wanted_GE[group, [*share]] = True
        return _with_idle(wanted_GE, self._held_GE, np.array(self._slots_G))

    def _improve(self) -> None:
        """Take rows off overloaded groups until there are none, or until that is not worth the copies."""
        while self._excess(self._split):
            targets = sorted(self._dealt, key=self._split.rows_G.__getitem__)
            if not (
                self._try(targets, _WIDTH)
                or self._try(targets, _WIDTH_IF_STUCK)
                or any(self._try([target], _WIDTH_IF_STUCK) for target in targets[:_TARGETS])
            ):
                return

    def _try(self, targets: list[int], width: int) -> bool:
        """Take the best step for each of these groups in turn; go back if all together were not worth it."""
        before, self._split = self._split, self._split.copy()
        self._width = width
        self._havens = sorted(self._dealt, key=lambda g: (not self._drop(g), self._split.rows_G[g]))
        touched: dict[Cell, None] = {}
        copies = 0
        for target in targets:
            step = self._best_step(target)
            if step is None:
                continue
            copies += self._copies(step)
            for group, expert in step.drops:
                self._split.drop(group, expert)
            for group, expert in step.adds:
                self._split.hold(group, expert)
            for cell in step.drops + step.adds:
                self._split.level(cell[1])
                touched[cell] = None
        near = [e for group, _ in touched for e in self._split.share_G[group]]
        self._split.settle([e for _, e in touched] + near, self._precision)
        if touched and self._excess(before) - self._excess(self._split) >= self._min_gain * max(1, copies):
            return True
        self._split = before
        return False

    def _best_step(self, target: int) -> _Step | None:
        """Return the best step, per copy, of those that give `target` an expert of overloaded groups."""
        if self._split.rows_G[target] + self._min_gain > self._cap:
            return None
        best, most = None, self._min_gain
        for step in self._steps(target):
            # What it takes off is an upper limit of what it is worth.
            if step.gain > most and (worth := step.gain / max(1, self._copies(step))) > most:
                best, most = step, worth
        return best

    def _steps(self, target: int) -> Iterator[_Step]:
        split, rows_G, share_G = self._split, self._split.rows_G, self._split.share_G
        excess = self._excess(split)
        over: dict[int, float] = {}  # rows of each expert in overloaded groups
        for group in self._dealt:
            if rows_G[group] > self._cap:
                for expert, rows in share_G[group].items():
                    over[expert] = over.get(expert, 0.0) + rows
        ways = self._ways_to_open(target)
        easy = bool(ways) and not ways[0].gain
        light = [] if easy else heapq.nsmallest(self._width, share_G[target], key=share_G[target].__getitem__)
        for expert in heapq.nlargest(_EXPERTS, over.keys() - share_G[target].keys(), key=over.__getitem__):
            for way in ways:
                room = self._cap - rows_G[target] + sum(share_G[g][e] for g, e in way.drops if g == target)
                gain = min(over[expert], room, excess) + way.gain
                yield _Step(gain, way.drops, ((target, expert), *way.adds))
            # Or an exchange with the busiest group that has the expert.
            source = max(split.homes_E[expert], key=rows_G.__getitem__)
            for other in light:
                if other not in share_G[source]:
                    shift = share_G[source][expert] - share_G[target][other]
                    room = self._cap - rows_G[target]
                    gain = min(shift, rows_G[source] - self._cap) - max(0.0, shift - room)
                    yield _Step(
                        gain, ((source, expert), (target, other)), ((target, expert), (source, other))
                    )

    def _ways_to_open(self, group: int) -> list[_Step]:
        """Return ways to have a free slot in the group: at no copy, or by moving one of its experts."""
        split = self._split
        ways = self._drop(group)
        if ways and not ways[0].gain:
            return ways  # it does no harm, and all others cost copies
        share = split.share_G[group]
        for expert in heapq.nsmallest(self._width, share, key=share.__getitem__):
            havens = (g for g in self._havens if g != group and g not in split.homes_E[expert])
            for haven, way in islice(((g, way) for g in havens for way in self._drop(g)), self._width):
                overflow = max(0.0, share[expert] - max(0.0, self._cap - split.rows_G[haven]))
                drops = ((group, expert), *way.drops)
                ways.append(_Step(way.gain - overflow, drops, ((haven, expert),)))
        return ways

    def _drop(self, group: int) -> list[_Step]:
        """Return the least harmful way to have a free slot in the group without a copy, if there is one."""
        split, share = self._split, self._split.share_G[group]
        if len(share) < self._slots_G[group]:
            return [_Step(0.0)]
        ways = []
        for expert, rows in share.items():
            if self._is_spare(expert):
                room = sum(max(0.0, self._cap - split.rows_G[g]) for g in split.homes_E[expert] if g != group)
                ways.append((min(0.0, room - rows), -rows, _Step(min(0.0, room - rows), ((group, expert),))))
        return [max(ways, key=lambda way: way[:2])[2]] if ways else []

    def _tidy(self) -> None:
        """Take back copies that have no rows to speak of."""
        split = self._split
        for group, share in enumerate(split.share_G):
            for expert in sorted(share.keys() - self._held_G[group]):
                if share[expert] <= self._precision and self._is_spare(expert):
                    split.drop(group, expert)

    def _excess(self, split: Split) -> float:
        """Return the rows that overloaded groups have too many."""
        return sum(rows - self._cap for rows in split.rows_G if rows > self._cap)

    def _is_spare(self, expert: int) -> bool:
        return len(self._split.homes_E[expert]) > self._replicas

    def _copies(self, step: _Step) -> int:
        """Return how many more experts must be copied for this step."""
        held = self._held_G
        return sum(e not in held[g] for g, e in step.adds) - sum(e not in held[g] for g, e in step.drops)
