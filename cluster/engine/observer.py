"""What an engine's steps tell its metrics and its report."""

import time
from collections import deque

from cluster.engine.engine import EngineStats
from cluster.metrics import EngineMetrics
from router.dispatch import DispatchCounts

RATE_WINDOW_S = 5.0


class EngineObserver:
    """Turns the engine's numbers into metrics, step by step; called from the engine's thread."""

    def __init__(self, metrics: EngineMetrics, model: str) -> None:
        self._first_token_seconds = metrics.time_to_first_token_seconds.labels(model)
        self._step_seconds = metrics.step_seconds.labels(model)
        self._step_tokens = metrics.step_tokens.labels(model)
        self._cached_tokens = metrics.cached_tokens.labels(model)
        self._preemptions = metrics.preemptions.labels(model)
        self._copied_blocks = metrics.copied_blocks.labels(model)
        self._adopted_blocks = metrics.adopted_blocks.labels(model)
        self._failovers = metrics.failovers.labels(model)
        self._rows_resent = metrics.rows_resent.labels(model)
        self._dispatched = DispatchCounts()
        self._gauges = [
            (metrics.running.labels(model), "num_running"),
            (metrics.waiting.labels(model), "num_waiting"),
            (metrics.used_blocks.labels(model), "used_blocks"),
            (metrics.total_blocks.labels(model), "total_blocks"),
        ]
        self._last = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._generated: deque[tuple[float, int]] = deque()  # (when, tokens) of the last steps

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers after its last step."""
        return self._last

    def saw_stats(self, stats: EngineStats) -> None:
        """Note the engine's numbers: all that an engine can tell outside its steps."""
        self._copied_blocks.inc(stats.num_copied_blocks - self._last.num_copied_blocks)
        self._adopted_blocks.inc(stats.num_adopted_blocks - self._last.num_adopted_blocks)
        for gauge, name in self._gauges:
            gauge.set(getattr(stats, name))
        self._last = stats

    def saw_first_token(self, seconds: float) -> None:
        """Note the time from a request's arrival to its first token."""
        self._first_token_seconds.observe(seconds)

    def saw_step(self, seconds: float, num_generated: int, stats: EngineStats) -> None:
        """Note a step's duration, the tokens it gave to requests, and the engine's numbers behind it."""
        num_computed = stats.num_computed_tokens - self._last.num_computed_tokens
        if num_computed:  # else it only reported ends
            self._step_seconds.observe(seconds)
            self._step_tokens.observe(num_computed)
        self._cached_tokens.inc(stats.num_cached_tokens - self._last.num_cached_tokens)
        self._preemptions.inc(stats.num_preemptions - self._last.num_preemptions)
        self.saw_stats(stats)
        self._generated.append((time.monotonic(), num_generated))
        while self._generated[0][0] < self._generated[-1][0] - RATE_WINDOW_S:
            self._generated.popleft()

    def saw_dispatch(self, counts: DispatchCounts) -> None:
        """Note what the dispatcher has been through; from one thread at a time, not the engine's."""
        self._failovers.inc(counts.failovers - self._dispatched.failovers)
        self._rows_resent.inc(counts.rows_resent - self._dispatched.rows_resent)
        self._dispatched = counts

    def tokens_per_s(self) -> float:
        """Return the rate of generated tokens over the last seconds. Safe from any thread."""
        since = time.monotonic() - RATE_WINDOW_S
        return sum(tokens for when, tokens in list(self._generated) if when >= since) / RATE_WINDOW_S
