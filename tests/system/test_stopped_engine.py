"""Promise 1, for an engine that does not die but stands still: nobody says so, and no stream may wait."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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

    engines = two_engines.status()["models"][0]["engines"]
    pids = [engine["process"]["pid"] for engine in engines]
    with ThreadPoolExecutor(2 * NUM_STREAMS) as pool:
        told = [pool.submit(tell) for _ in range(NUM_STREAMS)]
        for _ in told:
            assert have_begun.acquire(timeout=60)
        os.kill(pids[0], signal.SIGSTOP)
        try:
            told += [pool.submit(tell) for _ in range(NUM_STREAMS)]
            answers, waits_s = zip(*(each.result(120) for each in told), strict=True)
        finally:
            os.kill(pids[0], signal.SIGCONT)
    assert set(answers) == {undisturbed}
    assert max(waits_s) < LONGEST_GAP_S, f"waits for a piece, in seconds: {waits_s}"

    # The engine that goes on has nothing left to do: what it had, others have answered.
    def is_idle() -> bool:
        engines = two_engines.status()["models"][0]["engines"]
        return len(engines) == 2 and not any(each["num_running"] + each["num_waiting"] for each in engines)

    wait_for(is_idle, "two idle engines")
    assert "".join(two_engines.story(MODEL, NUM_TOKENS)) == undisturbed
