"""Promise 1, for one of two engines: it dies, or stands still, and then nobody says so."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shards.kv_cache import BLOCK_SIZE
from tests.system.demo_deployment import Deployment, serving_this, wait_for

pytestmark = pytest.mark.system

MODEL = "smollm2-135m"
NUM_TOKENS = 100
NUM_STREAMS = 6
LONGEST_GAP_S = 15.0  # Serve would miss the engine after half a minute
CONFIG = f"""
models:
  - name: {MODEL}
    checkpoint: {MODEL}
    engines: 2
    engine_threads: 1
    max_running: 16
"""


@pytest.fixture(scope="module")
def two_engines(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("two-engines")
    with serving_this(CONFIG, folder) as running:
        yield running


def test_streams_of_a_stopped_engine_go_on_at_the_other_and_new_ones_begin_there(
    two_engines: Deployment,
) -> None:
    undisturbed = "".join(two_engines.story(MODEL, NUM_TOKENS))
    have_begun = threading.Semaphore(0)

    def tell() -> tuple[str, float]:
        """Return an answer, and the longest wait for a piece of it in seconds."""
        answer, longest_s, before = "", 0.0, time.monotonic()
        for index, text in enumerate(two_engines.story(MODEL, NUM_TOKENS)):
            now = time.monotonic()
            answer, longest_s, before = answer + text, max(longest_s, now - before), now
            if index == 10:
                have_begun.release()
        return answer, longest_s

    stopped = pids(two_engines)[0]
    with ThreadPoolExecutor(2 * NUM_STREAMS) as pool:
        told = [pool.submit(tell) for _ in range(NUM_STREAMS)]
        for _ in told:
            assert have_begun.acquire(timeout=60)
        os.kill(stopped, signal.SIGSTOP)
        try:
            told += [pool.submit(tell) for _ in range(NUM_STREAMS)]
            answers, waits_s = zip(*(each.result(120) for each in told), strict=True)
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert set(answers) == {undisturbed}
    assert max(waits_s) < LONGEST_GAP_S, f"waits for a piece, in seconds: {waits_s}"

    # The engine that goes on has nothing left to do: what it had, others have answered.
    def is_idle() -> bool:
        engines = two_engines.status()["models"][0]["engines"]
        return len(engines) == 2 and not any(each["num_running"] + each["num_waiting"] for each in engines)

    wait_for(is_idle, "two idle engines")
    assert "".join(two_engines.story(MODEL, NUM_TOKENS)) == undisturbed


def test_streams_of_a_killed_engine_go_on_at_the_other_from_copies_of_their_blocks(
    two_engines: Deployment,
) -> None:
    wait_for(lambda: len(pids(two_engines)) == 2, "two engines", deadline_s=60)
    num_before, _ = counts(two_engines)
    undisturbed = "".join(two_engines.story(MODEL, NUM_TOKENS, "undisturbed"))
    num_once = counts(two_engines)[0] - num_before
    are_long = threading.Semaphore(0)

    def tell(number: int) -> str:
        answer = ""
        for text in two_engines.story(MODEL, NUM_TOKENS, f"stream {number}"):
            answer += text
            if len(answer) > len(undisturbed) / 2 >= len(answer) - len(text):
                are_long.release()
        return answer

    before = counts(two_engines)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        told = [pool.submit(tell, number) for number in range(NUM_STREAMS)]
        for _ in told:
            assert are_long.acquire(timeout=60)
        killed = pids(two_engines)[0]
        os.kill(killed, signal.SIGKILL)
        assert {each.result(120) for each in told} == {undisturbed}
    num_computed, num_lost = (now - then for now, then in zip(counts(two_engines), before, strict=True))
    assert num_lost > 0, "the killed engine had no stream"
    num_again = num_computed - NUM_STREAMS * num_once
    # Of each, not the prompt and half of the answer, but what was not full yet or still on its way.
    assert 0 < num_again <= 3 * BLOCK_SIZE * num_lost, f"{num_again} tokens, of {num_lost} streams"
    wait_for(lambda: len({*pids(two_engines)} - {killed}) == 2, "two engines again", deadline_s=60)


def pids(deployment: Deployment) -> list[int]:
    return [engine["process"]["pid"] for engine in deployment.status()["models"][0]["engines"]]


def counts(deployment: Deployment) -> tuple[int, int]:
    """Return how many tokens all engines have computed, and how many requests lost theirs."""
    metrics = httpx.get(f"{deployment.url}/metrics", timeout=30).raise_for_status().text
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.labels.get("model") == MODEL and "le" not in sample.labels
    }
    names = ("tradewind_engine_step_tokens_sum", "tradewind_requests_replayed_total")
    num_computed, num_lost = (int(samples.get(name, 0)) for name in names)
    return num_computed, num_lost
