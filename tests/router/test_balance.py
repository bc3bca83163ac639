"""Where experts should be, against an exact bound, what must always hold, and the greedy policy."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bench.greedy_policy import greedy_policy, relabelled
from router.balance import balance
from router.split import rows_per_group

# L layers   E experts   G expert groups

LAYERS = 2
ANY_SPEED = settings(deadline=None)  # a busy machine is no failure


@st.composite
def clusters(draw: st.DrawFn, most_groups: int = 5):
    """Return load_LE, held_GLE and slots_G; what is held may be more than there are slots."""
    num_groups, num_experts = draw(st.integers(1, most_groups)), draw(st.integers(1, 7))
    loads = st.one_of(st.just(0), st.integers(0, 1000), st.sampled_from([1, 10, 10_000]))
    cells = num_groups * LAYERS * num_experts
    load_LE = np.array(
        draw(st.lists(loads, min_size=LAYERS * num_experts, max_size=LAYERS * num_experts)), float
    )
    held_GLE = np.array(draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    slots_G = np.array(draw(st.lists(st.integers(0, 6), min_size=num_groups, max_size=num_groups)))
    return (
        load_LE.reshape(LAYERS, num_experts),
        held_GLE.reshape(num_groups, LAYERS, num_experts),
        slots_G,
    )


@st.composite
def covered_clusters(draw: st.DrawFn):
    """Return a cluster with rows in every layer, whose groups hold every expert and no more than they may."""
    load_LE, held_GLE, slots_G = draw(clusters())
    for expert in range(load_LE.shape[1]):
        held_GLE[expert % len(held_GLE), :, expert] = True
    return load_LE + 1, held_GLE, np.maximum(slots_G, held_GLE.sum(axis=2).max(axis=1))


def least_maximum(load_E, held_GE) -> float:
    """Return the busiest group's rows at the best split (Hall: what has no home outside S must fit in S)."""
    groups = range(len(held_GE))
    homes_E = [set(np.flatnonzero(held_G)) for held_G in held_GE.T]
    return max(
        sum(load for load, homes in zip(load_E, homes_E, strict=True) if homes and homes <= set(subset))
        / size
        for size in range(1, len(held_GE) + 1)
        for subset in combinations(groups, size)
    )


def imbalance(load_LE, held_GLE, slots_G):
    """Return max over mean of the groups with slots, per layer; 1 where there are no rows."""
    rows_GL = rows_per_group(load_LE, held_GLE)[slots_G > 0]
    mean_L = rows_GL.mean(axis=0)
    return np.where(mean_L > 0, rows_GL.max(axis=0) / np.where(mean_L > 0, mean_L, 1), 1.0)


def cells(mask_GLE) -> list[str]:
    """Name cells for a failing test."""
    return [
        f"layer {layer} expert {expert} in group {group}" for group, layer, expert in np.argwhere(mask_GLE)
    ]


def zipf(rng, num_layers: int, num_experts: int):
    load_E = 1e6 / np.arange(1, num_experts + 1) ** 1.2
    return np.stack([rng.permutation(load_E) for _ in range(num_layers)])


def empty(num_groups: int, num_layers: int, num_experts: int):
    return np.zeros((num_groups, num_layers, num_experts), bool)


@ANY_SPEED
@given(clusters())
def test_the_busiest_group_has_no_more_rows_than_the_best_split_gives_it(cluster):
    load_LE, held_GLE, _ = cluster
    rows_GL = rows_per_group(load_LE, held_GLE)
    for layer in range(LAYERS):
        least = least_maximum(load_LE[layer], held_GLE[:, layer])
        assert rows_GL[:, layer].max() == pytest.approx(least, rel=1e-6), f"layer {layer}"


@ANY_SPEED
@given(clusters())
def test_every_row_of_an_expert_that_is_held_goes_to_some_group(cluster):
    load_LE, held_GLE, _ = cluster
    rows_L = rows_per_group(load_LE, held_GLE).sum(axis=0)
    np.testing.assert_allclose(rows_L, (load_LE * held_GLE.any(axis=0)).sum(axis=1))


@ANY_SPEED
@given(clusters(), st.integers(1, 3))
def test_no_group_is_given_more_experts_than_it_has_slots_for(cluster, min_replicas):
    load_LE, held_GLE, slots_G = cluster
    count_GL = balance(load_LE, held_GLE, slots_G, min_replicas).sum(axis=2)
    for group, layer in np.argwhere(count_GL > slots_G[:, None]):
        pytest.fail(
            f"group {group} has {slots_G[group]} slots, and {count_GL[group, layer]} in layer {layer}"
        )


@ANY_SPEED
@given(clusters(), st.integers(1, 3))
def test_as_many_experts_are_covered_as_there_are_slots_for(cluster, min_replicas):
    load_LE, held_GLE, slots_G = cluster
    num_experts = load_LE.shape[1]
    replicas_LE = balance(load_LE, held_GLE, slots_G, min_replicas).sum(axis=0)
    possible = min(num_experts, int(np.minimum(slots_G, num_experts).sum()))
    for layer in range(LAYERS):
        missing = np.flatnonzero(replicas_LE[layer] == 0).tolist()
        assert num_experts - len(missing) == possible, f"layer {layer} has no replica of experts {missing}"


@ANY_SPEED
@given(clusters())
def test_every_expert_has_two_replicas_if_there_are_slots_for_them(cluster):
    load_LE, held_GLE, slots_G = cluster
    num_experts = load_LE.shape[1]
    assume(np.count_nonzero(slots_G) >= 2 and np.minimum(slots_G, num_experts).sum() >= 2 * num_experts)
    replicas_LE = balance(load_LE, held_GLE, slots_G, min_replicas=2).sum(axis=0)
    for layer, expert in np.argwhere(replicas_LE < 2):
        pytest.fail(f"layer {layer} expert {expert} has {replicas_LE[layer, expert]} replicas")


@ANY_SPEED
@given(clusters(), st.integers(1, 3))
def test_balancing_a_result_again_changes_nothing(cluster, min_replicas):
    load_LE, held_GLE, slots_G = cluster
    once_GLE = balance(load_LE, held_GLE, slots_G, min_replicas)
    twice_GLE = balance(load_LE, once_GLE, slots_G, min_replicas)
    assert cells(once_GLE != twice_GLE) == []


def held_by_one(group: int, layer: int, expert: int):
    """Return a cluster that is balanced from nothing, because the search gets stuck at what is held."""
    load_LE = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 0, 5, 0, 1]], float)
    held_GLE = np.zeros((4, *load_LE.shape), bool)
    held_GLE[group, layer, expert] = True
    return load_LE, held_GLE, np.array([1, 3, 1, 5])


@ANY_SPEED
@example(held_by_one(3, 1, 4), 1)
@given(clusters(), st.integers(1, 2))
def test_what_is_held_stays_unless_its_slot_is_taken(cluster, min_replicas):
    load_LE, held_GLE, slots_G = cluster
    wanted_GLE = balance(load_LE, held_GLE, slots_G, min_replicas)
    has_room_GL = wanted_GLE.sum(axis=2) < slots_G[:, None]
    assert cells(held_GLE & ~wanted_GLE & has_room_GL[:, :, None]) == []


@ANY_SPEED
@given(covered_clusters())
def test_a_placement_that_covers_and_is_even_enough_is_left_alone(cluster):
    load_LE, held_GLE, slots_G = cluster
    trigger = imbalance(load_LE, held_GLE, slots_G).max() + 0.02
    assert cells(balance(load_LE, held_GLE, slots_G, tolerance=1.0, trigger=trigger) != held_GLE) == []


@ANY_SPEED
@given(clusters(), st.integers(0, 2**32 - 1))
def test_loads_that_fluctuate_by_two_percent_move_nothing(cluster, seed):
    load_LE, held_GLE, slots_G = cluster
    assume(slots_G.any() and load_LE.any(axis=1).all())
    assume(np.minimum(slots_G, load_LE.shape[1]).sum() >= load_LE.shape[1])
    wanted_GLE = balance(load_LE, held_GLE, slots_G)
    assume((imbalance(load_LE, wanted_GLE, slots_G) <= 1.05).all())
    now_LE = load_LE * np.random.default_rng(seed).choice([0.98, 1.02], load_LE.shape)
    assert cells(balance(now_LE, wanted_GLE, slots_G) != wanted_GLE) == []


@ANY_SPEED
@given(covered_clusters())
def test_imbalance_never_grows_where_all_experts_are_held_already(cluster):
    load_LE, held_GLE, slots_G = cluster
    after_L = imbalance(load_LE, balance(load_LE, held_GLE, slots_G), slots_G)
    before_L = imbalance(load_LE, held_GLE, slots_G)
    assert (after_L <= before_L + 1e-6).all(), f"before {before_L}, after {after_L}"


@pytest.mark.parametrize("min_replicas", [1, 2])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "slots"), [(8, 3, 6), (8, 4, 4), (256, 40, 16), (7, 7, 2)]
)
def test_without_loads_experts_are_dealt_evenly(num_experts, num_groups, slots, min_replicas):
    num_layers = 10
    held_GLE = empty(num_groups, num_layers, num_experts)
    wanted_GLE = balance(
        np.zeros((num_layers, num_experts)), held_GLE, np.full(num_groups, slots), min_replicas
    )
    count_GL = wanted_GLE.sum(axis=2)
    assert count_GL.sum() == min_replicas * num_layers * num_experts
    assert np.ptp(count_GL, axis=0).max() <= 1, f"experts per group and layer: {count_GL.tolist()}"
    assert np.ptp(count_GL.sum(axis=1)) <= 1, f"experts per group: {count_GL.sum(axis=1).tolist()}"


def test_a_group_without_slots_is_emptied_and_only_its_experts_are_copied():
    rng = np.random.default_rng(0)
    load_LE = 1000 + rng.random((4, 8))
    held_GLE = balance(load_LE, empty(4, 4, 8), np.full(4, 4))
    wanted_GLE = balance(load_LE, held_GLE, np.array([4, 4, 4, 0]), tolerance=1.3, trigger=1.5)
    alone_LE = held_GLE[3] & (held_GLE.sum(axis=0) == 1)
    assert cells(wanted_GLE[3:]) == []
    np.testing.assert_array_equal((wanted_GLE & ~held_GLE).sum(axis=0), alone_LE)


def test_an_expert_gets_its_second_replica_though_the_only_free_slots_are_beside_the_first():
    held_GLE = np.array([[[1, 0, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]], bool)
    held_GLE[2, 0, 1:3] = True
    held_GLE[1, 0, 3] = True
    wanted_GLE = balance(np.ones((1, 4)), held_GLE, np.array([2, 3, 3]), min_replicas=2, trigger=9)
    assert wanted_GLE.sum(axis=0).tolist() == [[2, 2, 2, 2]]
    assert (wanted_GLE & ~held_GLE).sum() == 2


def test_where_slots_are_short_second_replicas_make_room_for_experts_without_any():
    held_GLE = np.array([[[1, 1, 0]], [[1, 1, 0]]], bool)
    wanted_GLE = balance(np.array([[9.0, 5.0, 1.0]]), held_GLE, np.array([2, 2]), min_replicas=2)
    assert wanted_GLE.any(axis=0).all()
    assert wanted_GLE.sum() == 4


@pytest.mark.parametrize("begin", ["empty", "random"])
def test_a_zipf_load_is_spread_to_a_tenth_in_every_layer(begin):
    rng = np.random.default_rng(7)
    load_LE, slots_G, held_GLE = zipf(rng, 56, 8), np.full(4, 3), empty(4, 56, 8)
    if begin == "random":
        for layer in range(56):
            for place, expert in enumerate(rng.permutation(8)):
                held_GLE[place % 4, layer, expert] = True
    after_L = imbalance(load_LE, balance(load_LE, held_GLE, slots_G), slots_G)
    assert after_L.max() <= 1.1, f"layer {after_L.argmax()} has {after_L.max():.3f}"


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_groups", "slots"), [(56, 8, 4, 3), (4, 256, 40, 8)]
)
def test_drifting_loads_move_at_most_half_of_what_the_greedy_policy_moves(
    num_layers, num_experts, num_groups, slots
):
    rng = np.random.default_rng(3)
    load_LE, slots_G = zipf(rng, num_layers, num_experts), np.full(num_groups, slots)
    ours_GLE = balance(load_LE, empty(num_groups, num_layers, num_experts), slots_G)
    theirs_GLE = greedy_policy(load_LE, slots_G)
    ours = theirs = 0
    for _ in range(5):
        load_LE = load_LE * np.exp(rng.normal(0, 0.1, load_LE.shape))
        before_GLE, ours_GLE = ours_GLE, balance(load_LE, ours_GLE, slots_G)
        ours += np.count_nonzero(ours_GLE & ~before_GLE)
        before_GLE, theirs_GLE = theirs_GLE, relabelled(greedy_policy(load_LE, slots_G), theirs_GLE)
        theirs += np.count_nonzero(theirs_GLE & ~before_GLE)
    assert ours <= theirs / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_LE": np.ones((2, 3))}, r"load_LE must be \[layers, experts\]"),
        ({"load_LE": np.array([[1.0, -1.0]])}, "-1.0 for expert 1 of layer 0"),
        ({"load_LE": np.array([[np.nan, 1.0]])}, "nan for expert 0 of layer 0"),
        ({"held_GLE": np.ones((2, 1, 2), int)}, "held_GLE must be of bool"),
        ({"slots_G": np.array([1])}, "one number per group, 2"),
        ({"slots_G": np.array([1, -2])}, "-2 for group 1"),
        ({"min_replicas": 0}, "min_replicas must be at least 1"),
        ({"tolerance": 1.2}, "tolerance must be at least 1 and below trigger"),
        ({"min_gain": 0.0}, "min_gain must be above 0"),
    ],
)
def test_nonsense_is_refused_by_name(change, message):
    sense = {"load_LE": np.ones((1, 2)), "held_GLE": empty(2, 1, 2), "slots_G": np.array([1, 1])}
    with pytest.raises(ValueError, match=message):
        balance(**{**sense, **change})
