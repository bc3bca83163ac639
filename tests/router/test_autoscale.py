"""How many expert groups the load needs, in virtual time."""

import pytest

from router.autoscale import AutoscalePolicy, Autoscaler

POLICY = AutoscalePolicy(min_groups=2, max_groups=6, up_after_s=5.0, down_after_s=60.0)


def run(busy_by_second: list[float], num_groups: int = 2, work: float | None = None) -> list[int]:
    """Return the number of groups after each second; with `work`, groups are as busy as that makes them."""
    scaler, numbers = Autoscaler(POLICY), []
    for second, busy in enumerate(busy_by_second):
        share = busy if work is None else min(1.0, work / num_groups)
        num_groups = scaler.decide(share, num_groups, float(second))
        numbers.append(num_groups)
    return numbers


def test_it_grows_when_groups_have_been_too_busy_for_some_seconds():
    numbers = run([0.9] * 10)
    assert numbers[:5] == [2] * 5
    assert numbers[6] == 4  # 2 * 0.9 / 0.5, rounded up


def test_a_burst_changes_nothing():
    assert run([0.3, 0.45, 1.0, 1.0, 1.0, 0.45] * 5) == [2] * 30


def test_it_shrinks_only_after_a_minute_of_little_to_do():
    numbers = run([0.1] * 70, num_groups=4)
    assert numbers[58] == 4
    assert numbers[-1] == 2


def test_a_lull_changes_nothing():
    assert set(run(([0.1] * 30 + [0.5] * 5) * 5, num_groups=4)) == {4}


@pytest.mark.parametrize("busy", [0.46, 0.5, 0.54])
def test_close_to_the_target_is_good_enough(busy: float):
    assert set(run([busy] * 100, num_groups=3)) == {3}


def test_it_stays_within_its_bounds():
    assert max(run([1.0] * 100)) == 6
    assert min(run([0.0] * 300, num_groups=6)) == 2


@pytest.mark.parametrize("work", [0.2, 1.0, 1.3, 2.0, 2.4, 5.0])
def test_a_steady_load_comes_to_rest(work: float):
    """`work` is in groups that are busy all the time."""
    numbers = run([0.0] * 600, work=work)
    assert len(set(numbers[300:])) == 1, "it goes to and fro"
