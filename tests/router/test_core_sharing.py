"""Groups of a host share its cores, and what the router tells them of it, in virtual time."""

from itertools import cycle

from tests.router.simulated_fleet import ALL, Fleet, run_until, settled_fleet


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
