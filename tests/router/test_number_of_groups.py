"""Scaling by command and by load, and drains, as the router decides them, in virtual time."""

from itertools import cycle

import pytest

from router.autoscale import AutoscalePolicy
from tests.router.simulated_fleet import ALL, STEP_S, Fleet, replicas, settled_fleet


def test_scaling_up_and_down_ends_with_the_wished_number_and_all_replicas():
    fleet = settled_fleet()
    for num_groups in (4, 2):
        fleet.controller.scale(num_groups)
        fleet.settle()
        assert len(fleet.groups) == num_groups
        assert all(number >= 2 for number in replicas(fleet).values())


def starts_at_once(fleet: Fleet) -> int:
    """Let the fleet settle; return how many groups were starting at the same time, at most."""
    most = 0
    while not fleet.controller.progress(fleet.now_s).is_settled:
        fleet.step()
        most = max(most, fleet.controller.progress(fleet.now_s).groups["starting"])
    return most


@pytest.mark.parametrize("hosts", [["a"], ["a", "b"]])
def test_while_every_expert_is_there_groups_start_one_after_another_on_each_host(hosts: list[str]):
    fleet = Fleet()
    fleet.hosts = cycle(hosts)
    fleet.settle()
    fleet.controller.scale(4)
    assert starts_at_once(fleet) == len(hosts)


def test_groups_start_at_once_when_an_expert_is_missing():
    fleet = settled_fleet(num_groups=3)
    for name in list(fleet.groups):
        fleet.kill(name)
    fleet.step()
    assert starts_at_once(fleet) == 3


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
