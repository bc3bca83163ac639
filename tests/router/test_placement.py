"""The table that says where each expert lives, against slow obvious lookups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement import Group, Placement, even

NUM_LAYERS, NUM_EXPERTS = 3, 5
SLOTS = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1)), max_size=12)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    slots_of_group = draw(st.lists(SLOTS, max_size=4))
    groups = [Group(f"g{i}", f"address {i}", tuple(slots)) for i, slots in enumerate(slots_of_group)]
    return Placement(draw(st.integers(0, 9)), tuple(groups))


def places_of(placement: Placement, layer: int, expert: int) -> list[int]:
    """Look through all slots."""
    return [
        int(placement.first_place_G1[index]) + slot
        for index, group in enumerate(placement.groups)
        for slot, held in enumerate(group.slots)
        if held == (layer, expert)
    ]


@given(placements())
def test_consecutive_rows_take_turns_through_every_replica(placement: Placement):
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            places = places_of(placement, layer, expert)
            row_N = np.arange(len(places))
            chosen_N = placement.choose(layer, np.full_like(row_N, expert), row_N)
            assert sorted(chosen_N.tolist()) == places


@given(placements(), st.integers(0, NUM_LAYERS), st.lists(st.integers(0, NUM_EXPERTS)))
def test_a_chosen_place_is_a_replica_of_the_rows_expert_or_there_is_none(placement, layer, experts):
    place_N = placement.choose(layer, np.array(experts, np.int64), np.arange(len(experts)))
    for place, expert in zip(place_N.tolist(), experts, strict=True):
        places = places_of(placement, layer, expert)
        assert place in places if places else place == -1


@given(placements(), st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1), st.randoms())
def test_the_choice_for_a_row_does_not_depend_on_the_other_rows(placement, experts, random):
    row_N, expert_N = np.arange(len(experts)), np.array(experts, np.int64)
    all_N = placement.choose(1, expert_N, row_N)
    some = sorted(random.sample(range(len(experts)), random.randint(1, len(experts))))
    assert placement.choose(1, expert_N[some], row_N[some]).tolist() == all_N[some].tolist()


@given(placements(), placements(), st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1))
def test_the_choice_does_not_depend_on_groups_that_do_not_hold_the_expert(placement, others, experts):
    """Rows must be pinned by the replicas that live, not by the history of the table."""
    strangers = tuple(Group(f"x{g.name}", g.address, ((9, 9),)) for g in others.groups)
    with_strangers = Placement(placement.epoch, placement.groups + strangers)
    arguments = 1, np.array(experts, np.int64), np.arange(len(experts))
    assert with_strangers.choose(*arguments).tolist() == placement.choose(*arguments).tolist()


def test_replicas_share_the_rows_evenly():
    placement = Placement(1, tuple(Group(f"g{i}", "", ((0, 0),)) for i in range(3)))
    place_N = placement.choose(0, np.zeros(300, np.int64), np.arange(300))
    assert np.bincount(place_N).tolist() == [100, 100, 100]


@given(placements())
def test_without_a_group_its_slots_are_gone_and_the_others_stay(placement: Placement):
    for gone in placement.groups:
        rest = placement.without(gone.name)
        assert rest.groups == tuple(group for group in placement.groups if group is not gone)
        assert rest.epoch == placement.epoch


def test_without_an_unknown_group_nothing_changes():
    placement = Placement(1, (Group("g", "", ((0, 0),)),))
    assert placement.without("another") == placement


def test_two_groups_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        Placement(1, (Group("g", "a", ()), Group("g", "b", ())))


def test_a_slot_of_a_negative_layer_or_expert_is_refused():
    with pytest.raises(ValueError, match=r"group 'g' has slot \(0, -1\)"):
        Placement(1, (Group("g", "a", ((0, -1),)),))


@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_even_deals_every_expert_once_and_everywhere_evenly(num_layers, num_experts, data):
    num_groups = data.draw(st.integers(1, num_layers * num_experts))
    slots_of_group = even(num_layers, num_experts, num_groups)
    dealt = [slot for slots in slots_of_group for slot in slots]
    assert sorted(dealt) == [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    for layer in (None, *range(num_layers)):
        sizes = [sum(layer in (None, slot[0]) for slot in slots) for slots in slots_of_group]
        assert len(sizes) == num_groups
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((0, 8, 1), "num_layers is 0"), ((2, 8, 0), "num_groups is 0"), ((2, 8, 17), "num_groups is 17, but")],
)
def test_an_impossible_deal_is_refused_by_name(arguments: tuple[int, int, int], reason: str):
    with pytest.raises(ValueError, match=reason):
        even(*arguments)
