"""After any faults in any order, the router puts everything in place again, in virtual time."""

import numpy as np
import pytest

from router.autoscale import AutoscalePolicy
from tests.router.simulated_fleet import ALL, NUM_EXPERTS, NUM_LAYERS, Fleet, replicas, run_until


def random_faults(seed: int) -> None:
    """Do something to the fleet every second or so, then stop and see whether it recovers."""
    rng = np.random.default_rng(seed)
    slots_per_layer, min_replicas = int(rng.integers(2, NUM_EXPERTS + 1)), int(rng.integers(1, 3))
    smallest = -(-NUM_EXPERTS * min_replicas // slots_per_layer)
    fleet = Fleet(
        num_groups=int(rng.integers(smallest, 5)),
        slots_per_layer=slots_per_layer,
        min_replicas=min_replicas,
        autoscale=AutoscalePolicy(1, 4, up_after_s=2, down_after_s=5) if rng.random() < 0.3 else None,
    )
    fleet.start_steps = int(rng.choice([3, 30]))
    fleet.settle()

    def some_group() -> str:
        return str(rng.choice(sorted(fleet.groups)))

    for _ in range(40):
        fault = rng.choice(
            [
                "kill",
                "kill unseen",
                "stop",
                "go on",
                "router",
                "scale",
                "drain",
                "rebalance",
                "load",
                "engine",
                "work",
                "slow disk",
            ]
        )
        if fault == "kill" and fleet.groups:
            fleet.kill(some_group())
        elif fault == "kill unseen" and fleet.groups:
            fleet.kill(some_group(), is_known=False)
        elif fault == "stop" and fleet.groups:
            fleet.groups[some_group()].is_silent = True
        elif fault == "go on":
            for group in fleet.groups.values():
                group.is_silent = False
        elif fault == "router":
            fleet.new_router(deaf_steps=int(rng.integers(0, 12)))
        elif fault == "scale":
            fleet.controller.scale(int(rng.integers(smallest, NUM_EXPERTS + 1)))
        elif fault == "drain" and fleet.groups:
            fleet.controller.drain(some_group())
        elif fault == "rebalance":
            fleet.controller.rebalance()
        elif fault == "load":
            fleet.load_LE = rng.integers(0, 1000, (NUM_LAYERS, NUM_EXPERTS))
        elif fault == "engine":
            engine = fleet.engines[int(rng.integers(2))]
            engine.is_stalled = not engine.is_stalled
        elif fault == "work":
            fleet.work = 3 * rng.random()
        elif fault == "slow disk":
            fleet.staged_per_step = 2 - fleet.staged_per_step
        for _ in range(int(rng.integers(1, 8))):
            fleet.step()
    for group in fleet.groups.values():
        group.is_silent = False
    for engine in fleet.engines:
        engine.is_stalled = False
    fleet.staged_per_step = 2
    fleet.settle(num_steps=600)
    # What was ordered and is not wanted any more is taken back when no engine can know of it.
    run_until(fleet, lambda: not any(group.queue for group in fleet.groups.values()))
    assert set(replicas(fleet)) == ALL


@pytest.mark.parametrize("seeds", [range(first, first + 20) for first in range(0, 200, 20)], ids=str)
def test_after_any_sequence_of_faults_everything_is_in_place_again(seeds):
    for seed in seeds:
        try:
            random_faults(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
