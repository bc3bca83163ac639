"""What the router decides, in virtual time: tests/router/simulated_fleet.py."""

import asyncio
from collections import Counter
from itertools import cycle

import numpy as np
import pytest

from router.autoscale import AutoscalePolicy
from tests.router.simulated_fleet import ALL, NUM_EXPERTS, NUM_LAYERS, STEP_S, Fleet, SimulatedGroup


def settled_fleet(**policy) -> Fleet:
    fleet = Fleet(**policy)
    fleet.settle()
    return fleet


def replicas(fleet: Fleet) -> Counter[tuple[int, int]]:
    """Count each expert's replicas in the newest placement."""
    return Counter(slot for group in fleet.placement.groups for slot in group.slots)


def run_until(fleet: Fleet, condition, num_steps: int = 100) -> int:
    for step in range(num_steps):
        if condition():
            return step
        fleet.step()
    raise AssertionError(f"it did not come about in {num_steps} steps")


def test_groups_start_empty_and_come_to_hold_every_expert_as_often_as_wished():
    fleet = settled_fleet(num_groups=2, min_replicas=2)
    assert replicas(fleet) == Counter(dict.fromkeys(ALL, 2))


def test_nothing_is_published_before_every_expert_is_there():
    fleet = Fleet(num_groups=2, min_replicas=2)
    run_until(fleet, lambda: fleet.placement.epoch > 0)
    assert set(replicas(fleet)) == ALL


def test_each_expert_is_read_from_the_checkpoint_once_and_further_replicas_come_from_peers():
    fleet = settled_fleet(num_groups=3, min_replicas=3)
    assert (fleet.num_read, fleet.num_fetched) == (len(ALL), 2 * len(ALL))


def test_a_killed_group_is_out_of_the_table_in_the_step_in_which_ray_tells():
    fleet = settled_fleet()
    fleet.kill("model/0")
    fleet.step()
    assert [group.name for group in fleet.placement.groups] == ["model/1"]


def test_a_killed_group_is_replaced_and_filled_by_its_peers():
    fleet = settled_fleet()
    num_read = fleet.num_read
    fleet.kill("model/0")
    fleet.settle()
    assert replicas(fleet) == Counter(dict.fromkeys(ALL, 2))
    assert fleet.num_read == num_read


def sharing(fleet: Fleet) -> dict[str, int]:
    return {name: group.num_sharing for name, group in fleet.groups.items()}


def test_groups_of_one_host_share_its_cores():
    assert sharing(settled_fleet(num_groups=3)) == {"model/0": 3, "model/1": 3, "model/2": 3}


def test_a_group_has_the_cores_of_a_killed_one_at_once_and_until_another_has_taken_its_place():
    fleet = settled_fleet()
    fleet.kill("model/0", is_known=False)
    fleet.controller.doubt("model/0")  # its link broke
    fleet.step()
    assert sharing(fleet) == {"model/1": 1}
    fleet.lost.append("model/0")
    run_until(fleet, lambda: "model/0" in fleet.groups and fleet.groups["model/0"].held)
    while fleet.groups["model/0"].held != ALL:
        assert fleet.groups["model/1"].num_sharing == 1, "it does the other one's work, and has not its cores"
        fleet.step()
    fleet.settle()
    assert sharing(fleet) == {"model/0": 2, "model/1": 2}


def test_survivors_that_take_over_experts_have_no_more_cores_than_there_are():
    fleet = settled_fleet(num_groups=4, min_replicas=2, slots_per_layer=3)
    fleet.kill("model/0")
    for _ in range(100):
        fleet.step()
        shares = [group.num_sharing for group in fleet.groups.values() if group.held]
        assert min(shares) >= 3, shares
    assert sharing(fleet) == dict.fromkeys(fleet.groups, 4)


def test_groups_of_different_hosts_share_no_cores():
    fleet = Fleet(num_groups=3)
    fleet.hosts = cycle(["one", "other"])
    fleet.settle()
    assert sharing(fleet) == {"model/0": 2, "model/1": 1, "model/2": 2}


def test_without_a_replica_survivors_with_room_take_over_what_is_lost():
    fleet = settled_fleet(num_groups=2, min_replicas=1)
    lost = fleet.groups["model/0"].held
    fleet.kill("model/0")
    steps = run_until(fleet, lambda: lost <= fleet.groups["model/1"].held)
    assert "model/0" not in fleet.groups or fleet.groups["model/0"].steps_to_start, "a new process was faster"
    assert steps <= 1 + len(lost)
    fleet.settle()


def test_a_stopped_group_is_left_out_and_comes_back_when_it_goes_on():
    fleet = settled_fleet()
    fleet.groups["model/0"].is_silent = True
    run_until(fleet, lambda: len(fleet.placement.groups) == 1, num_steps=round(1.5 / STEP_S))
    fleet.groups["model/0"].is_silent = False
    fleet.step()
    assert len(fleet.placement.groups) == 2
    assert fleet.num_started == 2, "it was replaced too soon"


def test_a_stopped_group_costs_no_copies_while_others_hold_its_experts():
    fleet = settled_fleet(num_groups=3, min_replicas=2, slots_per_layer=4)
    fetched = fleet.num_fetched + fleet.num_read
    fleet.groups["model/0"].is_silent = True
    for _ in range(round(5 / STEP_S)):
        fleet.step()
    assert fleet.num_fetched + fleet.num_read == fetched


def test_a_suspect_that_alone_holds_an_expert_stays_in_the_table_until_another_holds_it():
    fleet = settled_fleet(num_groups=2, min_replicas=1)
    fleet.groups["model/0"].is_silent = True
    while any(group.name == "model/0" for group in fleet.placement.groups):
        assert set(replicas(fleet)) == ALL
        fleet.step()
    assert set(replicas(fleet)) == ALL


def test_a_group_that_stays_silent_is_ended_and_replaced():
    fleet = settled_fleet()
    fleet.groups["model/0"].is_silent = True
    run_until(fleet, lambda: fleet.num_started == 3, num_steps=round(11 / STEP_S))
    fleet.settle()
    assert replicas(fleet) == Counter(dict.fromkeys(ALL, 2))


def test_a_broken_link_makes_a_group_suspect_until_it_answers_again():
    fleet = settled_fleet()
    fleet.controller.doubt("model/0")
    fleet.controller.tick(fleet.now_s)
    assert [group.name for group in fleet.placement.groups] == ["model/1"]
    fleet.step()
    assert len(fleet.placement.groups) == 2


def test_scaling_up_and_down_ends_with_the_wished_number_and_all_replicas():
    fleet = settled_fleet()
    for num_groups in (4, 2):
        fleet.controller.scale(num_groups)
        fleet.settle()
        assert len(fleet.groups) == num_groups
        assert all(number >= 2 for number in replicas(fleet).values())


def test_a_group_that_is_not_needed_any_more_goes_only_when_others_hold_its_experts():
    fleet = settled_fleet(num_groups=4, slots_per_layer=2, min_replicas=1)
    fleet.controller.scale(2)
    while not fleet.controller.progress(fleet.now_s).is_settled:
        fleet.step()
        assert set(replicas(fleet)) == ALL


def test_too_few_groups_to_hold_every_expert_are_refused():
    fleet = settled_fleet(num_groups=4, slots_per_layer=2, min_replicas=1)
    with pytest.raises(ValueError, match="groups is 1, but with 2 slots for each layer it takes at least 2"):
        fleet.controller.scale(1)


def test_too_few_groups_to_hold_every_replica_are_refused():
    fleet = settled_fleet(num_groups=2, min_replicas=2)
    with pytest.raises(ValueError, match="at least 2 groups to hold 4 experts, 2 replicas of each"):
        fleet.controller.scale(1)


def test_more_groups_than_experts_are_refused():
    fleet = settled_fleet()
    with pytest.raises(ValueError, match=r"groups is 4000, but there are only 4 experts .* 4 at most"):
        fleet.controller.scale(4000)
    fleet.controller.scale(4)


def test_a_drained_group_is_replaced():
    fleet = settled_fleet()
    before = fleet.groups["model/0"]
    fleet.controller.drain("model/0")
    fleet.settle()
    assert before not in fleet.groups.values()
    assert len(fleet.groups) == 2


def test_draining_a_group_that_there_is_not_names_those_that_there_are():
    fleet = settled_fleet()
    with pytest.raises(ValueError, match="no expert group 'model/7'; there are model/0, model/1"):
        fleet.controller.drain("model/7")


def test_a_group_that_its_system_wants_to_end_is_drained():
    fleet = settled_fleet()
    before = fleet.groups["model/1"]
    before.is_leaving = True
    fleet.step()
    fleet.settle()
    assert before not in fleet.groups.values()


def test_a_new_router_changes_nothing_and_counts_epochs_on():
    fleet = settled_fleet()
    fleet.step()  # so that the engines have it
    epoch, groups = fleet.placement.epoch, fleet.placement.groups
    copies = fleet.num_read + fleet.num_fetched
    fleet.new_router()
    fleet.settle()
    assert fleet.placement.epoch > epoch
    assert fleet.placement.groups == groups
    assert fleet.num_read + fleet.num_fetched == copies


def test_a_new_router_remembers_how_many_groups_are_wished_for():
    fleet = settled_fleet()
    fleet.controller.scale(3)
    fleet.step()
    fleet.new_router()
    fleet.settle()
    assert len(fleet.groups) == 3


def test_a_new_router_ends_no_group_that_it_has_not_heard_yet():
    fleet = settled_fleet(num_groups=2)
    fleet.controller.scale(4)
    fleet.settle()
    fleet.new_router(deaf_steps=12)
    for _ in range(12):
        fleet.step()
    assert len(fleet.groups) == 4
    fleet.settle()
    assert len(fleet.groups) == 4


def test_a_new_router_frees_nothing_that_engines_ask_for_while_experts_are_missing():
    fleet = Fleet(num_groups=3, slots_per_layer=2, min_replicas=1)
    fleet.load_LE = np.array([[200, 200, 100, 100]] * NUM_LAYERS)  # even, on groups that hold these:
    fleet.groups = {
        name: SimulatedGroup(name, process, 6, 0, {slot for slot in ALL if slot[1] in experts})
        for name, process, experts in (("model/0", 1, (0, 1)), ("model/1", 2, (0, 1)), ("model/2", 3, (2, 3)))
    }
    fleet.new_router()
    fleet.settle()
    fleet.step()  # so that the engines have it
    fleet.kill("model/2")
    fleet.new_router()
    # One 0 and one 1 should make room for 2 and 3, which do not come for long.
    fleet.start_steps, fleet.staged_per_step = 60, 0
    for _ in range(round(10 / STEP_S)):  # `check` looks at every step
        fleet.step()
    fleet.staged_per_step = 2
    fleet.settle()
    assert set(replicas(fleet)) == ALL


def test_a_new_router_tells_engines_what_is_left_before_every_expert_is_back():
    fleet = settled_fleet(num_groups=2, slots_per_layer=2, min_replicas=1)
    fleet.step()  # so that the engines have it
    fleet.kill("model/0")
    fleet.new_router()
    fleet.staged_per_step = 0
    fleet.step()
    fleet.step()
    assert [group.name for group in fleet.engines[0].placement.groups] == ["model/1"]


def test_an_answer_that_a_later_one_has_overtaken_is_ignored():
    fleet = settled_fleet()
    group = fleet.groups["model/0"]
    late = group.state()
    group.held.remove((0, 0))
    fleet.controller.heard(group.state(), fleet.now_s)
    assert not fleet.controller.heard(late, fleet.now_s)
    fleet.controller.tick(fleet.now_s)
    assert replicas(fleet)[0, 0] == 1


def test_a_group_counts_its_answers_from_the_start_when_another_process_takes_its_name():
    fleet = settled_fleet()
    for _ in range(round(10 / STEP_S)):
        fleet.step()
    fleet.kill("model/0")
    fleet.settle(num_steps=round(10 / STEP_S))


def test_a_new_router_goes_on_with_a_drain():
    fleet = settled_fleet(num_groups=2, min_replicas=1)
    before = fleet.groups["model/0"]
    fleet.controller.drain("model/0")
    fleet.step()
    fleet.step()
    fleet.new_router()
    fleet.settle()
    assert before not in fleet.groups.values()


def test_nothing_is_settled_before_it_is_planned_for_the_groups_that_there_are():
    fleet = settled_fleet()
    fleet.controller.rebalance()
    assert not fleet.controller.progress(fleet.now_s).is_settled
    fleet.step()
    assert fleet.controller.progress(fleet.now_s).is_settled


def test_a_new_router_that_finds_a_group_full_of_what_it_should_not_hold_makes_the_placement_whole():
    fleet = settled_fleet(num_groups=2, slots_per_layer=2, min_replicas=1)
    full = {(layer, expert) for layer in range(NUM_LAYERS) for expert in (0, 1, 2)}
    other = {(layer, expert) for layer in range(NUM_LAYERS) for expert in (0, 1)}
    fleet.groups = {
        name: SimulatedGroup(name, process, len(full), steps_to_start=0, held=held)
        for name, process, held in (("model/0", 3, full), ("model/1", 4, other))
    }
    fleet.new_router()
    fleet.settle()
    assert set(replicas(fleet)) == ALL


def test_slots_are_not_freed_while_an_engine_is_in_a_step_under_an_older_placement():
    fleet = settled_fleet(num_groups=2, slots_per_layer=2, min_replicas=1)
    fleet.engines[0].is_stalled = True
    fleet.load_LE = np.array([[1000, 1000, 1, 1]] * NUM_LAYERS)
    fleet.controller.scale(4)
    for _ in range(
        12
    ):  # `check` looks at every step; longer than ENGINE_TTL_S the engine would count as dead
        fleet.step()
    fleet.engines[0].is_stalled = False
    fleet.settle()


def test_hot_experts_are_spread_when_the_load_is_uneven():
    fleet = settled_fleet(num_groups=4, slots_per_layer=3, min_replicas=1)
    fleet.load_LE = np.array([[1000, 400, 100, 50]] * NUM_LAYERS)
    for _ in range(round(60 / STEP_S)):
        fleet.step()
    assert fleet.controller.progress(fleet.now_s).imbalance <= 1.1
    assert replicas(fleet)[0, 0] >= 2


def test_on_command_also_a_small_imbalance_is_evened_out():
    fleet = settled_fleet(num_groups=4, slots_per_layer=3, min_replicas=1)
    fleet.load_LE = np.array([[100, 98, 96, 110]] * NUM_LAYERS)
    for _ in range(round(20 / STEP_S)):
        fleet.step()
    copies = fleet.num_read + fleet.num_fetched
    fleet.controller.rebalance()
    fleet.settle()
    assert fleet.num_read + fleet.num_fetched > copies


def test_a_steady_load_moves_nothing():
    fleet = settled_fleet(num_groups=4, slots_per_layer=3, min_replicas=1)
    copies = fleet.num_read + fleet.num_fetched
    for _ in range(round(60 / STEP_S)):
        fleet.step()
    assert fleet.num_read + fleet.num_fetched == copies


def test_the_noise_of_a_small_load_moves_nothing():
    rng = np.random.default_rng(1)
    fleet = settled_fleet(num_groups=4, slots_per_layer=2, min_replicas=1)
    copies = fleet.num_read + fleet.num_fetched
    for _ in range(round(120 / STEP_S)):
        fleet.load_LE = rng.multinomial(1, [1 / NUM_EXPERTS] * NUM_EXPERTS, NUM_LAYERS)
        fleet.step()
    assert fleet.num_read + fleet.num_fetched == copies


def test_only_the_layer_that_is_out_of_balance_is_touched():
    fleet = settled_fleet(num_groups=4, slots_per_layer=2, min_replicas=1)
    before = {name: {slot for slot in group.held if slot[0] == 0} for name, group in fleet.groups.items()}
    fleet.load_LE = np.array([[100, 100, 100, 130], [1000, 10, 10, 10]])
    run_until(fleet, lambda: replicas(fleet)[1, 0] > 1)
    fleet.settle()
    after = {name: {slot for slot in group.held if slot[0] == 0} for name, group in fleet.groups.items()}
    assert after == before


def test_an_expert_that_can_not_be_staged_is_ordered_less_and_less_often_and_the_reason_is_told():
    fleet = settled_fleet(num_groups=2, slots_per_layer=3, min_replicas=1)
    lost = fleet.groups["model/0"].held - fleet.groups["model/1"].held
    fleet.unreadable = {(0, min(expert for layer, expert in lost if layer == 0))}
    fleet.kill("model/0")
    for _ in range(round(120 / STEP_S)):
        fleet.step()
    assert sum(group.num_orders for group in fleet.groups.values()) < 40
    progress = fleet.controller.progress(fleet.now_s)
    assert (progress.missing_replicas, progress.lost_experts) == (1, 1)
    assert "the disk is broken" in progress.failure
    fleet.unreadable.clear()
    fleet.settle()
    assert fleet.controller.progress(fleet.now_s).failure is None


def test_an_expert_that_can_not_be_staged_at_first_fails_the_deployment_with_the_reason():
    fleet = Fleet(num_groups=2, min_replicas=2)
    fleet.unreadable = {(1, 2)}
    for _ in range(round(20 / STEP_S)):
        fleet.step()
    with pytest.raises(ValueError, match=r"can't stage layer 1 expert 2: the disk is broken"):
        asyncio.run(fleet.epochs.after(0, timeout_s=0))
    fleet.unreadable.clear()
    fleet.settle()
    assert asyncio.run(fleet.epochs.after(0, timeout_s=0)) == fleet.placement


def test_groups_that_fail_to_start_together_are_one_failure():
    fleet = Fleet(num_groups=4)
    fleet.step()
    for name in list(fleet.groups):
        fleet.kill(name)
        fleet.step()
    assert asyncio.run(fleet.epochs.after(0, timeout_s=0)) is None
    fleet.settle()


def test_a_group_that_can_not_be_started_fails_the_deployment_with_the_reason():
    fleet = Fleet()
    for _ in range(40):
        fleet.step()
        for name in list(fleet.groups):
            fleet.kill(name)
    with pytest.raises(ValueError, match="could not be started: killed"):
        asyncio.run(fleet.epochs.after(0, timeout_s=0))


def test_starts_that_fail_under_a_new_router_fail_nobody_who_has_an_earlier_placement():
    fleet = settled_fleet()
    fleet.step()  # so that the engines have it
    fleet.kill("model/0")
    fleet.kill("model/1")
    fleet.new_router()
    for _ in range(40):
        fleet.step()
        for name in list(fleet.groups):
            fleet.kill(name)
    fleet.settle()
    known = fleet.engines[0].placement.epoch
    assert asyncio.run(fleet.epochs.after(known - 1, timeout_s=0)) == fleet.placement


def test_starts_that_fail_are_tried_less_and_less_often():
    fleet = settled_fleet()
    started = fleet.num_started
    for _ in range(round(60 / STEP_S)):
        for name in [name for name, group in fleet.groups.items() if group.steps_to_start]:
            fleet.kill(name)
        if len(fleet.groups) == 2:
            fleet.kill("model/0")
        fleet.step()
    assert fleet.num_started - started < 15


def test_the_number_of_groups_follows_the_load_and_comes_back():
    fleet = settled_fleet(num_groups=2, autoscale=AutoscalePolicy(min_groups=2, max_groups=4))
    for work, expected in ((1.5, 3), (0.2, 2)):
        fleet.work = work
        for _ in range(round(120 / STEP_S)):
            fleet.step()
            assert set(replicas(fleet)) == ALL
        assert len(fleet.groups) == expected


def test_the_number_of_groups_follows_the_load_only_down_to_what_the_experts_need():
    autoscale = AutoscalePolicy(min_groups=1, max_groups=4)
    fleet = settled_fleet(num_groups=4, slots_per_layer=2, min_replicas=1, autoscale=autoscale)
    for _ in range(round(120 / STEP_S)):
        fleet.step()
    assert len(fleet.groups) == 2
    fleet.kill("model/0")
    fleet.settle()
    assert set(replicas(fleet)) == ALL


def test_the_load_is_not_followed_before_the_first_placement():
    fleet = Fleet(num_groups=4, min_replicas=1, autoscale=AutoscalePolicy(min_groups=1, max_groups=4))
    fleet.staged_per_step = 0
    for _ in range(round(120 / STEP_S)):
        fleet.step()
    assert fleet.controller.wish.num_groups == 4


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
