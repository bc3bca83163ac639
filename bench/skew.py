"""Are expert groups busy alike if experts are not? Rows by Zipf's law, shared out by the real dispatcher.

    python bench/skew.py                 # --json out.json for programs

A controller, as routers have it, decides what four groups hold; a dispatcher, as engines have it, shares the
rows of each step out over them, through links and services as expert groups have them. Only the experts are
empty: they count rows. In each layer other experts are hot. Printed are the rows of the busiest group over
the groups' mean, in the worst layer and on average over layers: with the first placement, which knows of no
load; when the controller has seen the load and balanced it; and what that placement would allow if rows were
split at best. The dispatcher balances time, not rows: it does not divide an expert of few rows, whose weights
would be read twice for that (`DIVIDE_ROWS` in router/placement.py). So small steps are not as even.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from about import describe_run
from numpy.typing import NDArray
from torch import Tensor

from router.controller import Controller
from router.dispatch import Dispatcher
from router.epochs import Epochs
from router.group_state import GroupState, Slot, Wish
from router.links.address import Address
from router.links.base import Link
from router.links.listener import Listener
from router.links.pool import LinkPool
from router.links.stream import connect
from router.placement import Placement
from router.policy import Policy
from router.split import rows_per_group
from shards.expert_service import ExpertService
from shards.expert_store import NotHeld

Floats = NDArray[np.float64]

# L layers   E experts   G groups   T tokens   D hidden   N rows

BAR = 1.1
BAR_TOKENS = 256  # of a step, from which on rows are what takes time
ZIPF = 1.2
NUM_LAYERS, NUM_EXPERTS, NUM_GROUPS = 8, 8, 4
SLOTS_PER_LAYER = 3  # of a group: it takes 2 to hold every expert once
NUM_TOKENS = (16, 64, 256, 1024)  # of a step; each goes to one expert of a layer
HIDDEN_SIZE = 8
TICK_S = 0.25
SETTLE_TICKS = 200
SECRET = b"of this benchmark"


class CountingStore:
    """Experts without weights: they say which rows came, and whether they should have come here."""

    def __init__(self) -> None:
        self.held: set[Slot] = set()
        self.rows_L = np.zeros(NUM_LAYERS, np.int64)

    def run(self, layer: int, runs: Sequence[tuple[int, int]], x_ND: Tensor, out_ND: Tensor) -> None:
        for expert, _ in runs:
            if (layer, expert) not in self.held:
                raise NotHeld(layer, expert)
        self.rows_L[layer] += len(x_ND)
        out_ND.copy_(x_ND)

    def get(self, layer: int, expert: int) -> NoReturn:
        raise NotHeld(layer, expert)


@dataclass
class Group:
    """One expert group in this process; slots fill at once."""

    name: str
    num_slots: int
    folder: Path
    store: CountingStore = field(default_factory=CountingStore)

    def __post_init__(self) -> None:
        self._listener = Listener(SECRET, self.name, self.folder, "127.0.0.1")
        self.service = ExpertService(self.store, self._listener, HIDDEN_SIZE)
        self.service.start()

    def state(self) -> GroupState:
        return GroupState(
            self.name,
            str(self._listener.address),
            self.num_slots,
            frozenset(self.store.held),
            frozenset(),
            busy_s=self.service.busy_s,
            wish=Wish(0, 0),
        )


class Fleet:
    """The groups, and the controller that fills them; time passes only by `tick`. Also the `Placements`."""

    def __init__(self, folder: Path) -> None:
        self._policy = Policy(NUM_LAYERS, NUM_EXPERTS, NUM_GROUPS, SLOTS_PER_LAYER)
        self._folder = folder
        self._epochs = Epochs()
        self._now_s = 0.0
        self._controller = Controller(self._policy, self._epochs, "g", self._now_s)
        self.groups: dict[str, Group] = {}
        self.num_staged = 0

    def current(self) -> Placement:
        return self._epochs.newest

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        return self.current()

    def tick(self, load_LE: NDArray[np.int64]) -> bool:
        """Let time pass, in which an engine has sent `load_LE`; say whether everything is as it should be."""
        self._now_s += TICK_S
        for group in self.groups.values():
            self._controller.heard(group.state(), self._now_s)
        self._controller.saw_engine("engine", self.current().epoch, load_LE, self._now_s)
        orders = self._controller.tick(self._now_s)
        for name in orders.start:
            num_slots = NUM_LAYERS * (SLOTS_PER_LAYER + 1)
            self.groups[name] = Group(name, num_slots, self._folder)
        for name, stage in orders.stage.items():
            self.groups[name].store.held |= {(order.layer, order.expert) for order in stage}
            self.num_staged += len(stage)
        # Not orders.share: here all groups compute on the threads of this process.
        for name, slots in orders.free.items():
            self.groups[name].store.held -= slots
        return self._controller.progress(self._now_s).is_settled

    def rebalance(self) -> None:
        self._controller.rebalance()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how busy groups are if experts are not alike.")
    parser.add_argument("--steps", type=int, default=300, help="that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()

    about = describe_run()
    print(f"\nrows of the busiest group / mean: Zipf({ZIPF:g}), {NUM_EXPERTS} experts, {NUM_GROUPS} groups")
    print(f"{'':16}{'before':>20}{'balanced':>20}{'split at best':>20}")
    print(f"{'tokens of a step':16}" + 3 * f"{'worst':>12}{'mean':>8}" + f"{'copies':>10}")
    results: list[dict[str, Any]] = []
    for num_tokens in NUM_TOKENS:
        with fleet() as its, closing(Traffic(its, num_tokens, arguments.seed)) as traffic:
            before_L, _ = imbalances(its, traffic, arguments.steps)
            copies = rebalance(its, traffic, arguments.steps)
            after_L, best_L = imbalances(its, traffic, arguments.steps)
        results.append(
            {
                "tokens_per_step": num_tokens,
                "before": before_L.tolist(),
                "balanced": after_L.tolist(),
                "split_at_best": best_L.tolist(),
                "copies": copies,
            }
        )
        numbers = "".join(
            f"{each_L.max():12.3f}{each_L.mean():8.3f}" for each_L in (before_L, after_L, best_L)
        )
        print(f"{num_tokens:<16}{numbers}{copies:10}", flush=True)
    worst = max(max(result["balanced"]) for result in results if result["tokens_per_step"] >= BAR_TOKENS)
    verdict = "holds" if worst <= BAR else "BROKEN"
    print(f"balanced <= {BAR:g} in every layer, for steps of {BAR_TOKENS} tokens and more: {verdict}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1))


@contextmanager
def fleet() -> Iterator[Fleet]:
    """Start the groups and let the controller fill them, as long as nothing is known of the load."""
    with tempfile.TemporaryDirectory() as folder:
        its = Fleet(Path(folder))
        try:
            settle(its)
            yield its
        finally:
            for group in its.groups.values():
                group.service.stop()


class Traffic:
    """Steps of an engine: in each layer, each token's row goes to an expert drawn by Zipf's law."""

    def __init__(self, its: Fleet, num_tokens: int, seed: int) -> None:
        self._dice = np.random.default_rng(seed)
        law_E = 1.0 / np.arange(1, NUM_EXPERTS + 1) ** ZIPF
        self._chance_LE = np.stack([self._dice.permutation(law_E / law_E.sum()) for _ in range(NUM_LAYERS)])
        self._x_TD = torch.ones(num_tokens, HIDDEN_SIZE)
        self._dispatcher = Dispatcher(its, LinkPool(_open), NUM_LAYERS, NUM_EXPERTS)

    def step(self) -> None:
        for layer in range(NUM_LAYERS):
            expert_T = self._dice.choice(NUM_EXPERTS, len(self._x_TD), p=self._chance_LE[layer])
            self._dispatcher(layer, self._x_TD, torch.from_numpy(expert_T)[:, None])

    def take_load(self) -> NDArray[np.int64]:
        return self._dispatcher.take_load()

    def close(self) -> None:
        self._dispatcher.close()


def _open(address: str) -> Link:
    return connect(Address.parse(address), SECRET, "engine")


def settle(its: Fleet) -> None:
    """Let time pass, in which nothing is sent, until the controller has nothing more to do."""
    for _ in range(SETTLE_TICKS):
        if its.tick(np.zeros((NUM_LAYERS, NUM_EXPERTS), np.int64)):
            return
    raise RuntimeError(f"the controller did not come to rest within {SETTLE_TICKS} ticks")


def rebalance(its: Fleet, traffic: Traffic, num_steps: int) -> int:
    """Show the controller some load, and have it act on that; return how many experts were copied."""
    before = its.num_staged
    for _ in range(num_steps):
        traffic.step()
        its.tick(traffic.take_load())
    its.rebalance()
    settle(its)
    return its.num_staged - before


def imbalances(its: Fleet, traffic: Traffic, num_steps: int) -> tuple[Floats, Floats]:
    """Return the busiest group's rows over the mean, for each layer: as measured, and as it could be at best.

    The controller sees nothing of these steps.
    """
    groups = list(its.groups.values())
    before_GL = np.stack([group.store.rows_L.copy() for group in groups])
    for _ in range(num_steps):
        traffic.step()
    rows_GL = np.stack([group.store.rows_L for group in groups]) - before_GL
    held_GLE = np.zeros((NUM_GROUPS, NUM_LAYERS, NUM_EXPERTS), np.bool_)
    for number, group in enumerate(groups):
        for layer, expert in group.store.held:
            held_GLE[number, layer, expert] = True
    best_GL = rows_per_group(traffic.take_load().astype(np.float64), held_GLE)
    return rows_GL.max(0) / rows_GL.mean(0), best_GL.max(0) / best_GL.mean(0)


if __name__ == "__main__":
    main()
