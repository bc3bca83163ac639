"""The table that says where each expert lives, and how a layer's rows are shared out, against slow looks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement import VISIT_ROWS, Group, Placement

NUM_LAYERS, NUM_EXPERTS = 3, 5
SLOTS = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1)), max_size=12)
ROWS = st.dictionaries(st.integers(0, NUM_EXPERTS), st.integers(0, 300)).map(dict.items).map(list)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    slots_of_group = draw(st.lists(SLOTS, max_size=4))
    hosts, abreast = st.sampled_from("ab"), st.sampled_from([None, 1, 2])
    groups = [
        Group(f"g{i}", address_on(draw(hosts)), tuple(slots), draw(abreast))
        for i, slots in enumerate(slots_of_group)
    ]
    return Placement(draw(st.integers(0, 9)), tuple(groups))


def address_on(host: str) -> str:
    return f"{host}@127.0.0.1:1/socket"


def placement_of(*experts_of_group: tuple[int, ...]) -> Placement:
    """Return a placement of one layer."""
    return Placement(
        1, tuple(Group(f"g{i}", "", tuple((0, e) for e in its)) for i, its in enumerate(experts_of_group))
    )


@given(placements())
def test_replicas_are_the_groups_that_hold_the_expert(placement: Placement):
    for layer in range(NUM_LAYERS + 1):
        for expert in range(NUM_EXPERTS + 1):
            holders = [i for i, group in enumerate(placement.groups) if (layer, expert) in group.slots]
            assert placement.replicas(layer, expert) == tuple(holders)


@given(placements(), st.integers(0, NUM_LAYERS), ROWS, st.integers(0, 9))
def test_every_row_goes_to_a_replica_of_its_expert_once(placement: Placement, layer, rows, turn):
    given_rows: Counter[int] = Counter()
    for share in placement.share_out(layer, rows, turn):
        assert share.num_rows > 0
        assert (layer, share.expert) in placement.groups[share.group].slots
        given_rows[share.expert] += share.num_rows
    held = {expert for expert, _ in rows if placement.replicas(layer, expert)}
    assert given_rows == {expert: number for expert, number in rows if number and expert in held}


@given(placements(), ROWS, st.integers(0, 9))
def test_an_expert_is_divided_only_into_parts_that_are_worth_reading_its_weights(placement, rows, turn):
    shares = placement.share_out(1, rows, turn)
    parts = Counter(share.expert for share in shares)
    assert all(share.num_rows >= VISIT_ROWS for share in shares if parts[share.expert] > 1)


def crowded(*experts_of_group: tuple[int, ...], abreast: int | None = 2, num_layers: int = 1) -> Placement:
    """Return a placement of groups on one host, which have the same experts of each layer."""
    groups = (
        Group(
            f"g{i}",
            address_on("host"),
            tuple((layer, e) for layer in range(num_layers) for e in its),
            abreast,
        )
        for i, its in enumerate(experts_of_group)
    )
    return Placement(1, tuple(groups))


def asked(placement: Placement, num_rows: int = 1, layer: int = 0, turn: int = 0) -> set[int]:
    """Return the groups that get rows if four experts have some."""
    shares = placement.share_out(layer, [(expert, num_rows) for expert in range(4)], turn)
    return {share.group for share in shares}


@pytest.mark.parametrize("num_rows", [1, 300])
def test_no_more_groups_of_a_host_are_asked_than_it_can_run_at_once(num_rows: int):
    placement = crowded(*[(0, 1, 2, 3)] * 4, num_layers=4)
    asked_L = [asked(placement, num_rows, layer) for layer in range(4)]
    assert {len(groups) for groups in asked_L} == {2}
    assert Counter(group for groups in asked_L for group in groups) == dict.fromkeys(range(4), 2), "in turn"


def test_all_engines_ask_the_same_groups():
    placement = crowded(*[(0, 1, 2, 3)] * 4)
    turns = [asked(placement, turn=turn) for turn in range(4)]
    assert turns == [turns[0]] * 4


def test_groups_that_need_no_cores_are_all_asked():
    assert asked(crowded(*[(0, 1, 2, 3)] * 4, abreast=None)) == {0, 1, 2, 3}


def test_hosts_are_crowded_each_for_itself():
    slots = tuple((0, expert) for expert in range(4))
    groups = asked(
        Placement(1, tuple(Group(f"g{i}", address_on(host), slots, 1) for i, host in enumerate("aaab")))
    )
    assert len(groups & {0, 1, 2}) == len(groups & {3}) == 1


def test_a_hot_expert_is_divided_evenly_among_its_replicas():
    shares = placement_of((0,), (0,), (0,)).share_out(0, [(0, 300)])
    assert sorted(share.num_rows for share in shares) == [100, 100, 100]


def test_rows_go_where_there_is_less_to_do():
    """Expert 0 lives in one group only, so expert 1, which lives in both, goes to the other."""
    shares = placement_of((0, 1), (1,)).share_out(0, [(0, 20), (1, 15)])
    assert {share.expert: share.group for share in shares} == {0: 0, 1: 1}


def test_a_hot_expert_fills_up_what_others_leave():
    shares = placement_of((0, 1), (0,)).share_out(0, [(0, 200), (1, 100)])
    rows = Counter({share.group: 0 for share in shares})
    for share in shares:
        rows[share.group] += share.num_rows
    assert abs(rows[0] - rows[1]) <= VISIT_ROWS


def test_single_rows_take_turns_among_replicas():
    placement = placement_of((0,), (0,), (0,))
    groups = [placement.share_out(0, [(0, 1)], turn)[0].group for turn in range(6)]
    assert groups == [0, 1, 2, 0, 1, 2]


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
