from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from cluster.engine import observer as observer_file
from cluster.engine.engine import EngineStats
from cluster.engine.observer import RATE_WINDOW_S, EngineObserver
from cluster.metrics import EngineMetrics

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    used_blocks=40,
    total_blocks=64,
    num_preemptions=1,
    num_computed_tokens=100,
    num_cached_tokens=32,
    num_copied_blocks=5,
    num_adopted_blocks=3,
)


class Observed:
    def __init__(self):
        self.registry = CollectorRegistry()
        self.observer = EngineObserver(EngineMetrics(self.registry), "m")

    def value(self, name):
        return self.registry.get_sample_value(f"tradewind_engine_{name}", {"model": "m"})


@pytest.fixture
def observed():
    return Observed()


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the observer's clock shows, in a list of one."""
    now_s = [1000.0]
    monkeypatch.setattr(observer_file.time, "monotonic", lambda: now_s[0])
    return now_s


def test_gauges_show_the_last_step(observed):
    observed.observer.saw_step(0.01, 3, STATS)
    observed.observer.saw_step(0.01, 3, replace(STATS, num_running=1, num_waiting=0, used_blocks=7))
    shown = [observed.value(name) for name in ("requests_running", "requests_waiting", "kv_blocks_used")]
    assert shown == [1, 0, 7]
    assert observed.value("kv_blocks") == 64


def test_counters_grow_by_what_the_step_added(observed):
    observed.observer.saw_step(0.01, 3, STATS)
    observed.observer.saw_step(
        0.01, 3, replace(STATS, num_preemptions=4, num_cached_tokens=48, num_copied_blocks=9)
    )
    assert observed.value("preemptions_total") == 4
    assert observed.value("kv_blocks_copied_total") == 9
    assert observed.value("kv_blocks_adopted_total") == 3
    assert observed.value("prefix_cached_tokens_total") == 48


def test_a_steps_tokens_are_those_computed_since_the_one_before(observed):
    observed.observer.saw_step(0.01, 3, STATS)
    observed.observer.saw_step(0.01, 3, replace(STATS, num_computed_tokens=105))
    assert observed.value("step_tokens_sum") == 105
    assert observed.value("step_tokens_count") == 2


def test_durations_are_observed(observed):
    observed.observer.saw_step(0.25, 3, STATS)
    observed.observer.saw_first_token(0.5)
    assert observed.value("step_duration_seconds_sum") == 0.25
    assert observed.value("time_to_first_token_seconds_sum") == 0.5


def test_the_last_stats_are_kept_for_the_report(observed):
    observed.observer.saw_stats(STATS)
    assert observed.observer.stats == STATS


def test_the_rate_counts_generated_tokens_of_the_last_seconds(observed, clock):
    for _ in range(10):
        clock[0] += RATE_WINDOW_S / 5
        observed.observer.saw_step(0.01, 8, STATS)
    assert observed.observer.tokens_per_s() == pytest.approx(6 * 8 / RATE_WINDOW_S)  # both ends included


def test_the_rate_of_an_engine_that_fell_idle_is_zero(observed, clock):
    observed.observer.saw_step(0.01, 8, STATS)
    clock[0] += RATE_WINDOW_S + 1
    assert observed.observer.tokens_per_s() == 0
