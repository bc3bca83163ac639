"""Which groups of a crowded host take part in a layer."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.crowds import Crowd, asked_groups


def asked(*held_G: Iterable[int], crowds: Iterable[Crowd] = (), at_once: int = 2, first: int = 0) -> set[int]:
    """Return the groups that are asked; all groups are on one host unless `crowds` says something else."""
    held = [frozenset(its) for its in held_G]
    return set(asked_groups(held, crowds or [Crowd(tuple(range(len(held))), at_once)], first))


def test_equals_take_turns():
    full = range(4)
    turns = [asked(full, full, full, full, first=first) for first in range(4)]
    assert turns == [{0, 1}, {1, 2}, {2, 3}, {3, 0}]


@pytest.mark.parametrize("first", range(4))
def test_those_that_are_asked_together_hold_every_expert(first: int):
    assert asked((0, 1), (1, 2), (2, 3), (3, 0), first=first) in ({0, 2}, {1, 3})


@pytest.mark.parametrize("first", range(4))
def test_one_that_is_being_filled_is_left_alone_while_full_ones_can_do(first: int):
    assert asked(range(4), (0,), range(4), (1,), first=first) == {0, 2}


def test_more_are_asked_where_fewer_do_not_hold_every_expert():
    assert asked((0,), (1,), (2,), (0, 1)) == {2, 3}
    assert asked((0,), (1,), (2,), (3,)) == {0, 1, 2, 3}


@pytest.mark.parametrize("first", range(8))
def test_each_expert_is_asked_for_in_as_many_groups_as_the_others(first: int):
    groups = asked(*[(0, 1)] * 4, *[(2, 3)] * 4, at_once=4, first=first)
    assert len(groups & {0, 1, 2, 3}) == len(groups & {4, 5, 6, 7}) == 2


def test_a_host_takes_into_account_what_others_are_asked_for():
    crowds = [Crowd((0, 1), 1), Crowd((2, 3), 1)]
    assert asked((0, 1), (2, 3), (0, 1), (2, 3), crowds=crowds) == {0, 3}


def test_groups_that_are_in_no_crowd_are_all_asked():
    assert 3 in asked((0,), (0,), (0,), (0,), crowds=[Crowd((0, 1, 2), 1)])


def test_a_group_without_experts_of_the_layer_is_not_asked():
    assert asked((), (0,), (), ()) == {1}
    assert asked((), ()) == set()


@given(
    st.lists(st.frozensets(st.integers(0, 6)), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 9)
)
def test_no_expert_is_left_out_and_no_group_asked_in_vain(held_G, at_once: int, first: int):
    groups = asked(*held_G, at_once=at_once, first=first)
    assert frozenset().union(*(held_G[group] for group in groups)) == frozenset().union(*held_G)
    assert all(held_G[group] for group in groups)
