import numpy as np

from router.expert_load import ExpertLoad

APART_GLE = np.eye(2, dtype=bool)[:, None, :]  # one layer, two experts, each in a group of its own


def load_of(*rows_E: int) -> ExpertLoad:
    load = ExpertLoad(1, len(rows_E), half_life_s=10.0, now_s=0.0)
    load.add(np.array([rows_E]), now_s=0.0)
    return load


def test_rows_count_half_after_a_half_life():
    load = load_of(8, 0)
    load.add(np.array([[0, 2]]), now_s=10.0)
    assert load.rows_LE.tolist() == [[4.0, 2.0]]


def test_imbalance_is_the_most_rows_of_a_group_over_the_mean():
    imbalance_L, _ = load_of(300, 100).imbalance(APART_GLE)
    assert imbalance_L.tolist() == [1.5]


def test_without_rows_all_is_even():
    imbalance_L, is_real_L = load_of(0, 0).imbalance(APART_GLE)
    assert (imbalance_L.tolist(), is_real_L.tolist()) == ([1.0], [False])


def test_the_same_imbalance_may_be_chance_for_few_rows_and_is_not_for_many():
    for num_rows, is_real in ((10, False), (1000, True)):
        assert load_of(3 * num_rows, num_rows).imbalance(APART_GLE)[1].tolist() == [is_real]


def test_rows_that_fall_by_chance_are_never_taken_for_more():
    rng = np.random.default_rng(1)
    num_layers, num_experts = 56, 8
    held_GLE = np.repeat(np.kron(np.eye(4, dtype=bool), np.ones(2, bool))[:, None], num_layers, axis=1)
    load = ExpertLoad(num_layers, num_experts, half_life_s=10.0, now_s=0.0)
    for now_s in range(400):
        load.add(rng.poisson(0.5, (num_layers, num_experts)), float(now_s))
        imbalance_L, is_real_L = load.imbalance(held_GLE)
        assert not is_real_L.any(), f"after {now_s} s, a layer at {imbalance_L[is_real_L]}"
    assert imbalance_L.max() > 1.25, "chance has made nothing uneven, so this shows nothing"
