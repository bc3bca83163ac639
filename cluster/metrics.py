"""Every metric of the project, by the kind of process that counts it.

All names begin with `tradewind_`; units and suffixes follow Prometheus' own naming rules. The processes of
one node share one scrape target: whoever starts them sets PROMETHEUS_MULTIPROC_DIR to a new folder on the
local disk, before the first import of this file, and `exposition()` in any of them reports the sum. Make one
object of a kind per process: in that mode two of them would overwrite each other's numbers.
"""

import fcntl
import os
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

# From one step of a small model on a fast machine to an answer that somebody waits for all day.
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_STEP_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

_DEAD = "dead"  # where the name of a file of metrics has a pid


class GatewayMetrics:
    """What clients see."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        _make_directory()
        self.requests = Counter(
            "tradewind_gateway_requests_total",
            "HTTP requests by outcome; 499: the client left. A stream that fails counts under its error.",
            ["model", "endpoint", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "tradewind_gateway_requests_in_flight",
            "Completion requests being answered.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.request_seconds = Histogram(
            "tradewind_gateway_request_duration_seconds",
            "From the request's headers to the last byte of the answer.",
            ["model", "endpoint"],
            registry=registry,
            buckets=_DURATION_BUCKETS,
        )
        self.prompt_tokens = Counter(
            "tradewind_gateway_prompt_tokens_total", "Tokens of prompts.", ["model"], registry=registry
        )
        self.generated_tokens = Counter(
            "tradewind_gateway_generated_tokens_total", "Tokens of answers.", ["model"], registry=registry
        )
        self.time_to_first_token_seconds = Histogram(
            "tradewind_gateway_time_to_first_token_seconds",
            "From submission at the engine to the first token, per choice.",
            ["model"],
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.inter_token_seconds = Histogram(
            "tradewind_gateway_inter_token_latency_seconds",
            "Between two tokens of one choice.",
            ["model"],
            registry=registry,
            buckets=_TOKEN_GAP_BUCKETS,
        )
        self.resubmissions = Counter(
            "tradewind_requests_replayed_total",
            "Requests handed to another engine, with the tokens so far, because theirs was lost.",
            ["model"],
            registry=registry,
        )


class EngineMetrics:
    """What one engine does."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        _make_directory()

        def gauge(name: str, text: str) -> Gauge:
            # Two engines of one model on a node add up; a dead one must not count any more.
            return Gauge(name, text, ["model"], registry=registry, multiprocess_mode="livesum")

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model"], registry=registry)

        self.running = gauge(
            "tradewind_engine_requests_running", "Requests with blocks, in the current batch."
        )
        self.waiting = gauge("tradewind_engine_requests_waiting", "Requests that wait for admission.")
        self.used_blocks = gauge("tradewind_engine_kv_blocks_used", "KV blocks that requests hold.")
        self.total_blocks = gauge("tradewind_engine_kv_blocks", "KV blocks that exist.")
        self.cached_tokens = counter(
            "tradewind_engine_prefix_cached_tokens_total",
            "Prompt tokens found in the prefix cache, not computed.",
        )
        self.preemptions = counter(
            "tradewind_engine_preemptions_total",
            "Requests put back to the queue for lack of blocks.",
        )
        self.copied_blocks = counter(
            "tradewind_engine_kv_blocks_copied_total",
            "KV blocks sent to the engine that goes on with their requests if this one is lost.",
        )
        self.adopted_blocks = counter(
            "tradewind_engine_kv_blocks_adopted_total",
            "KV blocks of other engines taken into the prefix cache.",
        )
        self.step_seconds = Histogram(
            "tradewind_engine_step_duration_seconds",
            "One step: plan, run, sample, commit.",
            ["model"],
            registry=registry,
            buckets=_TOKEN_GAP_BUCKETS,
        )
        self.step_tokens = Histogram(
            "tradewind_engine_step_tokens",
            "Tokens computed in one step.",
            ["model"],
            registry=registry,
            buckets=_STEP_TOKEN_BUCKETS,
        )
        self.time_to_first_token_seconds = Histogram(
            "tradewind_engine_time_to_first_token_seconds",
            "From arrival at the engine to its first token.",
            ["model"],
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )

        self.failovers = counter(
            "tradewind_failovers_total",
            "Expert groups lost with rows on the way to them.",
        )
        self.rows_resent = counter(
            "tradewind_rows_resent_total",
            "Rows sent once more, to another replica, because their group was lost.",
        )


class RouterMetrics:
    """What the router of a model sees and does."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        _make_directory()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(
                name, text, ["model", *labels], registry=registry, multiprocess_mode="livemostrecent"
            )

        self.epoch = gauge("tradewind_placement_epoch", "Number of the newest placement.")
        self.imbalance = gauge(
            "tradewind_expert_imbalance",
            "Most rows of an expert group / mean, in the worst layer, for the load of the last seconds.",
        )
        self.groups = gauge("tradewind_expert_groups", "Expert groups by what is believed of them.", "state")
        self.rebalance_bytes = Counter(
            "tradewind_rebalance_bytes_total",
            "Bytes of weights staged into slots, by where they came from: `shared` ones were not copied.",
            ["model", "source"],
            registry=registry,
        )
        self.rebalance_seconds = Histogram(
            "tradewind_rebalance_seconds",
            "From a change of groups or load to the moment when every group holds what it should.",
            ["model"],
            registry=registry,
            buckets=_DURATION_BUCKETS,
        )


class ExpertMetrics:
    """What one expert group does."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        _make_directory()
        # Summed over layers: experts x layers x groups would be thousands of series for one model.
        self.rows = Counter(
            "tradewind_expert_rows_total",
            "Rows (tokens routed to an expert) computed, over all layers.",
            ["model", "group", "expert"],
            registry=registry,
        )


def _make_directory() -> None:
    """Make PROMETHEUS_MULTIPROC_DIR: it must be there for the first metric of a node, whoever makes that."""
    if directory := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        Path(directory).mkdir(parents=True, exist_ok=True)


def exposition(registry: CollectorRegistry = REGISTRY) -> bytes:
    """Return the metrics in Prometheus' text format: of all processes of the node, or of `registry` alone.

    In multiprocess mode it reads one file per process and kind of metric, so it blocks on the disk.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return generate_latest(registry)
    directory, merged = Path(folder), CollectorRegistry()
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # no other thread or gateway may read what is just being moved
        for path in directory.glob("*_*.db"):
            kind, _, pid = path.stem.rpartition("_")
            if pid != _DEAD and not _is_alive(int(pid)):
                _bury(path, kind)
        MultiProcessCollector(merged, path=folder)  # type: ignore[no-untyped-call]  # theirs is untyped
        return generate_latest(merged)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _bury(path: Path, kind: str) -> None:
    """Remove a dead process's file: its gauges count no more, and its counts go to one file for all the dead.

    Without that, every process that ever was would have to be read again at every scrape.
    """
    if not kind.startswith("gauge"):
        counts: Any = MmapedDict(str(path.with_name(f"{kind}_{_DEAD}.db")))  # type: ignore[no-untyped-call]  # too
        for key, value, timestamp, _ in counts.read_all_values_from_file(str(path)):
            counts.write_value(key, counts.read_value(key)[0] + value, timestamp)
        counts.close()
    path.unlink()
