"""Following what the router pushes, with what comes late or never."""

import threading

from router.placement import Group, Placement
from router.pushed_placements import PushedPlacements

NEWER, NEWEST = (Placement(epoch, (Group("g", f"address {epoch}", ()),)) for epoch in (3, 4))


def test_before_the_first_there_are_no_groups():
    assert PushedPlacements().current() == Placement(0, ())


def test_what_is_pushed_is_current_even_if_epochs_are_left_out():
    placements = PushedPlacements()
    placements.push(NEWER)
    assert placements.current() == NEWER


def test_a_placement_that_is_overtaken_is_ignored():
    placements = PushedPlacements()
    placements.push(NEWEST)
    placements.push(NEWER)
    assert placements.current() == NEWEST


def test_waiting_for_a_newer_one_ends_when_it_is_pushed():
    placements = PushedPlacements()
    placements.push(NEWER)
    router = threading.Thread(target=placements.push, args=(NEWEST,))
    router.start()
    assert placements.wait_newer(NEWER.epoch, timeout_s=10) == NEWEST
    router.join(10)


def test_waiting_is_over_at_once_if_there_is_a_newer_one():
    placements = PushedPlacements()
    placements.push(NEWEST)
    assert placements.wait_newer(NEWER.epoch, timeout_s=0) == NEWEST


def test_when_time_is_up_waiting_returns_what_there_is():
    placements = PushedPlacements()
    placements.push(NEWER)
    assert placements.wait_newer(NEWER.epoch, timeout_s=0.01) == NEWER
