"""A router that is killed and made anew finds out what there is, in virtual time."""

import numpy as np

from tests.router.simulated_fleet import (
    ALL,
    NUM_LAYERS,
    STEP_S,
    Fleet,
    SimulatedGroup,
    replicas,
    settled_fleet,
)


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
