"""Groups that can't be started, and experts that can't be staged, in virtual time."""

import asyncio

import pytest

from tests.router.simulated_fleet import (
    STEP_S,
    Fleet,
    settled_fleet,
)


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
