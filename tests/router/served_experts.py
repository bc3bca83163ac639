"""Expert groups in this process: real listeners, links and loops around one-line experts."""

import threading
from collections.abc import Callable, Sequence
from multiprocessing import Queue
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from router.dispatch import Dispatcher, Placements
from router.links.address import Address
from router.links.base import Link
from router.links.listener import Listener
from router.links.pool import LinkPool
from router.links.stream import connect
from router.placement import Group, Placement
from router.pushed_placements import PushedPlacements
from shards.expert_service import ExpertService
from shards.expert_store import NotHeld

SECRET = b"one cluster's secret"
NUM_LAYERS, NUM_EXPERTS, HIDDEN_SIZE = 3, 8, 16


def even(num_layers: int, num_experts: int, num_groups: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Deal every (layer, expert) to exactly one group; return the slots of each."""
    deck = [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    return tuple(tuple(deck[group::num_groups]) for group in range(num_groups))


ALL = even(NUM_LAYERS, NUM_EXPERTS, 1)[0]


def expert_formula(layer: int, expert: int, x_ND: Tensor) -> Tensor:
    return x_ND * (expert + 1) + layer * 0.1


def reference(layer: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
    """Run each row alone."""
    rows = [expert_formula(layer, int(e), x_TD[t]) for t, row in enumerate(expert_TK) for e in row]
    return torch.stack(rows).view(*expert_TK.shape, -1)


class FormulaStore:
    """Experts that compute `expert_formula`; `before_run` may wait, or raise SystemExit to die there."""

    def __init__(self, slots: Sequence[tuple[int, int]], before_run: Callable[[], None]) -> None:
        self._slots = slots
        self._before_run = before_run

    def run(self, layer: int, runs: Sequence[tuple[int, int]], x_ND: Tensor, out_ND: Tensor) -> None:
        self._before_run()
        for expert, _ in runs:
            if (layer, expert) not in self._slots:
                raise NotHeld(layer, expert)
        counts = [count for _, count in runs]
        for (expert, _), x, out in zip(runs, x_ND.split(counts), out_ND.split(counts), strict=True):
            out.copy_(expert_formula(layer, expert, x))

    def get(self, layer: int, expert: int) -> NoReturn:
        """Refuse: a formula has no weights."""
        raise NotHeld(layer, expert)


class ServedGroup:
    """One group that serves from a thread of this process."""

    def __init__(
        self,
        name: str,
        slots: Sequence[tuple[int, int]],
        directory: Path,
        hidden_size: int = HIDDEN_SIZE,
        before_run: Callable[[], None] = lambda: None,
    ) -> None:
        self.listener = Listener(SECRET, name, directory, "127.0.0.1")
        self.service = ExpertService(FormulaStore(slots, before_run), self.listener, hidden_size)
        self.service.start()
        self.group = Group(name, str(self.listener.address), tuple(slots))

    def kill(self) -> None:
        self.service.stop()


def placed(*groups: Group) -> PushedPlacements:
    """Return the placements of a router that has published these groups, under epoch 1."""
    placements = PushedPlacements()
    placements.push(Placement(1, groups))
    return placements


def open_link(address: str) -> Link:
    return connect(Address.parse(address), SECRET, "engine")


def dispatcher_of(
    placements: Placements, connect: Callable[[str], Link] = open_link, **knobs: float
) -> Dispatcher:
    return Dispatcher(placements, LinkPool(connect), NUM_LAYERS, NUM_EXPERTS, **knobs)


def some_rows(
    num_tokens: int, seed: int, top_k: int = 2, hidden_size: int = HIDDEN_SIZE
) -> tuple[Tensor, Tensor]:
    """Return x_TD and expert_TK, of different experts per token."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator)
    expert_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(top_k).indices
    return x_TD, expert_TK


def serve_until_killed(name: str, directory: Path, groups: "Queue[Group]") -> None:
    """Serve all experts, for a process of its own."""
    torch.set_num_threads(1)
    groups.put(ServedGroup(name, even(NUM_LAYERS, NUM_EXPERTS, 1)[0], directory).group)
    threading.Event().wait()


class Watched(PushedPlacements):
    """Calls `on_look` whenever the dispatcher looks for news: in each layer, and while it waits."""

    def __init__(self, on_look: Callable[[], None], *groups: Group) -> None:
        super().__init__()
        self._on_look = on_look
        self.push(Placement(1, groups))

    def current(self) -> Placement:
        self._on_look()
        return super().current()


def check(dispatch: Dispatcher, seed: int, num_tokens: int = 5) -> None:
    """Run every layer and compare bitwise."""
    for layer in range(NUM_LAYERS):
        x_TD, expert_TK = some_rows(num_tokens, seed)
        assert torch.equal(dispatch(layer, x_TD, expert_TK), reference(layer, x_TD, expert_TK))


def rows_of(group: ServedGroup) -> int:
    return sum(group.service.rows_per_expert.values())
