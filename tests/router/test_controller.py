"""What the router decides, in virtual time: tests/router/simulated_fleet.py."""

from collections import Counter

import numpy as np

from tests.router.simulated_fleet import (
    ALL,
    NUM_EXPERTS,
    NUM_LAYERS,
    STEP_S,
    Fleet,
    replicas,
    run_until,
    settled_fleet,
)


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
